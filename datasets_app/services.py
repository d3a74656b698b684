"""Datasets: made from an upload, renamed, deleted, validated again. The only place that changes their rows.

Files are moved outside transactions. A lost broker message is rung again by the workers' sweep.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from celery import current_app
from django.conf import settings
from django.core.files.base import File
from django.db import transaction
from django.db.models import QuerySet
from django.db.models.functions import Now

from datasets_app.leases import bell_is_due, lease_is_free
from datasets_app.models import Dataset
from datasets_app.uploads import StoredUpload

logger = logging.getLogger(__name__)

VALIDATE_TASK = "datasets.validate"
RING_AFTER = timedelta(seconds=15)
STALE_UPLOAD_SECONDS = 24 * 3600
EXAMPLE_PATH = Path(__file__).resolve().parent / "example" / "short_and_direct.jsonl"
EXAMPLE_NAME = "Example: short and direct answers"
BUSY = (Dataset.Status.QUEUED, Dataset.Status.VALIDATING)
TASK_NEEDS_ITS_DATA = ("queued", "running", "cancelling")  # statuses of a task that still reads the pairs


class AlreadyUploaded(Exception):
    """The same bytes are here already; nothing was kept. `dataset` is the earlier one."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(f"This file was uploaded before, as “{dataset.name}”.")
        self.dataset = dataset


class DatasetInUse(Exception):
    """It cannot be deleted now; the message says why and what to do."""


# --- the queue --------------------------------------------------------------------------------------
def waiting_validations() -> QuerySet[Dataset]:
    """Datasets nobody works on: new ones, or left behind by a worker that is gone."""
    return Dataset.objects.filter(status__in=BUSY).filter(lease_is_free()).order_by("created")


def jobs_ring_again() -> int:
    """The datasets' part of a worker's sweep: ring for validations that wait unheard, clear up old uploads.

    Without a broker it is this call, made inside the worker, that starts them: the bell is the worker's own.
    """
    _remove_stale_uploads()
    due = waiting_validations().filter(bell_is_due(RING_AFTER)).values_list("pk", flat=True)[:20]
    return sum(_ring(pk) for pk in due)


def _ring_on_commit(pk: uuid.UUID) -> None:
    """Without a broker a message sent from here would reach nobody, and must not count as rung."""
    if not str(settings.CELERY_BROKER_URL).startswith("memory"):
        transaction.on_commit(lambda: _ring(pk))


def _ring(pk: uuid.UUID) -> bool:
    """Never raises: a failing broker must not fail a request."""
    try:
        Dataset.objects.filter(pk=pk).update(rung_at=Now())
        current_app.send_task(VALIDATE_TASK, [str(pk)], queue="default")
    except Exception as error:
        logger.warning("The broker did not take the message for dataset %s: %s", pk, error)
        return False
    return True


def _remove_stale_uploads() -> None:
    """Parts of uploads whose process was killed."""
    oldest = time.time() - STALE_UPLOAD_SECONDS
    for path in Path(settings.FILE_UPLOAD_TEMP_DIR).glob("*.part"):
        try:
            if path.stat().st_mtime < oldest:
                path.unlink()
        except FileNotFoundError:
            continue


# --- what a person does -----------------------------------------------------------------------------
def dataset_create(owner: Any, *, upload: File[bytes], name: str = "") -> Dataset:
    """Keep the uploaded file and queue its validation. Raises `AlreadyUploaded` for the same content."""
    original_name = display_name(upload.name or "")
    return _create(owner, upload=upload, original_name=original_name, name=name or Path(original_name).stem)


def example_dataset_ensure(owner: Any) -> Dataset:
    """The example that comes with the studio, once per person, validated like any upload."""
    earlier = Dataset.objects.filter(owner=owner, is_example=True).first()
    if earlier is not None:
        return earlier
    with EXAMPLE_PATH.open("rb") as file:
        try:
            return _create(
                owner, upload=File(file), original_name=EXAMPLE_PATH.name, name=EXAMPLE_NAME, is_example=True
            )
        except AlreadyUploaded as error:
            return error.dataset


def _create(
    owner: Any, *, upload: File[bytes], original_name: str, name: str, is_example: bool = False
) -> Dataset:
    dataset = Dataset(
        owner=owner, original_name=original_name, name=_printable(name)[:200], is_example=is_example
    )
    dataset.folder.mkdir(parents=True)
    try:
        dataset.sha256, dataset.size_bytes = _keep(upload, dataset.original_path)
        with transaction.atomic():
            earlier = Dataset.objects.filter(owner=owner, sha256=dataset.sha256).first()
            if earlier is not None:
                raise AlreadyUploaded(earlier)
            dataset.save(force_insert=True)
            _ring_on_commit(dataset.pk)
    except BaseException:
        shutil.rmtree(dataset.folder, ignore_errors=True)
        raise
    return dataset


def _keep(upload: File[bytes], target: Path) -> tuple[str, int]:
    """Hash and size of the file, now at `target`."""
    if isinstance(upload, StoredUpload):
        upload.take(target)
        return upload.sha256, upload.size or 0
    digest, size = sha256(), 0
    with target.open("xb") as out:
        for chunk in upload.chunks():
            digest.update(chunk)
            size += out.write(chunk)
    return digest.hexdigest(), size


def display_name(name: str) -> str:
    """A file's name as text to show: no folders, no control or direction marks, no longer than the column."""
    return _printable(name.replace("\\", "/").rsplit("/", 1)[-1])[:255]


def _printable(text: str) -> str:
    return "".join(char for char in text if char.isprintable()).strip() or "dataset"


def dataset_rename(dataset: Dataset, *, name: str) -> None:
    Dataset.objects.filter(pk=dataset.pk).update(name=name)
    dataset.name = name


def dataset_validate_again(dataset: Dataset) -> bool:
    """Queue a validation that failed for a reason outside the file. False: it is not in that state."""
    with transaction.atomic():
        changed = Dataset.objects.filter(pk=dataset.pk, status=Dataset.Status.FAILED).update(
            status=Dataset.Status.QUEUED, problem="", attempts=0, rung_at=None, lines_done=0, bytes_done=0
        )
        _ring_on_commit(dataset.pk)
    return changed == 1


def tasks_mentioning(dataset: Dataset) -> list[Any]:
    """All tasks that name this dataset, for training or validation. (Tasks are known by relation only.)"""
    tasks = {
        task.pk: task
        for relation in ("tasks", "validates_tasks")
        for task in getattr(dataset, relation).all()
    }
    return list(tasks.values())


def tasks_using(dataset: Dataset) -> list[Any]:
    """Those that still read its pairs."""
    return [task for task in tasks_mentioning(dataset) if task.status in TASK_NEEDS_ITS_DATA]


def dataset_delete(dataset: Dataset) -> None:
    """Remove the row, then the files. Raises `DatasetInUse` while a task needs the pairs."""
    with transaction.atomic():
        using = tasks_using(dataset)
        if using:
            names = ", ".join(f"“{task}”" for task in using[:3]) + (" and others" if len(using) > 3 else "")
            raise DatasetInUse(
                f"“{dataset.name}” is being used by {names}. Wait until that is done, or cancel it, "
                "then delete the dataset."
            )
        folder = dataset.folder
        dataset.delete()
    shutil.rmtree(folder, ignore_errors=True)
