"""Which status of a task may follow which, and the one way to change it: a conditional update.

A move that is not in the table is a bug in the caller (`ValueError`); a move whose row was not in the stated
status, or whose epoch moved on, changes nothing and answers False.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from django.db.models import Q
from django.db.models.functions import Now

from training.models import TrainingTask

Status = TrainingTask.Status

# queued -> failed: lost too often without progress, or its input is gone. running -> queued: the attempt
# ended early and another continues from the last checkpoint. Every end but success may be tried again.
TRANSITIONS: dict[str, frozenset[str]] = {
    Status.DRAFT: frozenset({Status.QUEUED}),
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELLED, Status.FAILED}),
    Status.RUNNING: frozenset(
        {Status.QUEUED, Status.CANCELLING, Status.SUCCEEDED, Status.STOPPED, Status.FAILED}
    ),
    Status.CANCELLING: frozenset({Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.STOPPED: frozenset({Status.QUEUED}),
    Status.FAILED: frozenset({Status.QUEUED}),
    Status.CANCELLED: frozenset({Status.QUEUED}),
}
TERMINAL: frozenset[str] = frozenset({Status.SUCCEEDED, Status.STOPPED, Status.FAILED, Status.CANCELLED})
LIVE: frozenset[str] = frozenset(
    {Status.RUNNING, Status.CANCELLING}
)  # a worker holds, or held, a lease on it
RETRYABLE: frozenset[str] = frozenset({Status.STOPPED, Status.FAILED, Status.CANCELLED})


def transition(
    task_id: uuid.UUID | str,
    to: str,
    *,
    from_: str | Iterable[str],
    epoch: int | None = None,
    where: Q | None = None,
    **fields: Any,
) -> bool:
    """Move one task to `to` and set `fields`. False: it was not in `from_`, or `epoch` is no longer the
    owner's.
    """
    sources = {from_} if isinstance(from_, str) else set(from_)
    for source in sources:
        if to not in TRANSITIONS[source]:
            raise ValueError(f"A task may not go from {source} to {to}.")
    rows = TrainingTask.objects.filter(pk=task_id, status__in=sources)
    if epoch is not None:
        rows = rows.filter(lease_epoch=epoch)
    if where is not None:
        rows = rows.filter(where)
    return rows.update(**{**_stamps(to, sources), **fields}) == 1


def _stamps(to: str, sources: set[str]) -> dict[str, Any]:
    """What goes with every arrival at a status, unless the caller says otherwise."""
    stamps: dict[str, Any] = {"status": to, "updated": Now()}
    if to == Status.QUEUED:
        stamps |= {"lease_owner": "", "lease_until": None, "phase": "", "phase_done": 0, "phase_total": 0}
        if not sources & LIVE:  # an attempt that ended early keeps its place in the queue
            stamps |= {"queued_at": Now(), "ended_at": None}
    elif to in TERMINAL:
        stamps |= {"lease_owner": "", "lease_until": None, "phase": "", "ended_at": Now()}
    return stamps


class Fenced(Exception):
    """Another owner has the task: stop at once and write nothing."""
