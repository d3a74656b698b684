"""Rows of base models: the catalogue, folders on the server, Hub ids; asks for downloads, never waits for
one.

The download itself is `training.worker.downloads`. Every refusal is a `ModelProblem` with a next step.
"""

from __future__ import annotations

import logging
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from celery import current_app
from django.conf import settings
from django.db import transaction
from django.db.models import QuerySet
from django.db.models.functions import Now

from datasets_app.leases import bell_is_due, lease_is_free
from training.base_models import (
    CATALOGUE,
    STARTER_FOLDER,
    CatalogueModel,
    catalogue_model,
    hub_id_problem,
)
from training.model_folder import FolderProblem, read_folder
from training.models import BaseModel
from training.services.queue import no_broker

logger = logging.getLogger(__name__)

DOWNLOAD_TASK = "models.download"
BELL = timedelta(seconds=15)
MAX_DOWNLOADS_EACH = 3  # a person's own Hub models that may wait or load at once

Source = BaseModel.Source
Status = BaseModel.Status


class ModelProblem(ValueError):
    """This model cannot be used. The message is a sentence with what to do."""


# --- the catalogue ------------------------------------------------------------------------------------
def catalogue_ensure() -> int:
    """One row per catalogue model, statuses as the disk has it; how many models are ready. Safe to repeat."""
    _follow_moved_data()
    ready = 0
    for model in CATALOGUE:
        row, _created = BaseModel.objects.get_or_create(
            owner=None,
            name=model.hub_id,
            source=Source.STARTER if model.is_starter else Source.CATALOGUE,
            defaults={"kind": model.kind, "facts": model.facts()},
        )
        _refresh(row, model)
        ready += row.status == Status.READY
    return ready


def _follow_moved_data() -> None:
    """A data folder may be moved, or restored elsewhere: what was downloaded lies below it under its row's id."""
    for row in BaseModel.objects.filter(source__in=[Source.CATALOGUE, Source.HUB]):
        folder = download_folder(row.pk)
        if row.path != str(folder) and (folder / "config.json").is_file():
            BaseModel.objects.filter(pk=row.pk).update(path=str(folder))


def _refresh(row: BaseModel, model: CatalogueModel) -> None:
    """Bring kind, facts and status up to date; a row that waits for or is in a download is left alone."""
    if row.status in (Status.QUEUED, Status.DOWNLOADING):
        return
    path = str(starter_folder()) if model.is_starter else row.path
    fields: dict[str, Any] = {"kind": model.kind, "path": path}
    try:
        read = read_folder(Path(path), roots=own_roots()) if path and Path(path).is_dir() else {}
    except FolderProblem as problem:
        fields |= {"status": Status.FAILED, "problem": f"The files on disk cannot be used: {problem}"}
        fields["facts"] = model.facts()
    else:
        fields["facts"] = {**model.facts(), **_known(read)}
        if read:
            fields |= {"status": Status.READY, "problem": ""}
        elif row.status == Status.READY:
            fields |= {"status": Status.ABSENT, "bytes_done": 0, "bytes_total": 0}
    for name, value in fields.items():
        setattr(row, name, value)
    # Conditional: a download that a person asks for at this moment is not overwritten.
    BaseModel.objects.filter(pk=row.pk).exclude(status__in=[Status.QUEUED, Status.DOWNLOADING]).update(
        **fields
    )


def _known(read: dict[str, Any]) -> dict[str, Any]:
    """What a folder says of itself, without the blanks that the catalogue knows better."""
    return {key: value for key, value in read.items() if value or isinstance(value, bool)}


def download_folder(pk: uuid.UUID) -> Path:
    return Path(settings.BASE_MODELS_DIR) / str(pk)


def starter_folder() -> Path:
    return Path(settings.BASE_MODELS_DIR) / STARTER_FOLDER


def own_roots() -> list[Path]:
    return [Path(settings.BASE_MODELS_DIR)]


