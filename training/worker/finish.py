"""How an attempt ended: one transaction for the task's status, the attempt and the sentence about it."""

from __future__ import annotations

import shutil
from typing import Any

from django.db import transaction
from django.db.models.functions import Now

from training import states
from training.models import Run, TrainedModel, TrainingTask
from training.services.history import Level, event_add
from training.states import Fenced
from training.worker.endings import LOG_ADVICE, Ending, Then
from training.worker.leases import MAX_ATTEMPTS, Lease, hold, owned

Status = TrainingTask.Status


def is_cancelling(lease: Lease) -> bool:
    return TrainingTask.objects.filter(owned(lease), status=Status.CANCELLING).exists()


@transaction.atomic
def write_end(lease: Lease, ending: Ending, *, exit_code: int | None, log: str) -> None:
    """The end of this attempt: the task failed, was cancelled, or waits for the next one. Raises `Fenced`."""
    task = hold(lease)
    if task.status == Status.CANCELLING:  # whatever else happened: it is what the person wanted
        step = f" at step {task.step}" if task.step else ""
        _move(lease, Status.CANCELLED, f"Cancelled{step}.", level="info", from_=Status.CANCELLING)
    elif ending.then is Then.CONTINUE:
        text = (
            f"{ending.text} The task goes on when a worker is back, from its last checkpoint if there is one."
        )
        # An orderly interruption is no failed attempt.
        _move(lease, Status.QUEUED, text, level="info", attempts=max(0, task.attempts - 1))
    elif ending.then is Then.TRY_AGAIN and task.attempts < MAX_ATTEMPTS:
        _move(
            lease,
            Status.QUEUED,
            f"{ending.text} Trying again, from the last checkpoint if there is one.",
            level="warning",
        )
    else:
        fail(task, ending, log=log, epoch=lease.epoch)
    Run.objects.filter(task_id=lease.task_id, epoch=lease.epoch).update(
        ended=Now(), exit_code=exit_code, reason=ending.text
    )


def fail(task: TrainingTask, ending: Ending, *, log: str, epoch: int) -> bool:
    """`failed` with one sentence and a next step, from `running` under `epoch`."""
    text = ending.text
    if ending.then is Then.TRY_AGAIN:
        text = f"{text} This was attempt {task.attempts} without getting further, so the task was ended."
    failed = states.transition(
        task.pk,
        Status.FAILED,
        from_=Status.RUNNING,
        epoch=epoch,
        error=text,
        next_step=ending.next_step or LOG_ADVICE,
        log_tail=log,
    )
    if failed:
        event_add(task.pk, f"{text} {ending.next_step}".strip(), source="worker", level="error")
    return failed


def _move(
    lease: Lease, to: str, text: str, *, level: Level, from_: str = Status.RUNNING, **fields: Any
) -> None:
    if not states.transition(lease.task_id, to, from_=from_, epoch=lease.epoch, **fields):
        raise Fenced(f"Task {lease.task_id}: attempt {lease.epoch} could not end as {to}.")
    event_add(lease.task_id, text, source="worker", level=level)


def prune_checkpoints(task: TrainingTask) -> None:
    """After success nobody continues from them; a stopped task keeps its newest, to be continued one day, and that
    of its best evaluation, which may stay the best.
    """
    # Not "is it stopped?": a person may have pressed Retry since.
    succeeded = TrainingTask.objects.filter(pk=task.pk, status=Status.SUCCEEDED).exists()
    rows = list(task.checkpoints.order_by("-step", "-epoch"))
    model = None if succeeded else TrainedModel.objects.filter(task=task).first()
    best = model.result.get("best_step") if model else None
    for row in rows[0 if succeeded else 1 :]:
        if row.step == best:
            continue
        shutil.rmtree(row.folder, ignore_errors=True)
        row.delete()
