"""What a person can do with a task after it was created: cancel, stop and keep, retry, duplicate, delete.

Every action is a conditional update with a sentence in the task's history in the same transaction. An action
that comes too late changes nothing and says so in its `Answer`.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from django.conf import settings
from django.db import transaction

from training import states
from training.models import TrainingTask
from training.services.drafts import draft_from_task
from training.services.history import event_add
from training.services.outputs import remove_folders, unclaimed_folders
from training.services.queue import queue_position, ring_on_commit, waiting_reason

__all__ = [
    "Answer",
    "queue_position",
    "task_cancel",
    "task_delete",
    "task_duplicate",
    "task_retry",
    "task_stop",
    "waiting_reason",
]

logger = logging.getLogger(__name__)

Status = TrainingTask.Status
Desired = TrainingTask.Desired
TRASH = ".trash"  # below RUNS_DIR; what a crash leaves in it is removed by the workers' sweep
DELETABLE = states.TERMINAL | {Status.DRAFT}


class Answer(NamedTuple):
    """`ok` False: nothing was changed, and `text` says why and what to do."""

    ok: bool
    text: str


@transaction.atomic
def task_cancel(task: TrainingTask, *, by: Any) -> Answer:
    """Queued: cancelled at once. Running: asked to end; its worker sees it within seconds."""
    if states.transition(task.pk, Status.CANCELLED, from_=Status.QUEUED, desired_state=Desired.CANCEL):
        event_add(task.pk, f"Cancelled by {by} before it started.", source="person")
        return Answer(True, "The task was cancelled.")
    if states.transition(task.pk, Status.CANCELLING, from_=Status.RUNNING, desired_state=Desired.CANCEL):
        event_add(task.pk, f"{by} cancelled the task.", source="person")
        return Answer(True, "The task is being cancelled.")
    return _too_late(task, "cancelled", Status.CANCELLING, "The task is already being cancelled.")


@transaction.atomic
def task_stop(task: TrainingTask, *, by: Any) -> Answer:
    """Stop and keep: end at the next step, evaluate, save. A task without a checkpoint has nothing to keep
    yet.
    """
    rows = TrainingTask.objects.filter(pk=task.pk, desired_state=Desired.RUN)
    waiting = rows.filter(status=Status.QUEUED)
    if waiting.exists() and not task.checkpoints.exists():
        return Answer(False, "The task has not started, so there is nothing to keep. Cancel it instead.")
    if rows.filter(status__in=[Status.RUNNING, Status.QUEUED]).update(desired_state=Desired.STOP) == 1:
        event_add(task.pk, f"{by} asked to stop at the next step and keep the model.", source="person")
        return Answer(True, "The task stops at its next step and keeps what it has learned.")
    if TrainingTask.objects.filter(
        pk=task.pk, desired_state=Desired.STOP, status__in=[Status.RUNNING, Status.QUEUED]
    ).exists():
        return Answer(True, "The task is already stopping.")
    return _too_late(
        task, "stopped", Status.CANCELLING, "The task is being cancelled; it can no longer be kept."
    )


@transaction.atomic
def task_retry(task: TrainingTask, *, by: Any) -> Answer:
    """Queue the same task again. It continues from its newest checkpoint that verifies, else from the start.

    Never from the start when there is a checkpoint: the settings are the same, so the steps would be too, and
    the points of those steps are on the charts already. To change something, duplicate the task. A `stopped`
    task goes on to its end; the model it kept stays in My Models.
    """
    queued = states.transition(
        task.pk,
        Status.QUEUED,
        from_=states.RETRYABLE,
        desired_state=Desired.RUN,
        attempts=0,
        rung_at=None,
        started_at=None,
        error="",
        next_step="",
        log_tail="",
    )
    if queued:
        where = "from its last checkpoint" if task.checkpoints.exists() else "from the start"
        event_add(task.pk, f"{by} started the task again, {where}.", source="person")
        ring_on_commit(task.pk)
        return Answer(True, f"The task is queued again and continues {where}.")
    status = _status(task)
    if status == Status.SUCCEEDED:
        return Answer(False, "The task has succeeded. Duplicate it to train again with other settings.")
    if status == Status.DRAFT:
        return Answer(False, "This is still a draft. Finish its four steps and create the task.")
    return Answer(False, "The task has not ended, so there is nothing to retry.")


def task_duplicate(task: TrainingTask, *, by: Any) -> TrainingTask:
    """A new draft with the same choices; the task itself is not touched except for a line in its history."""
    draft = draft_from_task(task)
    if task.status != Status.DRAFT:
        event_add(task.pk, f"{by} duplicated the task into a new draft.", source="person")
    return draft


def task_delete(task: TrainingTask, *, by: Any) -> Answer:
    """Remove a draft or an ended task with its run folder. A model that came out of it stays in My Models."""
    with transaction.atomic():
        row = TrainingTask.objects.select_for_update().filter(pk=task.pk).first()
        if row is None:
            return Answer(True, "The task was already deleted.")
        if row.status not in DELETABLE:
            return Answer(False, "The task has not ended. Cancel it first, then delete it.")
        unclaimed = unclaimed_folders(row)
        row.delete()
    # After the row: a crash between leaves a folder that the workers' sweep removes.
    remove_folder(task.folder)
    remove_folders(unclaimed)
    logger.info("Task %s was deleted by %s", task.pk, by)
    return Answer(True, "The task was deleted.")


def remove_folder(folder: Path) -> None:
    """One rename into the trash, then its removal: the folder is there or gone, never half removed."""
    if not folder.exists():
        return
    trash = Path(settings.RUNS_DIR) / TRASH / f"{folder.name}-{uuid.uuid4().hex[:8]}"
    trash.parent.mkdir(exist_ok=True)
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _status(task: TrainingTask) -> str:
    return TrainingTask.objects.filter(pk=task.pk).values_list("status", flat=True).first() or ""


def _too_late(task: TrainingTask, verb: str, same: str, already: str) -> Answer:
    status = _status(task)
    if status == same:
        return Answer(status == Status.CANCELLING and verb == "cancelled", already)
    if status == Status.DRAFT:
        return Answer(False, f"This is still a draft: it is not running and cannot be {verb}.")
    return Answer(
        False, f"The task has already finished ({Status(status).label.lower()}); nothing was changed."
    )
