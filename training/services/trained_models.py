"""What a person can do with a model of My Models: rename it, delete it, see what depends on it.

An adapter is complete by itself: a model trained from another keeps working when that one is deleted.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction

from training import states
from training.models import TrainedModel, TrainingTask
from training.services.history import event_add
from training.services.model_card import model_card
from training.services.tasks import Answer

__all__ = [
    "Dependants",
    "lineage",
    "model_card",
    "trained_model_delete",
    "trained_model_dependants",
    "trained_model_rename",
]

logger = logging.getLogger(__name__)

Status = TrainingTask.Status
NEEDS_THE_FILES = states.LIVE | {Status.QUEUED}
TRASH = ".trash"  # below MODELS_DIR
MAX_GENERATIONS = 50


@dataclasses.dataclass(frozen=True)
class Dependants:
    """What refers to a model. Only `waiting` forbids deleting it."""

    children: list[TrainedModel]
    drafts: list[TrainingTask]
    waiting: list[TrainingTask]  # queued or running: they still need its files
    ended: list[TrainingTask]

    @property
    def any(self) -> bool:
        return bool(self.children or self.drafts or self.waiting or self.ended)


def lineage(model: TrainedModel) -> list[tuple[int, TrainedModel]]:
    """(depth, model) from the oldest ancestor down through this model to everything trained from it."""
    ancestors: list[TrainedModel] = []
    parent = model.parent
    while parent is not None and len(ancestors) < MAX_GENERATIONS:
        ancestors.insert(0, parent)
        parent = parent.parent
    return [*enumerate(ancestors), *_descendants(model, len(ancestors))]


def _descendants(model: TrainedModel, depth: int) -> Iterator[tuple[int, TrainedModel]]:
    yield depth, model
    if depth < MAX_GENERATIONS:
        for child in model.children.order_by("created"):
            yield from _descendants(child, depth + 1)


def trained_model_rename(model: TrainedModel, *, name: str) -> None:
    TrainedModel.objects.filter(pk=model.pk).update(name=name)
    model.name = name


def trained_model_dependants(model: TrainedModel) -> Dependants:
    tasks = list(model.child_tasks.order_by("created"))
    return Dependants(
        children=list(model.children.order_by("created")),
        drafts=[task for task in tasks if task.status == Status.DRAFT],
        waiting=[task for task in tasks if task.status in NEEDS_THE_FILES],
        ended=[task for task in tasks if task.is_terminal],
    )


def trained_model_delete(model: TrainedModel, *, by: Any) -> Answer:
    """Remove the row, then the files. Refused while a task that starts from it is queued or running.

    Tasks that started from it lose their base model too: a draft, or a task that is tried again, must not go
    on silently from the bare base with another reference.
    """
    with transaction.atomic():
        row = TrainedModel.objects.select_for_update().filter(pk=model.pk).first()
        if row is None:
            return Answer(True, "The model was already deleted.")
        tasks = TrainingTask.objects.filter(parent_model=row)
        waiting = tasks.filter(status__in=NEEDS_THE_FILES).first()
        if waiting is not None:
            return Answer(
                False,
                f"“{waiting}” starts from this model and is {waiting.get_status_display().lower()}. "
                "Cancel that task or let it end, then delete the model.",
            )
        for task_id in tasks.values_list("id", flat=True):
            text = f"{by} deleted “{row.name}”, the model this task started from."
            event_add(task_id, text, source="person")
        tasks.update(parent_model=None, base_model=None)
        row.children.update(parent_name=row.name)
        row.delete()
    _remove_folder(model.folder)
    logger.info("Model %s was deleted by %s", model.pk, by)
    return Answer(True, f"“{model.name}” was deleted.")


def _remove_folder(folder: Path) -> None:
    """One rename into the trash, then its removal, and that of anything an earlier crash left there."""
    trash = Path(settings.MODELS_DIR) / TRASH
    try:
        trash.mkdir(exist_ok=True)
        if folder.exists():
            folder.rename(trash / f"{folder.name}-{uuid.uuid4().hex[:8]}")
    except OSError:
        logger.exception("The files of a deleted model could not be moved to %s", trash)
    shutil.rmtree(trash, ignore_errors=True)
