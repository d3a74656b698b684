"""What the pages of the wizard show: the stepper, the summary card, the choices of each step. Changes nothing."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from django.conf import settings
from django.urls import reverse

from datasets_app.forms import UploadForm
from datasets_app.models import Dataset
from datasets_app.preview import read_pairs
from studio.wizard.forms import FolderForm, HubForm, ModelStepForm, SettingsStepForm
from training import recipes
from training.base_models import KINDS, shape_of
from training.estimates import Fit, PairTokens, estimate_run, show_bytes, show_count, show_seconds
from training.models import BaseModel, TrainedModel, TrainingTask
from training.services import drafts
from training.services.machines import training_machine

STEP_NAMES = {
    "model": "Choose Base Model",
    "data": "Dataset & Evaluation",
    "settings": "Settings & Options",
    "review": "Create Task",
}
PREVIEW_PAIRS = 3


@dataclasses.dataclass(frozen=True)
class StepLink:
    """One entry of the stepper. `state`: done, problem, open, or closed (an earlier step is not valid yet)."""

    key: str
    name: str
    url: str
    state: str
    current: bool


def stepper(task: TrainingTask, current: str) -> list[StepLink]:
    problems = drafts.draft_problems(task)
    furthest = drafts.STEPS.index(drafts.furthest_step(problems))
    links = []
    for number, step in enumerate(drafts.STEPS):
        state = "closed" if number > furthest else "open"
        if number < furthest:
            state = "done"
        if number > 0 and step in {problem.step for problem in problems} and _was_visited(task, step):
            state = "problem" if number <= furthest else "closed"
        url = reverse("setup:step", args=[task.pk, step])
        links.append(StepLink(step, STEP_NAMES[step], url, state, step == current))
    return links


def _was_visited(task: TrainingTask, step: str) -> bool:
    """A step nobody has filled in yet has no mistakes, it is only open."""
    if step == "data":
        return task.dataset_id is not None
    return bool(task.name or task.model_name or task.parameters)


def summary(task: TrainingTask, *, errors: list[str] | None = None) -> dict[str, Any]:
    """The card beside the form: ready or what is missing, the numbers, what differs from the defaults."""
    problems = drafts.draft_problems(task)
    train, held_out = drafts.pair_counts(task)
    estimate = drafts.draft_estimate(task)
    sound = not recipes.problems(task.parameters)
    return {
        "problems": problems,
        "errors": errors or [],
        "ready": not problems and not errors,
        "num_train": train,
        "num_eval": held_out,
        "estimate": estimate,
        "memory": show_bytes(estimate.memory.total) if estimate else "",
        "time": show_seconds(estimate.seconds) if estimate and train else "",
        "differences": recipes.differences(task.parameters) if sound else [],
        "warnings": drafts.draft_warnings(task),
        "beta_band": recipes.beta_band(recipes.resolve(task.parameters)["beta"]) if sound else None,
    }


def as_if(task: TrainingTask, values: dict[str, Any]) -> TrainingTask:
    """A copy of the draft with these values, for looking at; never saved."""
    shown = copy.copy(task)
    for name, value in values.items():
        setattr(shown, name, value)
    return shown


# --- step 1 ---------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class ModelCard:
    """A model as a card: the row, its numbers in words, and whether its training fits this machine."""

    row: BaseModel
    value: str
    parameters: str
    context: str
    fit: Fit | None
    percent: int

    @property
    def is_loading(self) -> bool:
        return self.row.status in (BaseModel.Status.QUEUED, BaseModel.Status.DOWNLOADING)


def model_step(task: TrainingTask, form: ModelStepForm | None = None, *, ticked: str = "") -> dict[str, Any]:
    """`ticked`: what the page that asks again for its cards has selected but not saved."""
    rows = [card(row, task) for row in BaseModel.objects.for_user(task.owner)]
    own = [entry for entry in rows if entry.row.owner_id]
    shared = [entry for entry in rows if not entry.row.owner_id]
    groups = [
        (kind, name, guidance, [entry for entry in shared if entry.row.kind == kind])
        for kind, (name, guidance) in KINDS.items()
    ]
    roots = [str(root) for root in settings.MODEL_ROOTS]
    return {
        "form": form,
        "chosen": (form.data.get("model", "") if form and form.is_bound else ticked) or ModelStepForm.chosen(task),
        "groups": groups,
        "own_models": own,
        "trained_models": [(model, f"parent:{model.pk}") for model in TrainedModel.objects.for_user(task.owner)],
        "loading": any(entry.is_loading for entry in rows),
        "folder_form": FolderForm(roots=roots) if roots else None,
        "hub_form": HubForm(),
        "hub_offline": settings.HUB_OFFLINE,
        "machine": training_machine(),
        "machine_memory": show_bytes(training_machine().memory_bytes),
    }


def card(row: BaseModel, task: TrainingTask) -> ModelCard:
    facts = row.facts or {}
    context = facts.get("context_length")
    return ModelCard(
        row=row,
        value=f"base:{row.pk}",
        parameters=show_count(facts["num_parameters"]) if facts.get("num_parameters") else "",
        context=f"{context // 1024}k" if isinstance(context, int) and context >= 1024 else str(context or ""),
        fit=_fit(facts, task),
        percent=round(100 * row.bytes_done / row.bytes_total) if row.bytes_total else 0,
    )


def _fit(facts: dict[str, Any], task: TrainingTask) -> Fit | None:
    """At the settings of this draft; a layer list belongs to another model and counts as all layers."""
    shape = shape_of(facts)
    if shape is None or recipes.problems(task.parameters):
        return None
    parameters = recipes.resolve(task.parameters) | {"target_modules": ()}
    return estimate_run(
        shape=shape, parameters=parameters, tokens=PairTokens(), machine=training_machine(), num_train_pairs=1
    ).fit


# --- step 2 ---------------------------------------------------------------------------------------------
def data_step(task: TrainingTask, form: Any, *, back: str) -> dict[str, Any]:
    shown = _shown_dataset(task, form)
    return {
        "form": form,
        "datasets": Dataset.objects.for_user(task.owner),
        "chosen_id": str(shown.pk) if shown else "",
        "dataset": shown,
        "pairs": read_pairs(shown, count=PREVIEW_PAIRS) if shown and shown.is_ready else [],
        "upload_form": UploadForm(),
        "back": back,
        "kinds": TrainingTask.Evaluation,
        "evaluation": form["evaluation"].value(),
    }


def _shown_dataset(task: TrainingTask, form: Any) -> Dataset | None:
    value = form["dataset"].value()
    if not value:
        return None
    try:
        return Dataset.objects.for_user(task.owner).filter(pk=str(value)).first()
    except ValueError:
        return None
    except Exception as error:  # a value that is no uuid raises Django's ValidationError
        if type(error).__name__ == "ValidationError":
            return None
        raise


# --- step 3 ---------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """A field with the recipe it comes from."""

    parameter: recipes.Parameter
    field: Any
    default: str
    changed: bool
    warning: str
    range: str
    suggestions: list[str]


def settings_step(task: TrainingTask, form: SettingsStepForm) -> dict[str, Any]:
    sound = not recipes.problems(task.parameters)
    warnings = recipes.warnings(task.parameters) if sound else {}
    rows = [_row(parameter, form, warnings) for parameter in recipes.PARAMETERS]
    return {
        "form": form,
        "basic": [row for row in rows if row.parameter.group == "basic"],
        "advanced": [row for row in rows if row.parameter.group == "advanced"],
        "advanced_open": any(row.changed or row.field.errors for row in rows if row.parameter.group == "advanced"),
        "modules": form.modules,
    }


def _row(parameter: recipes.Parameter, form: SettingsStepForm, warnings: dict[str, str]) -> ParameterRow:
    field = form[parameter.name]
    default = "" if parameter.kind == "modules" else recipes.number(parameter.default)
    value = field.value()
    changed = bool(value) if parameter.kind == "modules" else str(value) != default
    return ParameterRow(
        parameter=parameter,
        field=field,
        default=default,
        changed=changed,
        warning=warnings.get(parameter.name, ""),
        range=parameter.usual,
        suggestions=[recipes.number(value) for value in parameter.suggestions],
    )


# --- step 4 ---------------------------------------------------------------------------------------------
def review_step(task: TrainingTask) -> dict[str, Any]:
    values = recipes.resolve(task.parameters)
    changed = {difference.parameter.name for difference in recipes.differences(task.parameters)}
    return {
        "values": [
            (parameter, recipes.show(parameter, values[parameter.name]), parameter.name in changed)
            for parameter in recipes.PARAMETERS
        ]
    }
