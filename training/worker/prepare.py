"""Writes the run directory of an attempt: data, configuration, and the checkpoint that it continues from.

The data of a task is split once and kept beside its attempts, so that an attempt continues with the very
pairs of the one before, whatever has become of the dataset.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from django.conf import settings

from datasets_app.models import Dataset
from datasets_app.splitting import split_by_prompt
from training import estimates, recipes
from training.contract import (
    CONFIG_FILE,
    STOP_FILE,
    ExitCode,
    RunConfig,
    verify_checkpoint,
    write_atomically,
)
from training.models import Checkpoint, Run, TrainingTask
from training.run_checks import ConfigError

logger = logging.getLogger(__name__)

DATA_DIR = "data"  # below the task's folder
REFERENCE_CACHE = "reference_cache"  # below the studio's data folder: runs on the same pairs share it
TRAIN_FILE, EVAL_FILE, COUNTS_FILE = "train.jsonl", "eval.jsonl", "counts.json"


class NotRunnable(Exception):
    """This task cannot run as it is; `next_step` says what the person can do."""

    def __init__(self, sentence: str, next_step: str) -> None:
        super().__init__(sentence)
        self.next_step = next_step


@dataclasses.dataclass(frozen=True)
class Prepared:
    run_dir: Path
    config: RunConfig
    resumed_from: int  # step; 0 = from the start
    notes: list[str]  # sentences for the history

    @property
    def config_json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.config.to_json())
        return parsed

    @property
    def base_name(self) -> str:
        return self.config.base_model_name


def prepare(task: TrainingTask, run: Run) -> Prepared:
    """Make `run.folder` ready for the engine. Raises `NotRunnable`."""
    notes: list[str] = []
    num_train, num_eval = _data(task)
    checkpoint = newest_good_checkpoint(task, notes)
    values = _parameters(task, notes)
    total_steps = estimates.steps(num_train, values)[1]
    every, _ = estimates.evaluation_interval(total_steps, task.eval_steps, has_validation=num_eval > 0)
    data = task.folder / DATA_DIR
    try:
        config = RunConfig(
            run_id=f"{task.pk}/e{run.epoch}",
            model_path=_model_path(task),
            base_model_name=task.base_model.name if task.base_model else "",
            adapter_path=str(task.parent_model.folder) if task.parent_model else "",
            train_path=str(data / TRAIN_FILE),
            eval_path=str(data / EVAL_FILE) if num_eval else "",
            reference_cache_dir=str(Path(settings.DATA_DIR) / REFERENCE_CACHE),
            reference_cache_bytes=settings.REFERENCE_CACHE_BYTES,
            resume_from=str(checkpoint.folder) if checkpoint else "",
            eval_steps=every,
            device="auto" if run.device == "cpu" else "cuda",
            num_devices=len(run.devices),
            **values,
        )
    except (ConfigError, TypeError) as error:
        raise NotRunnable(str(error), "Duplicate the task and correct this setting.") from None
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run.folder / CONFIG_FILE, config.to_json())
    if task.desired_state == TrainingTask.Desired.STOP:
        (run.folder / STOP_FILE).touch()
    return Prepared(run.folder, config, checkpoint.step if checkpoint else 0, notes)


def newest_good_checkpoint(task: TrainingTask, notes: list[str]) -> Checkpoint | None:
    """The newest whose every byte verifies. A broken one is put aside and said; one the engine rotated is
    not.
    """
    for row in task.checkpoints.order_by("-step", "-epoch"):
        try:
            verify_checkpoint(row.folder)
            return row
        except ValueError as error:
            if row.folder.exists():
                logger.warning("Task %s: %s", task.pk, error)
                notes.append(f"The checkpoint of step {row.step} is damaged and was put aside: {error}")
                _quarantine(row.folder)
            row.delete()
    return None


def _quarantine(folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.bad")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.rename(aside)
    except OSError as error:
        logger.warning("%s could not be put aside: %s", folder, error)


def memory_retries(task: TrainingTask) -> int:
    """Attempts since the person queued the task that ran out of device memory."""
    runs = task.runs.filter(exit_code=ExitCode.OUT_OF_MEMORY)
    return runs.filter(started__gte=task.queued_at).count() if task.queued_at else runs.count()


def smaller_batch(batch: int, accumulation: int) -> tuple[int, int]:
    """Half as many pairs at once (or the nearest part below), the same effective batch."""
    for part in range(batch // 2, 0, -1):
        if batch % part == 0:
            return part, accumulation * (batch // part)
    return batch, accumulation


def _parameters(task: TrainingTask, notes: list[str]) -> dict[str, Any]:
    problems = recipes.problems(task.parameters)
    if problems:
        name, sentence = next(iter(problems.items()))
        raise NotRunnable(f"{name}: {sentence}", "Duplicate the task and correct this setting.")
    values = recipes.resolve(task.parameters)
    if task.parent_model is not None:
        values, overridden = recipes.continuing(task.parameters, task.parent_model.parameters)
        if overridden:
            notes.append(
                f"The adapter of “{task.parent_model.name}” is trained on as it is: {', '.join(overridden)}."
            )
    for _ in range(memory_retries(task)):
        before = values["per_device_train_batch_size"]
        batch, accumulation = smaller_batch(before, values["gradient_accumulation_steps"])
        values |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        notes.append(
            f"The device ran out of memory: batch_size {before} → {batch}, gradient_accumulation_steps → "
            f"{accumulation}. The effective batch stays {batch * accumulation}."
        )
    return values


def _model_path(task: TrainingTask) -> str:
    base = task.base_model
    if base is None:
        raise NotRunnable(
            "The base model of this task was removed.", "Duplicate the task and choose a base model again."
        )
    if not base.is_ready or not Path(base.path).is_dir():
        raise NotRunnable(
            f"The files of {base.name} are not on this machine.",
            "Download the model again, or choose another one in a duplicate of this task, then Retry.",
        )
    parent = task.parent_model
    if parent is not None and not parent.folder.is_dir():
        raise NotRunnable(
            f"The files of “{parent.name}”, which this task starts from, are gone.",
            "Duplicate the task and choose another model to start from.",
        )
    return base.path


# --- data -----------------------------------------------------------------------------------------


def _data(task: TrainingTask) -> tuple[int, int]:
    """Pairs on each side. Written once; the counts come last and say that the rest is complete."""
    folder = task.folder / DATA_DIR
    try:
        counts = json.loads((folder / COUNTS_FILE).read_text(encoding="utf-8"))
        return int(counts["train"]), int(counts["eval"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    pairs = _pairs(task.dataset, "The dataset")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    num_train, num_eval = _write_data(task, pairs, folder)
    if not num_train:
        raise NotRunnable(
            "No pair is left to train on.",
            "Choose a smaller validation share or another dataset in a duplicate.",
        )
    write_atomically(folder / COUNTS_FILE, json.dumps({"train": num_train, "eval": num_eval}))
    return num_train, num_eval


def _write_data(task: TrainingTask, pairs: Path, folder: Path) -> tuple[int, int]:
    if task.evaluation == TrainingTask.Evaluation.SPLIT:
        summary = split_by_prompt(
            pairs,
            share=task.validation_share,
            seed=int(recipes.resolve(task.parameters)["seed"]),
            train_path=folder / TRAIN_FILE,
            eval_path=folder / EVAL_FILE,
        )
        return summary.num_train, summary.num_eval
    _link(pairs, folder / TRAIN_FILE)
    if task.evaluation == TrainingTask.Evaluation.FILE:
        own = _pairs(task.validation_dataset, "The validation dataset")
        _link(own, folder / EVAL_FILE)
        return _count(pairs), _count(own)
    return _count(pairs), 0


def _pairs(dataset: Dataset | None, what: str) -> Path:
    if dataset is None:
        raise NotRunnable(
            f"{what} of this task was removed.", "Duplicate the task and choose a dataset again."
        )
    if not dataset.is_ready or not dataset.pairs_path.is_file():
        raise NotRunnable(
            f"{what} “{dataset.name}” cannot be used: {dataset.get_status_display().lower()}.",
            "Open the dataset to see what is wrong with it, then Retry.",
        )
    return dataset.pairs_path


def _link(source: Path, target: Path) -> None:
    """The same bytes under a second name, so that deleting the dataset takes nothing from the run."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
