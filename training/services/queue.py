"""The queue as a person sees it: who is before whom, why a task waits; and the bell that wakes a worker.

A broker message carries a task's id and is only a hint: a worker takes the oldest task that may run. A lost
message is rung again by the workers' sweep, so a failing broker never fails a request.
"""

from __future__ import annotations

import logging
import uuid
from datetime import timedelta

from celery import current_app
from django.conf import settings
from django.db import transaction
from django.db.models import Q, QuerySet
from django.db.models.functions import Now

from training.models import BaseModel, TrainingTask, WorkerHost

logger = logging.getLogger(__name__)

RUN_TASK = "training.run"
HOST_FRESH = timedelta(seconds=20)  # a worker says every 5 s that it is there
START_WORKER = "python manage.py worker --queue gpu"
_DOWNLOADING = (BaseModel.Status.QUEUED, BaseModel.Status.DOWNLOADING)


def waiting_tasks() -> QuerySet[TrainingTask]:
    """Queued tasks in the order in which they run."""
    return TrainingTask.objects.filter(
        status=TrainingTask.Status.QUEUED,
        desired_state__in=[TrainingTask.Desired.RUN, TrainingTask.Desired.STOP],
    ).order_by("queued_at", "created", "id")


def runnable_tasks() -> QuerySet[TrainingTask]:
    """Those of the queue that do not wait for a download."""
    return waiting_tasks().exclude(base_model__status__in=_DOWNLOADING)


def live_hosts(queue: str = "gpu") -> QuerySet[WorkerHost]:
    return WorkerHost.objects.filter(queue=queue, last_seen__gte=Now() - HOST_FRESH)


def most_gpus() -> int:
    """Of the machines that have a worker now, the GPUs of the one with most; 1 without any."""
    return max([1, *(len(machine.gpus) for machine in live_hosts())])


def no_broker() -> bool:
    """Without a broker only the workers' own sweep finds work; a message sent would reach nobody."""
    return str(settings.CELERY_BROKER_URL).startswith("memory")


def ring(task_id: uuid.UUID | str) -> None:
    """Tell the workers now. Never raises."""
    if no_broker():
        return
    try:
        TrainingTask.objects.filter(pk=task_id).update(rung_at=Now())
        current_app.send_task(RUN_TASK, [str(task_id)], queue="gpu")
    except Exception as error:
        logger.warning("The broker did not take the message for task %s: %s", task_id, error)


def ring_on_commit(task_id: uuid.UUID | str) -> None:
    transaction.on_commit(lambda: ring(task_id))


def queue_position(task: TrainingTask) -> int:
    """1 = next to start; 0 = not in the queue."""
    if task.status != TrainingTask.Status.QUEUED:
        return 0
    before = Q(queued_at__lt=task.queued_at) | Q(queued_at=task.queued_at, created__lt=task.created)
    return waiting_tasks().exclude(pk=task.pk).filter(before).count() + 1


def waiting_reason(task: TrainingTask) -> str:
    """Why a queued task has not started, in a sentence; "" when it does not wait."""
    if task.status != TrainingTask.Status.QUEUED:
        return ""
    if not live_hosts().exists():
        return f"No GPU worker is running. Start one with “{START_WORKER}”; the task then starts by itself."
    base = task.base_model
    if base is not None and base.status in _DOWNLOADING:
        done = f" ({base.bytes_done * 100 // base.bytes_total} %)" if base.bytes_total else ""
        return f"It waits until {base.name} has been downloaded{done}."
    most = most_gpus()
    if task.num_devices > most:
        return (
            f"It asks for {task.num_devices} GPUs, and the largest machine with a worker has {most}. Start a worker on "
            "a larger one, or duplicate the task with fewer."
        )
    before = queue_position(task) - 1
    if before:
        return f"{before} task{'s' if before > 1 else ''} before it."
    running = (
        TrainingTask.objects.filter(status__in=["running", "cancelling"]).exclude(lease_until=None).count()
    )
    if running >= sum(live_hosts().values_list("slots", flat=True)):
        return "It is next: it starts when a running task ends."
    if running and task.num_devices > 1:
        return f"It is next: it starts when {task.num_devices} GPUs of one machine are free at once."
    return "It is next: a worker is about to take it."
