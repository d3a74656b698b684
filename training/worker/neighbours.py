"""The other work that workers find by themselves: validations of datasets and downloads of base models."""

from __future__ import annotations

import logging
from collections.abc import Collection
from datetime import timedelta

from celery import current_app
from django.db.models.functions import Now

from datasets_app.leases import bell_is_due
from datasets_app.tasks import jobs_ring_again
from training.services.base_models import DOWNLOAD_TASK, downloads_ring_again, waiting_downloads
from training.services.queue import no_broker
from training.worker.timing import times

logger = logging.getLogger(__name__)


def sweep_neighbours(*, queues: Collection[str]) -> None:
    """Without a broker a worker can only ring for itself, so only those of the queue `default` ring then."""
    if no_broker() and "default" not in queues:
        return
    for ring_again in (jobs_ring_again, _own_downloads if no_broker() else downloads_ring_again):
        try:
            ring_again()
        except Exception:
            logger.exception("%s failed", ring_again.__name__)


def _own_downloads() -> int:
    rung = 0
    after = timedelta(seconds=times().own_ring_after)
    for row in waiting_downloads().filter(bell_is_due(after))[:20]:
        row.__class__.objects.filter(pk=row.pk).update(rung_at=Now())
        current_app.send_task(DOWNLOAD_TASK, [str(row.pk)], queue="default")
        rung += 1
    return rung
