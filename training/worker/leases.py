"""Taking a task: one transaction picks the oldest task that may run, a free GPU slot, and writes the attempt.

`datasets_app.leases` has the conditional update itself. A claim is lost, never waited for.
"""

from __future__ import annotations

import dataclasses
import logging
import uuid

from django.db import transaction
from django.db.models import F, Q
from django.db.models.functions import Coalesce, Now

from datasets_app import leases
from training import states
from training.models import Run, TrainingTask, WorkerHost
from training.services.queue import runnable_tasks
from training.worker.machine import Identity
from training.worker.timing import Times

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # claims without a newer checkpoint
Status = TrainingTask.Status


@dataclasses.dataclass(frozen=True)
class Lease:
    task_id: uuid.UUID
    epoch: int
    owner: str


def live_runs(host: str) -> list[str]:
    """The devices that attempts on this machine hold now."""
    return list(
        Run.objects.filter(
            host=host,
            ended=None,
            epoch=F("task__lease_epoch"),
            task__status__in=states.LIVE,
            task__lease_until__gte=Now(),
        ).values_list("device", flat=True)
    )


def free_slots(machine: WorkerHost) -> int:
    return max(0, machine.slots - len(live_runs(machine.host)))


def claim_next(*, who: Identity, times: Times) -> Lease | None:
    """The oldest task that may run, on a free slot of this machine. None: nothing to do, or no room."""
    with transaction.atomic():
        # Locked, so that two claims on one machine cannot choose the same GPU.
        machine = WorkerHost.objects.select_for_update().filter(host=who.host, queue="gpu").first()
        device = _free_device(machine, live_runs(who.host))
        if device is None:
            return None
        for task_id in list(runnable_tasks().values_list("pk", flat=True)[:5]):
            epoch = _claim(task_id, who=who, times=times)
            if epoch is not None:
                _open_run(task_id, epoch, who=who, device=device)
                return Lease(task_id, epoch, who.owner)
    return None


def _free_device(machine: WorkerHost | None, used: list[str]) -> str | None:
    if len(used) >= (machine.slots if machine else 1):
        return None
    devices = [str(gpu["uuid"]) for gpu in machine.gpus] if machine else []
    return min(devices or ["cpu"], key=used.count)


def _claim(task_id: uuid.UUID, *, who: Identity, times: Times) -> int | None:
    return leases.claim(
        TrainingTask.objects.filter(
            status=Status.QUEUED, desired_state__in=[TrainingTask.Desired.RUN, TrainingTask.Desired.STOP]
        ),
        task_id,
        owner=who.owner,
        ttl=times.ttl,
        status=Status.RUNNING,
        started_at=Coalesce("started_at", Now()),
        updated=Now(),
        phase="starting",
        phase_done=0,
        phase_total=0,
        phase_unit="",
        error="",
        next_step="",
        log_tail="",
    )


def _open_run(task_id: uuid.UUID, epoch: int, *, who: Identity, device: str) -> None:
    close_runs(task_id, before=epoch, reason="Another attempt took over.")
    Run.objects.create(
        task_id=task_id,
        epoch=epoch,
        host=who.host,
        boot_id=who.boot_id,
        pid=who.pid,
        pid_created=who.pid_created,
        device=device,
        started=Now(),
    )


def close_runs(task_id: uuid.UUID, *, before: int, reason: str) -> None:
    Run.objects.filter(task_id=task_id, epoch__lt=before, ended=None).update(ended=Now(), reason=reason)


def owned(lease: Lease) -> Q:
    """The condition of every write of an owner."""
    return Q(pk=lease.task_id, lease_epoch=lease.epoch, lease_owner=lease.owner, status__in=states.LIVE)


def hold(lease: Lease) -> TrainingTask:
    """The task's row, locked to the end of the transaction: what every write of an owner begins with."""
    task = TrainingTask.objects.select_for_update().filter(owned(lease)).first()
    if task is None:
        raise states.Fenced(f"Task {lease.task_id}: attempt {lease.epoch} is no longer its owner.")
    return task


def renew(lease: Lease, times: Times) -> bool:
    return leases.renew(TrainingTask.objects.filter(owned(lease)), lease.task_id, lease.epoch, ttl=times.ttl)
