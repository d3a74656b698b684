"""Celery tasks of the datasets: envelopes. `jobs_ring_again` is what a worker's sweep calls."""

from __future__ import annotations

import uuid

from celery import shared_task

from datasets_app.jobs import validate_dataset
from datasets_app.services import VALIDATE_TASK, jobs_ring_again

__all__ = ["jobs_ring_again", "validate"]


@shared_task(name=VALIDATE_TASK)
def validate(dataset_id: str) -> None:
    """Whoever wins the lease validates; a late or doubled message does nothing."""
    validate_dataset(uuid.UUID(dataset_id))
