"""The validation of one dataset on a worker: under a lease, with progress, ending in one guarded update.

Safe to run twice and to be killed: what it writes has a name of its own until it is complete.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
import uuid
from datetime import timedelta
from pathlib import Path

from datasets_app import leases
from datasets_app.models import Dataset
from datasets_app.uploads import disk_has_room
from datasets_app.validation import Report, Validation

logger = logging.getLogger(__name__)

TTL = timedelta(seconds=30)
REPORT_SECONDS = 0.5  # progress for the page, and the lease with it
MAX_ATTEMPTS = 3
Status = Dataset.Status


class Fenced(Exception):
    """Another worker has the dataset, or it was deleted: leave everything as it is."""


def validate_dataset(dataset_id: uuid.UUID) -> bool:
    """True when this call brought the dataset to an end state; a late or doubled message does nothing."""
    waiting = Dataset.objects.filter(status__in=[Status.QUEUED, Status.VALIDATING])
    owner = f"{socket.gethostname()}:{os.getpid()}"
    epoch = leases.claim(
        waiting, dataset_id, owner=owner, ttl=TTL, status=Status.VALIDATING, lines_done=0, bytes_done=0
    )
    if epoch is None:
        return False
    dataset = Dataset.objects.filter(pk=dataset_id).first()
    if dataset is None:
        return False
    if dataset.attempts > MAX_ATTEMPTS:
        return _fail(dataset, epoch, f"The validation was cut off {MAX_ATTEMPTS} times. {_LOG}")
    try:
        return _work(dataset, epoch)
    except Fenced:
        logger.info("Dataset %s has another owner, or is gone; attempt %s stops.", dataset_id, epoch)
        return False
    except OSError as error:
        logger.exception("Dataset %s could not be validated", dataset_id)
        return _fail(dataset, epoch, _sentence(error))
    except Exception:
        logger.exception("Dataset %s could not be validated", dataset_id)
        return _fail(dataset, epoch, f"The validation stopped with an error of the studio itself. {_LOG}")


_LOG = "The log of the worker says more; then press “Validate again”."


def _sentence(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full. Make room, then press “Validate again”."
    if isinstance(error, FileNotFoundError):
        return "The uploaded file is no longer there. Delete this dataset and upload the file again."
    return f"The file could not be read ({error.strerror or type(error).__name__}). {_LOG}"


def _work(dataset: Dataset, epoch: int) -> bool:
    pairs = dataset.folder / f".pairs.{epoch}.tmp"
    issues = dataset.folder / f".issues.{epoch}.tmp"
    try:
        report = _validate(dataset, epoch, pairs, issues)
        if not leases.renew(Dataset.objects.all(), dataset.pk, epoch, ttl=TTL):
            raise Fenced
        try:
            pairs.replace(dataset.pairs_path)
            issues.replace(dataset.issues_path)
        except FileNotFoundError:
            raise Fenced from None  # deleted this very moment
        _remove_leftovers(dataset.folder)
        return _finish(dataset, epoch, report)
    finally:
        pairs.unlink(missing_ok=True)
        issues.unlink(missing_ok=True)


def _validate(dataset: Dataset, epoch: int, pairs: Path, issues: Path) -> Report:
    last = time.monotonic()

    def progress(lines: int, read: int) -> None:
        nonlocal last
        if time.monotonic() - last < REPORT_SECONDS:
            return
        last = time.monotonic()
        if not disk_has_room(0):  # pairs may be many times larger than the packed file they come from
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rows = Dataset.objects.all()
        if not leases.renew(rows, dataset.pk, epoch, ttl=TTL, lines_done=lines, bytes_done=read):
            raise Fenced

    with dataset.original_path.open("rb") as source, pairs.open("wb") as good, issues.open("wb") as bad:
        report = Validation(source, pairs=good, issues=bad, progress=progress).run()
        for file in (good, bad):
            file.flush()
            os.fsync(file.fileno())
    return report


def _finish(dataset: Dataset, epoch: int, report: Report) -> bool:
    done = leases.release(
        Dataset.objects.all(),
        dataset.pk,
        epoch,
        status=Status.READY if report.num_pairs else Status.INVALID,
        problem=report.problem,
        attempts=0,
        lines_done=report.num_lines,
        bytes_done=dataset.size_bytes,
        format=report.format,
        num_lines=report.num_lines,
        num_pairs=report.num_pairs,
        num_errors=report.num_errors,
        num_warnings=report.num_warnings,
        pairs_sha256=report.pairs_sha256,
        stats=report.stats,
    )
    if not done:
        raise Fenced
    return True


def _fail(dataset: Dataset, epoch: int, problem: str) -> bool:
    return leases.release(Dataset.objects.all(), dataset.pk, epoch, status=Status.FAILED, problem=problem)


def _remove_leftovers(folder: Path) -> None:
    """Half-written files of attempts that were killed."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