# --- a folder on the server -----------------------------------------------------------------------------
def base_model_from_folder(owner: Any, *, root: int, relative: str) -> BaseModel:
    """A row for a folder below one of the allowed roots (by its number); raises `ModelProblem`."""
    roots = [Path(path) for path in settings.MODEL_ROOTS]
    if not roots:
        raise ModelProblem(
            "No folders are allowed on this server yet. Its administrator names them in STUDIO_MODEL_ROOTS."
        )
    if not 0 <= root < len(roots):
        raise ModelProblem("Choose one of the listed folders.")
    relative = relative.strip().strip("/")
    if "\x00" in relative or len(relative) > 500 or ".." in Path(relative).parts:
        raise ModelProblem("Name a folder below the chosen one, for example my-model or team/my-model.")
    folder = roots[root] / relative
    try:
        facts = read_folder(folder, roots=roots)
    except FolderProblem as problem:
        raise ModelProblem(str(problem)) from None
    except OSError as error:
        raise ModelProblem(f"The folder cannot be read ({error.strerror}). Check its rights.") from None
    row, _created = BaseModel.objects.update_or_create(
        owner=owner,
        source=Source.FOLDER,
        path=str(folder.resolve()),
        defaults={
            "name": (folder.name or str(folder))[:200],
            "facts": facts,
            "status": Status.READY,
            "problem": "",
        },
    )
    return row


# --- a Hub id --------------------------------------------------------------------------------------------
def base_model_from_hub(owner: Any, *, hub_id: str) -> BaseModel:
    """The row of this Hub id, asked to be downloaded; a catalogue model's own row when it is one."""
    hub_id = hub_id.strip()
    if sentence := hub_id_problem(hub_id):
        raise ModelProblem(sentence)
    known = catalogue_model(hub_id)
    if known is not None:
        row = BaseModel.objects.filter(owner=None, name=known.hub_id).first()
        if row is not None:
            return row if row.status == Status.READY else base_model_download(row)
    _refuse_offline(hub_id)
    busy = BaseModel.objects.filter(owner=owner, status__in=[Status.QUEUED, Status.DOWNLOADING])
    if busy.exclude(name=hub_id).count() >= MAX_DOWNLOADS_EACH:
        raise ModelProblem(f"{MAX_DOWNLOADS_EACH} of your downloads are under way. Wait until one has ended.")
    row, _created = BaseModel.objects.get_or_create(owner=owner, source=Source.HUB, name=hub_id)
    return row if row.status == Status.READY else base_model_download(row)


def base_model_download(row: BaseModel) -> BaseModel:
    """Ask for the download, again after a failure. One that waits or runs is left as it is."""
    if row.source == Source.STARTER:
        raise ModelProblem(
            "The starter model is installed when the studio starts. Restart it, and see its first lines."
        )
    if row.source == Source.FOLDER:
        raise ModelProblem("A folder on the server is not downloaded. Add the folder again if it was moved.")
    _refuse_offline(row.name)
    with transaction.atomic():
        asked = BaseModel.objects.filter(pk=row.pk, status__in=[Status.ABSENT, Status.FAILED]).update(
            status=Status.QUEUED, problem="", bytes_done=0, bytes_total=0, attempts=0, rung_at=None
        )
        if asked:
            transaction.on_commit(lambda: _ring(row.pk))
    row.refresh_from_db()
    return row


def _refuse_offline(hub_id: str) -> None:
    if settings.HUB_OFFLINE:
        raise ModelProblem(offline_sentence(hub_id))


def offline_sentence(hub_id: str) -> str:
    """What a person can do when this machine has no way to the Hub."""
    roots = ", ".join(str(root) for root in settings.MODEL_ROOTS)
    where = f"under {roots}" if roots else "into a folder that STUDIO_MODEL_ROOTS names"
    return (
        f"This machine cannot reach the Hub, so {hub_id} cannot be downloaded. Put the model's folder "
        f"{where} "
        "and choose it as “a folder on the server”."
    )


# --- the bell ---------------------------------------------------------------------------------------------
def waiting_downloads() -> QuerySet[BaseModel]:
    """Downloads nobody works on: asked for, or left behind by a worker that is gone."""
    return BaseModel.objects.filter(status__in=[Status.QUEUED, Status.DOWNLOADING]).filter(lease_is_free())


def downloads_ring_again() -> int:
    """Tell the workers of downloads that wait unheard; called by their sweep."""
    due = waiting_downloads().filter(bell_is_due(BELL)).values_list("pk", flat=True)[:20]
    return sum(_ring(pk) for pk in due)


def _ring(pk: uuid.UUID) -> bool:
    """Never raises: a message that is lost is rung again."""
    if no_broker():
        return False
    try:
        BaseModel.objects.filter(pk=pk).update(rung_at=Now())
        current_app.send_task(DOWNLOAD_TASK, [str(pk)], queue="default")
    except Exception as error:
        logger.warning("The broker did not take the message for the download %s: %s", pk, error)
        return False
    return True
