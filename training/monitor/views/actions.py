"""What a person does to a task. Each address is a POST that ends in a redirect with a sentence."""

from __future__ import annotations

from uuid import UUID

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST

from training.monitor.rows import can_stop, draft_href
from training.monitor.views.loading import task_for
from training.services.tasks import Answer, task_cancel, task_delete, task_duplicate, task_retry, task_stop


@require_POST
def cancel(request: HttpRequest, task_id: UUID) -> HttpResponse:
    task = task_for(request, task_id)
    _tell(request, task_cancel(task, by=request.user))
    return redirect(task)


@require_http_methods(["GET", "POST"])
def stop(request: HttpRequest, task_id: UUID) -> HttpResponse:
    """GET explains both ways to end a task early: the dialog of the task page, without JavaScript."""
    task = task_for(request, task_id)
    if request.method == "GET":
        context = {"section": "tasks", "task": task, "can_stop": can_stop(task)}
        return render(request, "monitor/task_stop.html", context)
    _tell(request, task_stop(task, by=request.user))
    return redirect(task)


@require_POST
def retry(request: HttpRequest, task_id: UUID) -> HttpResponse:
    task = task_for(request, task_id)
    _tell(request, task_retry(task, by=request.user))
    return redirect(task)


@require_POST
def duplicate(request: HttpRequest, task_id: UUID) -> HttpResponse:
    task = task_for(request, task_id)
    draft = task_duplicate(task, by=request.user)
    messages.success(request, f"This is a new draft with the choices of “{task}”. Change what you like.")
    return redirect(draft_href(draft))


@require_http_methods(["GET", "POST"])
def delete(request: HttpRequest, task_id: UUID) -> HttpResponse:
    """GET asks and says what goes and what stays."""
    task = task_for(request, task_id)
    if request.method == "GET":
        model = getattr(task, "trained_model", None)
        return render(request, "monitor/task_delete.html", {"section": "tasks", "task": task, "model": model})
    answer = task_delete(task, by=request.user)
    _tell(request, answer)
    return redirect("tasks:list") if answer.ok else redirect(task)


def _tell(request: HttpRequest, answer: Answer) -> None:
    messages.add_message(request, messages.SUCCESS if answer.ok else messages.WARNING, answer.text)
