"""Turns the engine's events into rows, in order and once, as the owner of the lease.

One transaction per batch: it checks the epoch under the row's lock, takes the `seq` numbers it needs from the
task, and moves `Run.events_offset`. So a batch that is read twice, by this worker or by the next, adds
nothing.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction

from training.models import Checkpoint, MetricPoint, Run, TaskEvent, TrainingTask
from training.shown_paths import seen_from
from training.worker.leases import Lease, hold
from training.worker.tail import Line, TailReader

logger = logging.getLogger(__name__)


def publish(lease: Lease, lines: list[Line], *, offset: int, epoch: int | None = None) -> int:
    """Store what attempt `epoch` (own, or an earlier one) said up to byte `offset`; the last seq."""
    source = lease.epoch if epoch is None else epoch
    own = source == lease.epoch
    events = [(line.offset, line.event) for line in lines if line.event is not None]
    with transaction.atomic():
        task = hold(lease)
        seq = _points(task, events, seq=task.last_seq)
        seq = _sentences(task, events, seq=seq, source=source)
        changes = _standing(task, [event for _, event in events]) if own else {}
        if _checkpoints(task, events, source=source):
            changes["attempts"] = 0  # progress: a poisoned task is one that never gets here
        TrainingTask.objects.filter(pk=task.pk).update(last_seq=seq, **changes)
        Run.objects.filter(task=task, epoch=source).update(events_offset=offset)
    return seq


def publish_rest(lease: Lease, reader: TailReader, *, epoch: int | None = None) -> int:
    """Everything that is left of a file whose writer has ended; a torn last line is nobody's."""
    seq = 0
    while lines := reader.read():
        seq = publish(lease, lines, offset=reader.offset, epoch=epoch)
    return seq


def publish_earlier(lease: Lease) -> None:
    """What earlier attempts wrote and nobody published: their workers died first."""
    for run in Run.objects.filter(task_id=lease.task_id, epoch__lt=lease.epoch).select_related("task"):
        publish_rest(lease, TailReader(run.folder / "events.jsonl", run.events_offset), epoch=run.epoch)


def _points(task: TrainingTask, events: list[tuple[int, dict[str, Any]]], *, seq: int) -> int:
    """A step that an attempt replays after a resume is the same point: the first one stays."""
    new: dict[tuple[str, int], dict[str, Any]] = {}
    for _, event in events:
        if event["type"] == "metrics":
            new.setdefault((event["split"], event["step"]), event)
    if not new:
        return seq
    known = set(task.points.filter(step__in={step for _, step in new}).values_list("split", "step"))
    rows = []
    for (split, step), event in new.items():
        if (split, step) not in known:
            seq += 1
            values = {str(key): _value(value) for key, value in event["values"].items()}
            rows.append(
                MetricPoint(task=task, seq=seq, step=step, split=split, values=values, time=event["time"])
            )
    MetricPoint.objects.bulk_create(rows)
    return seq


def _value(value: Any) -> float | int | None:
    """A number or null: a NaN in JSON would break the page."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def _sentences(task: TrainingTask, events: list[tuple[int, dict[str, Any]]], *, seq: int, source: int) -> int:
    logs = {f"e{source}:{offset}": event for offset, event in events if event["type"] == "log"}
    if not logs:
        return seq
    known = set(task.events.filter(dedupe__in=logs).values_list("dedupe", flat=True))
    rows = []
    for dedupe, event in logs.items():
        if dedupe not in known:
            seq += 1
            rows.append(
                TaskEvent(
                    task=task,
                    seq=seq,
                    time=float(event.get("time", 0.0)),
                    level=event["level"],
                    source="engine",
                    text=seen_from(Path(settings.DATA_DIR), event["text"])[:4000],
                    dedupe=dedupe,
                )
            )
    TaskEvent.objects.bulk_create(rows)
    return seq


def _checkpoints(task: TrainingTask, events: list[tuple[int, dict[str, Any]]], *, source: int) -> bool:
    """Enter checkpoints; True when one is newer than all before."""
    steps = {event["step"]: event["path"] for _, event in events if event["type"] == "checkpoint"}
    if not steps:
        return False
    newest = task.checkpoints.order_by("-step").values_list("step", flat=True).first() or 0
    Checkpoint.objects.bulk_create(
        [
            Checkpoint(task=task, epoch=source, step=step, path=f"e{source}/{path}")
            for step, path in steps.items()
        ],
        ignore_conflicts=True,
    )
    return bool(max(steps) > newest)


def _standing(task: TrainingTask, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the run stands after these events."""
    changes: dict[str, Any] = {}
    for event in events:
        if event["type"] == "phase":
            changes |= {
                "phase": event["phase"][:30],
                "phase_done": event["done"],
                "phase_total": event["total"],
                "phase_unit": str(event.get("unit", ""))[:20],
            }
        elif event["type"] == "plan":
            said = {key: value for key, value in event.items() if key not in ("type", "time")}
            changes["plan"] = {**task.plan, **said}
            changes["total_steps"] = event["total_steps"]
        elif event["type"] == "metrics" and event["split"] == "train":
            changes["step"] = event["step"]
    return changes
