"""Data of a task: points by `seq`, all points as CSV, the log. No address here takes a path."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from django.http import FileResponse, HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.utils.http import content_disposition_header
from django.utils.text import slugify
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET

from training.contract import LOG_FILE
from training.models import TrainingTask
from training.monitor.charts import chart_by_id
from training.monitor.exports import points_csv
from training.monitor.feed import frame_after, points_of, state_of
from training.monitor.rows import newest_log
from training.monitor.views.loading import task_for


@require_GET
@never_cache
def task_points(request: HttpRequest, task_id: UUID) -> HttpResponse:
    """The same frame as on the socket, always with the state; `more` says that another page waits."""
    task = task_for(request, task_id)
    after = request.GET.get("after", "0")
    if not (after.isascii() and after.isdigit() and len(after) < 18):
        return JsonResponse({"error": "`after` must be a whole number, 0 or more."}, status=422)
    frame = frame_after(task, int(after))
    return JsonResponse(frame | {"state": state_of(task), "more": frame["to"] < task.last_seq})


@require_GET
@never_cache
def task_csv(request: HttpRequest, task_id: UUID) -> HttpResponse:
    """Every stored point, or with `?chart=` the columns of one chart."""
    task = task_for(request, task_id)
    chart = chart_by_id(request.GET.get("chart", ""))
    text = points_csv(points_of(task), keys=chart.keys if chart else ())
    response = HttpResponse(text, content_type="text/csv; charset=utf-8")
    name = _file_name(task, chart.dom_id.removeprefix("chart-") if chart else "metrics", "csv")
    response["Content-Disposition"] = content_disposition_header(True, name) or "attachment"
    return response


@require_GET
@never_cache
def task_log(request: HttpRequest, task_id: UUID) -> HttpResponseBase:
    """The end of the newest attempt's log as text; with `?download=1` the whole file."""
    task = task_for(request, task_id)
    path = _newest_log_path(task)
    if request.GET.get("download") and path is not None:
        return FileResponse(
            path.open("rb"),
            as_attachment=True,
            filename=_file_name(task, "engine", "log"),
            content_type="text/plain",
        )
    return HttpResponse(newest_log(task), content_type="text/plain; charset=utf-8")


def _newest_log_path(task: TrainingTask) -> Path | None:
    run = task.runs.order_by("-epoch").first()
    path = run.folder / LOG_FILE if run is not None else None
    return path if path is not None and path.is_file() else None


def _file_name(task: TrainingTask, what: str, suffix: str) -> str:
    return f"{slugify(task.name)[:60] or 'task'}-{str(task.id)[:8]}-{what}.{suffix}"
