"""Downloads of base models on the worker: lease, child process, byte progress, checks, one rename at the end.

The child is `training.worker.hub_fetch`. An interrupted download keeps its partial folder and goes on from
it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from celery import shared_task
from django.conf import settings
from django.db import transaction

from datasets_app import leases
from training.model_folder import FolderProblem, read_folder
from training.models import BaseModel
from training.services.base_models import download_folder, offline_sentence, own_roots
from training.worker.engine_process import PASSED_ON

logger = logging.getLogger(__name__)

TTL = timedelta(seconds=30)
TICK_SECONDS = 1.0
SILENT_LIMIT_SECONDS = 300.0  # no new byte for so long: the connection hangs
MAX_ATTEMPTS = 3
AT_ONCE = 1  # fewer than a worker of the queue has places, so that there is always one for an upload
DISK_RESERVE = 1024**3  # left for the database and the checkpoints of other runs
HUB_ENV = (
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
)
Status = BaseModel.Status


class Stopped(Exception):
    """The download ended without a model; the message is the sentence for the person."""


@shared_task(name="models.download")
def models_download(row_id: str) -> None:
    """Envelope: whoever wins the lease downloads; a late or doubled message does nothing."""
    download(uuid.UUID(row_id))


def download(row_id: uuid.UUID) -> bool:
    """True when this call ended with a model on disk."""
    epoch = _claim(row_id)
    if epoch is None:
        return False
    row = BaseModel.objects.get(pk=row_id)
    if row.attempts > MAX_ATTEMPTS:
        return _fail(
            row, epoch, "The download broke off several times. Look at the worker's log, then retry."
        )
    try:
        facts, path, revision = _run(row, epoch)
    except Stopped as stopped:
        return _fail(row, epoch, str(stopped))
    except Fenced:
        return False
    done = leases.release(
        BaseModel.objects.all(), row.pk, epoch, status=Status.READY, path=str(path), revision=revision,
        facts={**row.facts, **facts}, problem="", attempts=0,
    )  # fmt: skip
    logger.info("Base model %s is on disk", row.name)
    return done


@transaction.atomic
def _claim(row_id: uuid.UUID) -> int | None:
    """None: somebody has it, or as many as may are under way already; the sweep rings again for those that wait."""
    under_way = BaseModel.objects.filter(status=Status.DOWNLOADING).exclude(leases.lease_is_free())
    if under_way.count() >= AT_ONCE:
        return None
    waiting = BaseModel.objects.filter(status__in=[Status.QUEUED, Status.DOWNLOADING])
    return leases.claim(waiting, row_id, owner=f"download:{os.getpid()}", ttl=TTL, status=Status.DOWNLOADING)


class Fenced(Exception):
    """Another worker has the download, or the row is gone: stop at once and write nothing."""


def _fail(row: BaseModel, epoch: int, sentence: str) -> bool:
    logger.warning("Download of %s: %s", row.name, sentence)
    leases.release(BaseModel.objects.all(), row.pk, epoch, status=Status.FAILED, problem=sentence)
    return False


def _run(row: BaseModel, epoch: int) -> tuple[dict[str, Any], Path, str]:
    if settings.HUB_OFFLINE:
        raise Stopped(offline_sentence(row.name))
    folder = download_folder(row.pk)
    partial = folder.with_name(f"{row.pk}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        revision = _fetch(row, epoch, partial)
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        facts = read_folder(partial, roots=own_roots())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except FolderProblem as problem:
        shutil.rmtree(partial, ignore_errors=True)
        raise Stopped(f"{row.name} cannot be used: {problem}") from None
    except OSError as error:
        logger.exception("Download of %s", row.name)
        said = f"The files could not be written ({error.strerror}). Check the disk, then retry."
        raise Stopped(said) from None
    return {key: value for key, value in facts.items() if value or isinstance(value, bool)}, folder, revision


def _fetch(row: BaseModel, epoch: int, partial: Path) -> str:
    """Run the child to its end while renewing the lease; the commit that was fetched."""
    revision = ""
    with subprocess.Popen(
        [sys.executable, "-m", "training.worker.hub_fetch", row.name, row.revision, str(partial)],
        stdin=subprocess.PIPE,  # held open, never written: its end tells the child that this is gone
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=settings.BASE_DIR,
        env=_environment(),
        start_new_session=True,
    ) as child:
        try:
            for line in _lines(child, row, epoch, partial):
                if line.get("type") == "plan":
                    revision = str(line["sha"])[:64]
                    _check_disk(row, int(line["bytes"]), partial)
                    _progress(row, epoch, partial, bytes_total=int(line["bytes"]))
                elif line.get("type") == "failed":
                    raise Stopped(_sentence(row.name, str(line.get("kind")), str(line.get("text"))))
                elif line.get("type") == "done":
                    return revision
        finally:
            child.kill()
    raise Stopped("The download ended without saying why. Retry; it goes on from where it was.")


def _lines(
    child: subprocess.Popen[bytes], row: BaseModel, epoch: int, partial: Path
) -> Iterator[dict[str, Any]]:
    """What the child says, with a tick of progress every second in between."""
    said: queue.Queue[bytes | None] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None  # noqa: S101
        for line in child.stdout:
            said.put(line)
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    seen, since = -1, time.monotonic()
    while True:
        try:
            line = said.get(timeout=TICK_SECONDS)
        except queue.Empty:
            size = _progress(row, epoch, partial)
            if size != seen:
                seen, since = size, time.monotonic()
            elif time.monotonic() - since > SILENT_LIMIT_SECONDS:
                raise Stopped("Nothing arrived for five minutes. Check the connection, then retry.") from None
            continue
        if line is None:
            return
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _progress(row: BaseModel, epoch: int, partial: Path, **fields: Any) -> int:
    """Renew the lease and say how many bytes lie on disk."""
    size = 0
    for folder, _dirs, names in os.walk(partial):
        for name in names:
            try:
                size += os.stat(os.path.join(folder, name)).st_size  # noqa: PTH116, PTH118 - many files, every second
            except FileNotFoundError:
                continue
    if not leases.renew(BaseModel.objects.all(), row.pk, epoch, ttl=TTL, bytes_done=size, **fields):
        raise Fenced
    return size


def _check_disk(row: BaseModel, size: int, partial: Path) -> None:
    have = shutil.disk_usage(partial).free + sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    if have < size + DISK_RESERVE:
        gib = 1024**3
        raise Stopped(
            f"{row.name} needs {size / gib:.1f} GB, and {max(0, have - DISK_RESERVE) / gib:.1f} GB of the "
            f"disk can "
            "be used. Free some space, then retry."
        )


def _environment() -> dict[str, str]:
    """Explicit: what a Python child needs, and what names the way to the Hub. The token never is an
    argument."""
    env = {name: os.environ[name] for name in (*PASSED_ON, *HUB_ENV) if name in os.environ}
    return env | {
        "HF_HOME": str(Path(settings.DATA_DIR) / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Its chunks lie in a cache of their own, so the bytes could not be counted.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "20",
        "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        "PYTHONUNBUFFERED": "1",
    }


def _sentence(name: str, kind: str, text: str) -> str:
    if kind == "offline":
        return offline_sentence(name)
    if kind == "refused":
        return f"{name} cannot be used: {text}"
    if kind == "gated":
        return (
            f"{name} is shared only with people who accepted its licence on the Hub. Accept it there, set "
            f"HF_TOKEN "
            "for the worker, then retry; or put the model's folder on the server."
        )
    if kind == "missing":
        return f"There is no model named {name} on the Hub, or it is private. Check the spelling."
    if kind == "disk":
        return "The disk is full. Free some space, then retry; the download goes on from where it was."
    logger.error("Download of %s failed (%s): %s", name, kind, text)
    if kind.startswith("answer"):
        return f"The Hub gave an unexpected {kind} for {name}. Retry in a while."
    return f"The download of {name} failed. Retry; the worker's log says more."
