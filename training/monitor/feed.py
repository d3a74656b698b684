"""What a page or a socket is told about a task: points and events by `seq`, and where the task stands.

A frame is `{"from", "to", "points", "events", "state"}`: all rows with from < seq <= to. `seq` is given out in
the transaction that writes the row, so once `task.last_seq` has been read, every row up to it can be read too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from django.db.models import F

from training.models import MetricPoint, TrainingTask
from training.monitor.progress import percent, phase_words, seconds_per_step
from training.monitor.series import Curves, curves_from, finite
from training.services.tasks import queue_position, waiting_reason

CHUNK = 500
PACE_POINTS = 50

TONES = {  # status -> suffix of the badge's class
    TrainingTask.Status.QUEUED: "warn",
    TrainingTask.Status.RUNNING: "busy",
    TrainingTask.Status.CANCELLING: "busy",
    TrainingTask.Status.SUCCEEDED: "good",
    TrainingTask.Status.STOPPED: "good",
    TrainingTask.Status.FAILED: "bad",
}


def frame_after(task: TrainingTask, after: int, *, chunk: int = CHUNK) -> dict[str, Any]:
    """The next rows after `after`, at most `chunk` of each kind. `task` was read before this call."""
    bound = {"seq__gt": after, "seq__lte": task.last_seq}
    points = list(
        task.points.filter(**bound).order_by("seq").values("seq", "step", "split", "values")[:chunk]
    )
    events = list(
        task.events.filter(**bound).order_by("seq").values("seq", "time", "level", "source", "text")[:chunk]
    )
    to = max(after, task.last_seq)
    for rows in (points, events):
        if len(rows) == chunk:
            to = min(to, rows[-1]["seq"])
    for point in points:
        point["values"] = {key: finite(value) for key, value in point["values"].items()}
    return {
        "from": after,
        "to": to,
        "points": [point for point in points if point["seq"] <= to],
        "events": [event for event in events if event["seq"] <= to],
    }


def state_of(task: TrainingTask) -> dict[str, Any]:
    """Where the task stands. Equal dictionaries mean: nothing to tell. Times are unix seconds."""
    recent = list(
        task.points.filter(split="train").order_by("-seq").values("step", "time", "values")[:PACE_POINTS]
    )
    recent.sort(key=lambda row: row["step"])
    active = task.status == task.Status.RUNNING
    left = max(0, task.total_steps - task.step)
    pace = seconds_per_step([(row["step"], row["time"]) for row in recent]) if active else None
    queued = task.status == task.Status.QUEUED
    return {
        "status": task.status,
        "label": task.get_status_display(),
        "tone": TONES.get(task.Status(task.status), ""),
        "desired_state": task.desired_state,
        "terminal": task.is_terminal,
        "phase": task.phase,
        "phase_text": phase_of(task) if active else "",
        "phase_done": task.phase_done,
        "phase_total": task.phase_total,
        "step": task.step,
        "total_steps": task.total_steps or None,
        "percent": percent(task.step, task.total_steps),
        "started": unix(task.started_at),
        "ended": unix(task.ended_at),
        "seconds_per_step": round(pace, 3) if pace else None,
        "eta_seconds": round(pace * left) if pace and left else None,
        "tokens_per_second": _speed(recent),
        "queue_position": queue_position(task) if queued else None,
        "waiting": waiting_reason(task) if queued else "",
    }


def phase_of(task: TrainingTask) -> str:
    return phase_words(task.phase, task.phase_done, task.phase_total, task.phase_unit)


def unix(moment: datetime | None) -> float | None:
    return None if moment is None else round(moment.timestamp(), 3)


def _speed(recent: Sequence[Mapping[str, Any]]) -> float | None:
    """Median of the last ten steps that say a speed: one slow step is not the speed."""
    speeds = sorted(
        speed for row in recent[-10:] if (speed := finite(row["values"].get("tokens_per_second"))) is not None
    )
    return round(speeds[len(speeds) // 2], 1) if speeds else None


def curves_of(task: TrainingTask) -> Curves:
    """Every series of the task, up to the `last_seq` that the caller has read."""
    rows = task.points.filter(seq__lte=task.last_seq).order_by("step").values_list("step", "values")
    return curves_from(rows.iterator(chunk_size=2000))


def loss_series(tasks: list[TrainingTask], *, points: int = 60) -> dict[Any, list[tuple[int, float | None]]]:
    """About `points` training losses of each task, for the sparklines of a list; one query for them all."""
    result: dict[Any, list[tuple[int, float | None]]] = {task.id: [] for task in tasks}
    strides: dict[int, list[Any]] = {}
    for task in tasks:
        strides.setdefault(max(1, task.step // points), []).append(task.id)
    for stride, ids in strides.items():
        rows = (
            MetricPoint.objects.filter(task__in=ids, split="train")
            .annotate(rest=F("step") % stride)
            .filter(rest=0)
            .order_by("step")
            .values_list("task_id", "step", "values__loss")
        )
        for task_id, step, value in rows:
            result[task_id].append((step, finite(value)))
    return result


def points_of(task: TrainingTask) -> Iterator[Mapping[str, Any]]:
    """Every stored point by step, training before evaluation of the same step (for the CSV)."""
    rows = task.points.order_by("step", "-split", "seq").values("step", "split", "time", "values")
    return rows.iterator(chunk_size=2000)
