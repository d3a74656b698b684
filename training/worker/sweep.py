"""What every worker does every few seconds, so that nothing waits for ever for somebody who is gone.

Each step is a conditional update: any number of workers may sweep at once. Knows no Celery but the bell.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import uuid
from datetime import timedelta
from pathlib import Path

from celery import current_app
from django.conf import settings
from django.db import transaction
from django.db.models import F, Q
from django.db.models.functions import Now

from datasets_app.leases import bell_is_due, lease_is_free
from training import states
from training.contract import LOG_FILE
from training.models import Run, TrainingTask, WorkerHost
from training.reference_cache import evict
from training.services.history import event_add
from training.services.queue import RUN_TASK, live_hosts, no_broker, ring, runnable_tasks
from training.services.tasks import TRASH
from training.worker.endings import Ending, Then
from training.worker.engine_process import log_tail
from training.worker.finish import fail
from training.worker.leases import MAX_ATTEMPTS, can_start_one, free_slots
from training.worker.machine import Identity, process_alive
from training.worker.prepare import REFERENCE_CACHE
from training.worker.timing import Times

logger = logging.getLogger(__name__)

Status = TrainingTask.Status
ORPHAN_SECONDS = 3600.0


def sweep(*, who: Identity, limits: Times, serves_gpu: bool) -> None:
    release_expired()
    release_local(who=who, limits=limits)
    ring_waiting(who=who, limits=limits, serves_gpu=serves_gpu)


def release_expired() -> None:
    """Nobody renews the lease any more: the next worker continues, or the cancel is complete."""
    free = lease_is_free()
    for task_id, epoch in TrainingTask.objects.filter(free, status__in=states.LIVE).values_list(
        "pk", "lease_epoch"
    ):
        release(task_id, epoch, reason="The worker was lost: nothing was heard of it.", where=free)


def release_local(*, who: Identity, limits: Times) -> None:
    """Faster for runs of this machine: their supervisor is gone, or the machine was started anew."""
    mine = Run.objects.filter(
        host=who.host, ended=None, epoch=F("task__lease_epoch"), task__status__in=states.LIVE
    )
    for run in mine.filter(boot_id=who.boot_id):
        if not process_alive(run.pid, run.pid_created):
            release(run.task_id, run.epoch, reason="The worker's process was killed.", where=Q())
    # Two machines may bear one name. A run that is being renewed is alive somewhere, whatever its boot id
    # says.
    silent = timedelta(seconds=limits.lease_ttl - 2 * limits.renew_every)
    for run in mine.exclude(boot_id=who.boot_id).filter(task__lease_until__lt=Now() + silent):
        release(
            run.task_id,
            run.epoch,
            reason="The machine was started anew.",
            where=Q(lease_until__lt=Now() + silent),
        )


def release(task_id: uuid.UUID, epoch: int, *, reason: str, where: Q) -> bool:
    """End an attempt in the place of its owner: queued again, cancelled, or failed when tried too often."""
    log = log_tail(Path(settings.RUNS_DIR) / str(task_id) / f"e{epoch}" / LOG_FILE)
    with transaction.atomic():
        rows = TrainingTask.objects.select_for_update().filter(
            where, pk=task_id, lease_epoch=epoch, status__in=states.LIVE
        )
        task = rows.first()
        if task is None:
            return False
        Run.objects.filter(task=task, epoch=epoch, ended=None).update(ended=Now(), reason=reason)
        if task.status == Status.CANCELLING:
            states.transition(task_id, Status.CANCELLED, from_=Status.CANCELLING, epoch=epoch)
            event_add(task_id, "Cancelled. The worker that ran it is gone.", source="worker")
        elif task.attempts >= MAX_ATTEMPTS:
            fail(task, Ending(then=Then.TRY_AGAIN, text=reason), log=log, epoch=epoch)
        else:
            states.transition(task_id, Status.QUEUED, from_=Status.RUNNING, epoch=epoch)
            text = f"{reason} The task goes on, from its last checkpoint if there is one."
            event_add(task_id, text, source="worker", level="warning")
            transaction.on_commit(lambda: ring(task_id))
    logger.warning("Task %s, attempt %s: %s", task_id, epoch, reason)
    return True


def ring_waiting(*, who: Identity, limits: Times, serves_gpu: bool) -> None:
    """Ring for as many tasks as there are free slots. Without a broker a worker can ring only for itself."""
    if no_broker():
        hosts = (
            WorkerHost.objects.filter(host=who.host, queue="gpu") if serves_gpu else WorkerHost.objects.none()
        )
        after = timedelta(seconds=limits.own_ring_after)
    else:
        hosts, after = live_hosts(), timedelta(seconds=limits.ring_after)
    room = sum(free_slots(machine) for machine in hosts)
    if not room:
        return
    for task_id in list(runnable_tasks().values_list("pk", flat=True)[:room]):
        due = TrainingTask.objects.filter(bell_is_due(after), pk=task_id)
        if due.update(rung_at=Now()) == 1:
            _send(task_id)


def _send(task_id: uuid.UUID) -> None:
    try:
        current_app.send_task(RUN_TASK, [str(task_id)], queue="gpu")
    except Exception as error:
        logger.warning("The bell for task %s was not taken: %s", task_id, error)


def work_is_left(who: Identity) -> bool:
    """A task could run here now: for a short while that is normal, for a minute the consumer is stuck."""
    machine = WorkerHost.objects.filter(host=who.host, queue="gpu").first()
    return machine is not None and can_start_one(machine)


def clean_up() -> None:
    """What crashes left on disk: the trash, and run folders whose task was deleted; and a cache that only grows."""
    evict(Path(settings.DATA_DIR) / REFERENCE_CACHE, limit_bytes=settings.REFERENCE_CACHE_BYTES)
    runs = Path(settings.RUNS_DIR)
    if not runs.is_dir():
        return
    shutil.rmtree(runs / TRASH, ignore_errors=True)
    for folder in runs.iterdir():
        with contextlib.suppress(ValueError, OSError):
            task_id = uuid.UUID(folder.name)
            old = time.time() - folder.stat().st_mtime > ORPHAN_SECONDS
            if old and not TrainingTask.objects.filter(pk=task_id).exists():
                shutil.rmtree(folder, ignore_errors=True)
