"""Drafts: the wizard's state is a task row. Saves one step at a time, says what is missing, submits.

A save is a conditional update on `status = draft`: a task that was created in another tab is never changed.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

from django.db import transaction
from django.db.models.functions import Now

from datasets_app.models import Dataset
from datasets_app.splitting import count_split
from training import recipes, states
from training.base_models import linear_modules, shape_of
from training.estimates import Estimate, PairTokens, estimate_run
from training.models import BaseModel, TrainedModel, TrainingTask
from training.services.history import event_add
from training.services.machines import training_machine
from training.services.queue import ring_on_commit

logger = logging.getLogger(__name__)

STEPS = ("model", "data", "settings", "review")
NAME_LIMIT = 120
PAIRS_ADVISED = (100, 100_000)
_DOWNLOADABLE = (BaseModel.Status.READY, BaseModel.Status.QUEUED, BaseModel.Status.DOWNLOADING)
Status = TrainingTask.Status
Evaluation = TrainingTask.Evaluation


class NotADraft(Exception):
    """The task was created meanwhile (another tab, a double click); nothing was changed."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What keeps a draft from becoming a task, and on which step it is mended."""

    step: str
    text: str


# --- making drafts --------------------------------------------------------------------------------------
def draft_create(
    owner: Any, *, dataset: Dataset | None = None, parent_model: TrainedModel | None = None
) -> TrainingTask:
    """An empty draft, or one that starts from a model or dataset the person came from."""
    base = parent_model.base_model if parent_model else None
    return TrainingTask.objects.create(
        owner=owner, dataset=dataset, parent_model=parent_model, base_model=base
    )


def draft_unsaved() -> TrainingTask:
    """Nobody's draft with every default: for pages that show a model before there is a task."""
    return TrainingTask()


def draft_from_task(task: TrainingTask) -> TrainingTask:
    """The same choices in a new draft; names say that it is another one."""
    return TrainingTask.objects.create(
        owner=task.owner,
        name=_copy_name(task.name),
        model_name=_copy_name(task.model_name),
        base_model=task.base_model,
        parent_model=task.parent_model,
        dataset=task.dataset,
        evaluation=task.evaluation,
        validation_share=task.validation_share,
        validation_dataset=task.validation_dataset,
        eval_steps=task.eval_steps,
        parameters=dict(task.parameters),
    )


def _copy_name(name: str) -> str:
    return f"{name[: NAME_LIMIT - 5]} copy" if name else ""


# --- saving a step ----------------------------------------------------------------------------------------
def draft_save_model(
    task: TrainingTask, *, base_model: BaseModel | None, parent_model: TrainedModel | None
) -> None:
    """A layer list that was chosen for another model is dropped: its names may not exist in this one."""
    parameters = dict(task.parameters)
    known = set(linear_modules(base_model.facts)) if base_model else set()
    if known and not set(parameters.get("target_modules", ())) <= known:
        parameters.pop("target_modules", None)
    _save(task, base_model=base_model, parent_model=parent_model, parameters=parameters)


def draft_save_data(
    task: TrainingTask,
    *,
    dataset: Dataset | None,
    evaluation: str,
    validation_share: float,
    validation_dataset: Dataset | None,
    eval_steps: int,
) -> None:
    _save(
        task,
        dataset=dataset,
        evaluation=evaluation,
        validation_share=validation_share,
        validation_dataset=validation_dataset if evaluation == Evaluation.FILE else None,
        eval_steps=eval_steps,
    )


def draft_save_settings(
    task: TrainingTask, *, name: str, model_name: str, parameters: dict[str, Any]
) -> None:
    """Only what differs from the defaults is kept, so that a better default reaches old drafts."""
    changed = {
        key: value
        for key, value in parameters.items()
        if value != recipes.BY_NAME[key].default and not (key == "target_modules" and not value)
    }
    _save(task, name=name, model_name=model_name, parameters=changed)


def _save(task: TrainingTask, **fields: Any) -> None:
    for key, value in fields.items():
        setattr(task, key, value)
    changed = TrainingTask.objects.filter(pk=task.pk, status=Status.DRAFT).update(**fields, updated=Now())
    if changed != 1:
        raise NotADraft


# --- what is missing ---------------------------------------------------------------------------------------
def draft_problems(task: TrainingTask) -> list[Problem]:
    """Everything that stands in the way, in the order of the steps. Empty = ready."""
    return [*_model_problems(task), *_data_problems(task), *_settings_problems(task)]


def _model_problems(task: TrainingTask) -> list[Problem]:
    base = task.base_model
    if base is None:
        return [Problem("model", "Choose a base model.")]
    if base.status not in _DOWNLOADABLE:
        reason = f" {base.problem}" if base.problem else ""
        return [
            Problem("model", f"{base.name} is not on this machine.{reason} Download it, or choose another.")
        ]
    if base.facts.get("has_chat_template") is False:
        return [
            Problem(
                "model",
                f"{base.name} has no chat template, so conversations cannot be written for it. "
                "Choose its instruct variant.",
            )
        ]
    return []


