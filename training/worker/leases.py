"""Taking a task: one transaction picks the oldest task that may run, free GPUs for it, and writes the attempt.

`datasets_app.leases` has the conditional update itself. A claim is lost, never waited for.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import uuid

from django.db import transaction
from django.db.models import F, Q, QuerySet
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


def live_runs(host: str) -> list[list[str]]:
    """The devices that each attempt on this machine holds now."""
    runs = Run.objects.filter(
        host=host,
        ended=None,
        epoch=F("task__lease_epoch"),
        task__status__in=states.LIVE,
        task__lease_until__gte=Now(),
    )
    return [run.devices for run in runs.only("device")]


def devices_of(machine: WorkerHost | None) -> list[str]:
    """A machine without GPUs has one device, however many runs share it."""
    return [str(gpu["uuid"]) for gpu in machine.gpus] if machine and machine.gpus else ["cpu"]


def free_devices(machine: WorkerHost | None, live: list[list[str]]) -> list[str]:
    """Devices that may take one more run, the least used first; none when all slots are taken.

    A slot is a run. With more slots than GPUs a GPU takes several, and all of them equally many.
    """
    slots = machine.slots if machine else 1
    if len(live) >= slots:
        return []
    devices = devices_of(machine)
    used = [device for run in live for device in run]
    most = max(1, math.ceil(slots / len(devices)))
    return sorted((d for d in devices if used.count(d) < most), key=used.count)


def free_slots(machine: WorkerHost) -> int:
    """How many runs of one device each could start now."""
    live = live_runs(machine.host)
    used = [device for run in live for device in run]
    devices = devices_of(machine)
    most = max(1, math.ceil(machine.slots / len(devices)))
    room = sum(max(0, most - used.count(device)) for device in devices)
    return max(0, min(machine.slots - len(live), room))


def servable_tasks(machine: WorkerHost | None) -> QuerySet[TrainingTask]:
    """Of the tasks that may run, those that this machine has enough GPUs for, the oldest first."""
    return runnable_tasks().filter(num_devices__lte=len(devices_of(machine)))


def can_start_one(machine: WorkerHost) -> bool:
    """Whether the next task of this machine could start now."""
    wanted = servable_tasks(machine).values_list("num_devices", flat=True).first()
    return wanted is not None and wanted <= len(free_devices(machine, live_runs(machine.host)))


def claim_next(*, who: Identity, times: Times) -> Lease | None:
    """The oldest task that may run, on free devices of this machine. None: nothing to do, or no room.

    A task that needs more devices than are free keeps the queue waiting: were they given to the tasks behind
    it, they would never be free at once.
    """
    with transaction.atomic():
        # Locked, so that two claims on one machine cannot choose the same GPU.
        machine = WorkerHost.objects.select_for_update().filter(host=who.host, queue="gpu").first()
        free = free_devices(machine, live_runs(who.host))
        for task_id, wanted in list(servable_tasks(machine).values_list("pk", "num_devices")[:5]):
            if wanted > len(free):
                return None
            epoch = _claim(task_id, who=who, times=times)
            if epoch is not None:
                _open_run(task_id, epoch, who=who, device=",".join(free[:wanted]))
                return Lease(task_id, epoch, who.owner)
    return None


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
