"""From a finished run directory to a row of My Models: the files first, then row and end state at once.

A model is visible when its row is; the row is written in the transaction that ends the task, after the
whole adapter has arrived under its final name by one rename. A crash between the two leaves a folder nobody
sees: its name follows from the task and the attempt, so the next owner finds it and only writes the rows.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models.functions import Now

from training import states
from training.contract import ADAPTER_DIR, RESULT_FILE, Result, file_sha256
from training.models import Run, TrainedModel, TrainingTask
from training.services.history import event_add

logger = logging.getLogger(__name__)

Status = TrainingTask.Status
WEIGHTS_FILE = "adapter_model.safetensors"
NEEDED_FILES = (WEIGHTS_FILE, "adapter_config.json")
KEPT = "Its model was kept."  # Run.reason of an attempt whose result has become rows


class UnusableAdapter(Exception):
    """The engine said that it finished, but what it left cannot be a model. The message is a sentence."""


def trained_model_create(task: TrainingTask, *, epoch: int, run_dir: Path, result: Result) -> TrainedModel:
    """End the task as its result says and enter the model. The directory may be older than the lease's
    `epoch`.

    Raises `UnusableAdapter`, or `states.Fenced` when the task is no longer running under this epoch.
    """
    model_id = _model_id(task.pk, run_dir)
    folder = _folder_of(model_id)
    if not folder.exists():
        _check(run_dir / ADAPTER_DIR, result)
        _move(run_dir / ADAPTER_DIR, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    to = Status.SUCCEEDED if result["status"] == "succeeded" else Status.STOPPED
    with transaction.atomic():
        ended = states.transition(
            task.pk, to, from_=Status.RUNNING, epoch=epoch, step=result.get("step", task.step), attempts=0
        )
        if not ended:
            raise states.Fenced(f"Task {task.pk}: attempt {epoch} may not end it.")
        # A stopped task that was continued: the earlier model stays in My Models, without this task.
        TrainedModel.objects.filter(task=task).exclude(pk=model_id).update(task=None)
        task.plan = TrainingTask.objects.values_list("plan", flat=True).get(pk=task.pk)
        model, _ = TrainedModel.objects.update_or_create(pk=model_id, defaults=_fields(task, result, size))
        runs = Run.objects.filter(task=task)
        runs.filter(epoch=_attempt(run_dir)).update(reason=KEPT, exit_code=0, ended=Now())
        runs.filter(ended=None).update(reason="It entered the result of an earlier attempt.", ended=Now())
        how = "succeeded" if to == Status.SUCCEEDED else "stopped early and kept its model"
        event_add(task.pk, f"The task {how}: “{model.name}” is in My Models.", source="worker")
    return model


def unentered_result(task: TrainingTask) -> tuple[Path, Result] | None:
    """A finished earlier attempt whose worker died before it could enter the result, if there is one."""
    for run in task.runs.exclude(reason=KEPT).order_by("-epoch"):
        result = read_result(run.folder)
        if result is None or result.get("status") not in ("succeeded", "stopped"):
            continue
        if result["status"] == "stopped" and task.queued_at and run.started < task.queued_at:
            continue  # the person has since asked to go on
        if _folder_of(_model_id(task.pk, run.folder)).exists() or _is_usable(
            run.folder / ADAPTER_DIR, result
        ):
            return run.folder, result
    return None


def outputs_forget(task: TrainingTask) -> None:
    """Remove adapters of this task that were moved but never became a model (it was cancelled just then)."""
    remove_folders(unclaimed_folders(task))


def unclaimed_folders(task: TrainingTask) -> list[Path]:
    """Where an adapter of this task may lie in the models' folder without a row that shows it."""
    ids = {_model_id(task.pk, run.folder) for run in task.runs.exclude(reason=KEPT)}
    ids -= set(TrainedModel.objects.filter(pk__in=ids).values_list("pk", flat=True))
    return [_folder_of(model_id) for model_id in ids]


def remove_folders(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def read_result(run_dir: Path) -> Result | None:
    """`result.json`, or None when it is not there or is not an object."""
    try:
        result = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None  # type: ignore[return-value]


def _attempt(run_dir: Path) -> int:
    return int(run_dir.name.removeprefix("e"))


def _model_id(task_id: uuid.UUID, run_dir: Path) -> uuid.UUID:
    return uuid.uuid5(task_id, run_dir.name)


def _folder_of(model_id: uuid.UUID) -> Path:
    return Path(settings.MODELS_DIR) / str(model_id)


def _is_usable(adapter: Path, result: Result) -> bool:
    """A result that says "succeeded" over a torn adapter must not end every later attempt too."""
    try:
        _check(adapter, result)
    except UnusableAdapter as problem:
        logger.warning("%s is passed over: %s", adapter, problem)
        return False
    return True


def _check(adapter: Path, result: Result) -> None:
    for name in NEEDED_FILES:
        file = adapter / name
        if not file.is_file() or not file.stat().st_size:
            raise UnusableAdapter(f"The run ended, but it left no usable {name}.")
    expected = result.get("adapter_sha256")
    if expected and file_sha256(adapter / WEIGHTS_FILE) != expected:
        raise UnusableAdapter(f"The run ended, but {WEIGHTS_FILE} has other bytes than the run wrote.")


def _move(adapter: Path, folder: Path) -> None:
    """One rename; across file systems a copy under another name first: half a folder is never there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        adapter.rename(folder)
    except OSError:
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(adapter, part)
        part.rename(folder)


def _fields(task: TrainingTask, result: Result, size: int) -> dict[str, Any]:
    base, dataset, parent = task.base_model, task.dataset, task.parent_model
    return {
        "owner_id": task.owner_id,
        "task": task,
        "name": task.model_name or task.name or f"Model {str(task.pk)[:8]}",
        "base_model": base,
        "base_model_name": base.name if base else str(task.plan.get("base_model_name", "")),
        "parent": parent,
        "parent_name": parent.name if parent else "",
        "dataset_name": dataset.name if dataset else str(task.plan.get("dataset_name", "")),
        "dataset_sha256": dataset.sha256 if dataset else str(task.plan.get("dataset_sha256", "")),
        "parameters": result.get("config") or task.plan.get("config", {}),
        "result": {key: value for key, value in result.items() if key != "config"},
        "size_bytes": size,
    }
