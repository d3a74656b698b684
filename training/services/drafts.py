"""Drafts: the wizard's state is a task row. Saves one step at a time, and submits the whole.

A save is a conditional update on `status = draft`: a task that was created in another tab is never changed.
"""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models.functions import Now

from datasets_app.models import Dataset
from training import recipes, states
from training.base_models import linear_modules
from training.models import BaseModel, TrainedModel, TrainingTask
from training.services.draft_checks import NAME_LIMIT, Problem, draft_problems, lora_of_parent
from training.services.history import event_add
from training.services.queue import ring_on_commit

Status = TrainingTask.Status
Evaluation = TrainingTask.Evaluation


class NotADraft(Exception):
    """The task was created meanwhile (another tab, a double click); nothing was changed."""


# --- making drafts --------------------------------------------------------------------------------------
def draft_create(
    owner: Any, *, dataset: Dataset | None = None, parent_model: TrainedModel | None = None
) -> TrainingTask:
    """An empty draft, or one that starts from a model or dataset the person came from."""
    base = parent_model.base_model if parent_model else None
    return TrainingTask.objects.create(
        owner=owner,
        dataset=dataset,
        parent_model=parent_model,
        base_model=base,
        parameters=_changed(lora_of_parent(parent_model)),
    )


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
        num_devices=task.num_devices,
    )


def _copy_name(name: str) -> str:
    return f"{name[: NAME_LIMIT - 5]} copy" if name else ""


# --- saving a step ----------------------------------------------------------------------------------------
def draft_save_model(
    task: TrainingTask, *, base_model: BaseModel | None, parent_model: TrainedModel | None
) -> None:
    """What was decided by another model goes with it: the adapter's own settings, a list of its layers."""
    parameters = dict(task.parameters)
    for name, value in lora_of_parent(task.parent_model).items():
        if parameters.get(name) == value:
            del parameters[name]
    known = set(linear_modules(base_model.facts)) if base_model else set()
    chosen = parameters.get("target_modules")
    if known and isinstance(chosen, list) and not set(chosen) <= known:
        del parameters["target_modules"]
    parameters |= _changed(lora_of_parent(parent_model))
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
    task: TrainingTask, *, name: str, model_name: str, parameters: dict[str, Any], num_devices: int = 1
) -> None:
    _save(
        task,
        name=name,
        model_name=model_name,
        num_devices=num_devices,
        parameters=_changed(parameters | lora_of_parent(task.parent_model)),
    )


def _changed(parameters: dict[str, Any]) -> dict[str, Any]:
    """Only what differs from the defaults is kept, so that a better default reaches old drafts."""
    return {
        name: list(value) if name == "target_modules" else value
        for name, value in parameters.items()
        if (value if name != "target_modules" else tuple(value)) != recipes.BY_NAME[name].default
    }


def _save(task: TrainingTask, **fields: Any) -> None:
    for key, value in fields.items():
        setattr(task, key, value)
    changed = TrainingTask.objects.filter(pk=task.pk, status=Status.DRAFT).update(**fields, updated=Now())
    if changed != 1:
        raise NotADraft


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