def _data_problems(task: TrainingTask) -> list[Problem]:
    found = []
    if task.dataset is None:
        found.append("Choose a dataset, or upload one.")
    elif not task.dataset.is_ready:
        found.append(_dataset_sentence(task.dataset))
    if task.evaluation == Evaluation.FILE:
        if task.validation_dataset is None:
            found.append("Choose the dataset to validate on, or hold out a share of the training data.")
        elif not task.validation_dataset.is_ready:
            found.append(_dataset_sentence(task.validation_dataset))
        elif task.validation_dataset_id == task.dataset_id:
            found.append("The validation dataset is the training dataset. Choose another, or hold out a share.")
    if not found and task.dataset and task.evaluation == Evaluation.SPLIT:
        train, held_out = pair_counts(task)
        if not held_out:
            found.append(
                "All pairs share one prompt, so none can be held out. Choose no validation, or add prompts."
            )
        elif not train:
            found.append("Nothing is left to train on. Hold out a smaller share.")
    return [Problem("data", text) for text in found]


def _dataset_sentence(dataset: Dataset) -> str:
    if dataset.status in (Dataset.Status.QUEUED, Dataset.Status.VALIDATING):
        return f"“{dataset.name}” is still being validated. This takes a moment."
    return f"“{dataset.name}” cannot be used: {dataset.problem or 'it has no usable pair.'}"


def _settings_problems(task: TrainingTask) -> list[Problem]:
    found = []
    if not task.model_name.strip():
        found.append("Give the model a name.")
    if not task.name.strip():
        found.append("Give the task a name.")
    found += recipes.problems(task.parameters).values()
    known = linear_modules(task.base_model.facts) if task.base_model else ()
    unknown = [name for name in task.parameters.get("target_modules", ()) if known and name not in known]
    if unknown and not found:
        found.append(f"{task.base_model} has no layers named {', '.join(unknown)}. Choose from its list.")
    return [Problem("settings", text) for text in found]


def draft_warnings(task: TrainingTask) -> list[Problem]:
    """What will run but deserves a second look."""
    found = []
    if task.dataset and task.dataset.is_ready:
        low, high = PAIRS_ADVISED
        count = task.dataset.num_pairs
        if not low <= count <= high:
            found.append(
                Problem("data", f"{count:,} pairs: {low:,} to {high:,} are recommended. Quality counts more.")
            )
        if task.dataset.num_errors:
            found.append(
                Problem("data", f"{task.dataset.num_errors:,} lines of the file are left out: they have errors.")
            )
        if task.evaluation == Evaluation.NONE:
            found.append(Problem("data", "Without validation, overfitting cannot be seen while it happens."))
    if not recipes.problems(task.parameters):
        found += [Problem("settings", text) for text in recipes.warnings(task.parameters).values()]
    estimate = draft_estimate(task)
    if estimate and estimate.fit.verdict in ("tight", "too_large"):
        found.append(Problem("settings", estimate.fit.sentence))
    return found


def furthest_step(problems: list[Problem]) -> str:
    """The first step with a problem: later ones cannot be opened yet."""
    with_problem = {problem.step for problem in problems}
    return next((step for step in STEPS if step in with_problem), "review")


# --- numbers --------------------------------------------------------------------------------------------------
def pair_counts(task: TrainingTask) -> tuple[int, int]:
    """(training pairs, validation pairs) of this draft as it stands."""
    dataset = task.dataset
    if dataset is None or not dataset.is_ready:
        return 0, 0
    if task.evaluation == Evaluation.SPLIT:
        seed = recipes.resolve(task.parameters)["seed"]
        return _count_split(str(dataset.pairs_path), dataset.pairs_sha256, task.validation_share, seed)
    other = task.validation_dataset
    held_out = other.num_pairs if task.evaluation == Evaluation.FILE and other and other.is_ready else 0
    return dataset.num_pairs, held_out


@functools.lru_cache(maxsize=256)
def _count_split(path: str, sha256: str, share: float, seed: Any) -> tuple[int, int]:
    """By content: the file behind a hash never changes, and a page asks on every keystroke."""
    try:
        return count_split(Path(path), share, int(seed))
    except (OSError, ValueError, TypeError):
        logger.warning("The pairs of %s cannot be counted", path, exc_info=True)
        return 0, 0


def draft_estimate(task: TrainingTask) -> Estimate | None:
    """Steps, memory and time; None while there is too little to say anything."""
    shape = shape_of(task.base_model.facts) if task.base_model else None
    if shape is None or recipes.problems(task.parameters):
        return None
    train, held_out = pair_counts(task)
    return estimate_run(
        shape=shape,
        parameters=recipes.resolve(task.parameters),
        tokens=_tokens(task.dataset),
        machine=training_machine(),
        num_train_pairs=train,
        num_eval_pairs=held_out,
        eval_steps=task.eval_steps,
    )


def _tokens(dataset: Dataset | None) -> PairTokens:
    known = (dataset.stats or {}).get("tokens_estimate") if dataset and dataset.is_ready else None
    if not known:
        return PairTokens()
    return PairTokens(
        prompt=float(known["prompt"]),
        chosen=float(known["chosen"]),
        rejected=float(known["rejected"]),
        longest=int(known["total_max"]),
    )


# --- create task ------------------------------------------------------------------------------------------------
def task_submit(task: TrainingTask, *, by: Any) -> list[Problem]:
    """Draft -> queued, after checking everything again. Two clicks make one task: the second finds no draft."""
    task.refresh_from_db()
    if task.status != Status.DRAFT:
        return []
    problems = draft_problems(task)
    if problems:
        return problems
    with transaction.atomic():
        if states.transition(task.pk, Status.QUEUED, from_=Status.DRAFT, desired_state="run"):
            event_add(task.pk, f"{by} created the task.", source="person")
            ring_on_commit(task.pk)
    task.refresh_from_db()
    return []
