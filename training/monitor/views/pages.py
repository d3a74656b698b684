"""The list of fine-tuning tasks and the page of one task, each with its partials."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET
from django.views.decorators.vary import vary_on_headers
from django_htmx.http import HttpResponseStopPolling
from django_htmx.middleware import HtmxDetails

from training import states
from training.models import TrainedModel, TrainingTask
from training.monitor import rows
from training.monitor.charts import CHARTS, payload
from training.monitor.doctor import read_curves
from training.monitor.feed import curves_of, state_of
from training.monitor.forms import TaskFilterForm
from training.monitor.progress import duration_words, phase_marks
from training.monitor.views.loading import task_for

PAGE_SIZE = 25


class HtmxRequest(HttpRequest):
    htmx: HtmxDetails


@require_GET
@vary_on_headers("HX-Request")
def task_list(request: HtmxRequest) -> HttpResponse:
    form = TaskFilterForm(request.GET)
    valid = form.is_valid()
    mine = TrainingTask.objects.for_user(request.user).select_related("dataset", "base_model")
    page = Paginator(form.apply(mine), PAGE_SIZE).get_page(request.GET.get("page"))
    found = rows.task_rows(list(page.object_list))
    context = {
        "section": "tasks",
        "form": form,
        "page": page,
        "rows": found,
        "active": any(row.is_active for row in found),
        "filtered": any(request.GET.get(name) for name in ("q", "status")),
        "query": _query(request),
    }
    if not valid:
        return render(request, "monitor/task_list.html", context, status=422)
    if not request.htmx:
        return render(request, "monitor/task_list.html", context)
    response = render(request, "monitor/task_list.html#task-rows", context)
    if not context["active"]:
        response.status_code = HttpResponseStopPolling.status_code
    return response


def _query(request: HtmxRequest) -> str:
    """The filter without the page number, for the links of the pager."""
    query = request.GET.copy()
    query.pop("page", None)
    return query.urlencode()


@require_GET
@vary_on_headers("HX-Request", "HX-Target")
def task_detail(request: HtmxRequest, task_id: UUID) -> HttpResponse:
    task = task_for(request, task_id)
    if task.status == TrainingTask.Status.DRAFT:
        return redirect(rows.draft_href(task))
    context: dict[str, Any] = {"section": "tasks", "task": task}
    if request.htmx and request.htmx.target in PARTS:
        context |= PARTS[request.htmx.target](task)
        return render(request, f"monitor/task_detail.html#{request.htmx.target}", context)
    curves = curves_of(task)
    context |= _status(task) | _history(task) | _reading(task, curves)
    context |= {
        "charts": CHARTS,
        "figures": payload(curves),
        "latest": rows.latest_values(curves),
        "settings_rows": rows.settings_of(task),
        "plan_facts": rows.plan_facts(task),
        "log_text": rows.newest_log(task),
        "boot": _boot(task, context["state"]),
    }
    return render(request, "monitor/task_detail.html", context)


def _boot(task: TrainingTask, state: dict[str, Any]) -> dict[str, Any]:
    """What the page's script starts from. `seq`: every row up to it is in the figures."""
    return {
        "seq": task.last_seq,
        "now": time.time(),
        "socket": f"/ws/tasks/{task.id}/",
        "points": reverse("tasks:points", args=[task.id]),
        "log": reverse("tasks:log", args=[task.id]),
        "name": str(task),
        "state": state,
    }


def _status(task: TrainingTask) -> dict[str, Any]:
    state = state_of(task)
    return {
        "state": state,
        "marks": phase_marks(task.phase, finished=task.is_terminal),
        "duration": duration_words(rows.seconds_run(task)),
        "time_left": duration_words(state["eta_seconds"]),
        "outcome": rows.outcome_of(task) if task.is_terminal else None,
        "can_stop": rows.can_stop(task),
        "can_cancel": task.status in {TrainingTask.Status.QUEUED, TrainingTask.Status.RUNNING},
        "can_retry": task.status in states.RETRYABLE,
        "can_delete": task.status in rows.DELETABLE,
    }


def _reading(task: TrainingTask, curves: Any = None) -> dict[str, Any]:
    curves = curves_of(task) if curves is None else curves
    kept = task.is_terminal and TrainedModel.objects.filter(task=task).exists()
    running = not task.is_terminal
    return {"findings": read_curves(curves, total_steps=task.total_steps, running=running, kept=kept)}


def _history(task: TrainingTask) -> dict[str, Any]:
    return {"events": rows.history_of(task), "runs": list(task.runs.all())}


def _ending(task: TrainingTask) -> dict[str, Any]:
    """A page opened while the task was queued offers both ways to end it once it runs."""
    return {"can_stop": rows.can_stop(task)}


# Ids on the task page that may be asked for alone.
PARTS = {"task-status": _status, "task-reading": _reading, "task-history": _history, "task-ending": _ending}
