"""What the pages of the wizard show: the stepper, the summary card, the choices of each step. Changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import uuid
from collections.abc import Iterable
from typing import Any

from django.conf import settings
from django.urls import reverse

from datasets_app.forms import UploadForm
from datasets_app.models import Dataset
from datasets_app.preview import read_pairs
from datasets_app.services import BUSY
from studio.wizard.forms import FolderForm, HubForm, ModelStepForm, SettingsStepForm, written_number
from training import recipes
from training.base_models import KINDS
from training.estimates import Fit, Machine, show_bytes, show_count, show_seconds
from training.models import BaseModel, TrainedModel, TrainingTask
from training.services import draft_checks as checks
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
    problems = checks.draft_problems(task)
    with_problem = {problem.step for problem in problems}
    furthest = checks.STEPS.index(checks.furthest_step(problems))
    links = []
    for number, step in enumerate(checks.STEPS):
        if number > furthest:
            state = "closed"
        elif step in with_problem and _was_visited(task, step):
            state = "problem"
        else:
            state = "done" if number < furthest else "open"
        url = reverse("setup:step", args=[task.pk, step])
        links.append(StepLink(step, STEP_NAMES[step], url, state, step == current))
    return links


def _was_visited(task: TrainingTask, step: str) -> bool:
    """A step nobody has filled in yet has no mistakes, it is only open."""
    if step == "model":
        return task.base_model_id is not None or task.parent_model_id is not None
    if step == "data":
        return task.dataset_id is not None
    return bool(task.name or task.model_name)


def too_early(task: TrainingTask, step: str) -> checks.Problem | None:
    """The first problem of an earlier step, which is to be mended before this one opens."""
    earlier = checks.STEPS[: checks.STEPS.index(step)]
    return next((problem for problem in checks.draft_problems(task) if problem.step in earlier), None)


def summary(task: TrainingTask, *, errors: list[str] | None = None) -> dict[str, Any]:
    """The card beside the form: ready or what is missing, the numbers, what differs from the defaults."""
    problems = checks.draft_problems(task)
    train, held_out = checks.pair_counts(task)
    estimate = checks.draft_estimate(task)
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
        "warnings": checks.draft_warnings(task),
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
    active: str  # parameters at work on one token, of a mixture of experts
    size: str
    context: str
    fit: Fit | None
    percent: int

    @property
    def is_loading(self) -> bool:
        return self.row.status in (BaseModel.Status.QUEUED, BaseModel.Status.DOWNLOADING)


def model_step(
    task: TrainingTask, form: ModelStepForm | None = None, *, ticked: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The page's context, and what it shows as chosen though the draft does not hold it: the starter at first.

    `ticked`: what a page that asks again for its cards has selected but not saved.
    """
    machine = training_machine()
    cards = [card(row, task, machine) for row in BaseModel.objects.for_user(task.owner)]
    cards.sort(key=lambda entry: (entry.row.source != BaseModel.Source.STARTER, not entry.row.is_ready))
    here = [entry for entry in cards if entry.row.owner_id or entry.row.status != BaseModel.Status.ABSENT]
    elsewhere = [entry for entry in cards if entry not in here]
    posted = form.data.get("model", "") if form and form.is_bound else ""
    chosen = posted or ticked or ModelStepForm.chosen(task)
    suggested = next(
        (entry.row for entry in here if entry.row.source == "starter" and entry.row.is_ready), None
    )
    values: dict[str, Any] = {}
    if not chosen and suggested:
        chosen, values = f"base:{suggested.pk}", {"base_model": suggested}
    roots = [str(root) for root in settings.MODEL_ROOTS]
    return {
        "form": form,
        "chosen": chosen,
        "here": here,
        "groups": _groups(elsewhere, chosen=chosen),
        "trained_models": [
            (model, f"parent:{model.pk}") for model in TrainedModel.objects.for_user(task.owner)
        ],
        "loading": any(entry.is_loading for entry in cards),
        "folder_form": FolderForm(roots=roots) if roots else None,
        "hub_form": HubForm(),
        "hub_offline": settings.HUB_OFFLINE,
        "machine": machine,
        "machine_memory": show_bytes(machine.memory_bytes),
    }, values


def choosing(rows: Iterable[BaseModel]) -> dict[str, Any]:
    """The page "How to choose a model": the catalogue at the default settings."""
    machine = training_machine()
    blank = TrainingTask()
    return {"groups": _groups([card(row, blank, machine) for row in rows]), "machine": machine}


@dataclasses.dataclass(frozen=True)
class KindGroup:
    """One kind of the catalogue: what fits this machine, then what is too large for it."""

    kind: str
    name: str
    guidance: str
    fitting: list[ModelCard]
    larger: list[ModelCard]
    is_larger_open: bool

    @property
    def entries(self) -> list[ModelCard]:
        return [*self.fitting, *self.larger]


def _groups(cards: list[ModelCard], *, chosen: str = "") -> list[KindGroup]:
    """The four kinds in their order."""
    groups = []
    for kind, (name, guidance) in KINDS.items():
        entries = [entry for entry in cards if entry.row.kind == kind]
        larger = [entry for entry in entries if entry.fit and entry.fit.verdict == "too_large"]
        fitting = [entry for entry in entries if entry not in larger]
        is_larger_open = any(entry.value == chosen for entry in larger)
        if entries:
            groups.append(KindGroup(kind, name, guidance, fitting, larger, is_larger_open))
    return groups


def card(row: BaseModel, task: TrainingTask, machine: Machine) -> ModelCard:
    facts = row.facts or {}
    context = facts.get("context_length")
    return ModelCard(
        row=row,
        value=f"base:{row.pk}",
        parameters=show_count(facts["num_parameters"]) if facts.get("num_parameters") else "",
        active=show_count(facts["active_parameters"]) if facts.get("num_experts") else "",
        size=show_bytes(facts["weights_bytes"]) if facts.get("weights_bytes") else "",
        context=f"{context // 1024}k" if isinstance(context, int) and context >= 1024 else str(context or ""),
        fit=checks.fit_of(row, task, machine),
        percent=min(100, round(100 * row.bytes_done / row.bytes_total)) if row.bytes_total else 0,
    )


# --- step 2 ---------------------------------------------------------------------------------------------
def data_step(task: TrainingTask, form: Any, *, back: str) -> tuple[dict[str, Any], dict[str, Any]]:
    shown = _shown_dataset(task, form)
    datasets = list(Dataset.objects.for_user(task.owner))
    context = {
        "form": form,
        "datasets": datasets,
        "chosen_id": str(shown.pk) if shown else "",
        "dataset": shown,
        "pairs": read_pairs(shown, count=PREVIEW_PAIRS) if shown and shown.is_ready else [],
        "upload_form": UploadForm(),
        "back": back,
        "evaluation": form["evaluation"].value(),
        "is_waiting": bool(shown and shown.status in BUSY),
        "percent": form["validation_percent"].value(),
        "upload_open": not any(row.is_ready and not row.is_example for row in datasets),
    }
    return context, {"dataset": shown}


def newest_dataset(task: TrainingTask) -> str:
    """What is ticked on the first visit; "" when the draft has its own choice."""
    if task.dataset_id:
        return ""
    row = Dataset.objects.for_user(task.owner).filter(status=Dataset.Status.READY).first()
    return str(row.pk) if row else ""


def _shown_dataset(task: TrainingTask, form: Any) -> Dataset | None:
    try:
        key = uuid.UUID(str(form["dataset"].value()))
    except ValueError:
        return None
    return Dataset.objects.for_user(task.owner).filter(pk=key).first()


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
    locked: bool
    band: str  # where a value of beta lies


def settings_step(task: TrainingTask, form: SettingsStepForm) -> tuple[dict[str, Any], dict[str, Any]]:
    sound = not recipes.problems(task.parameters)
    warnings = recipes.warnings(task.parameters) if sound else {}
    rows = [_row(parameter, form, warnings) for parameter in recipes.PARAMETERS]
    return {
        "form": form,
        "basic": [row for row in rows if row.parameter.group == "basic"],
        "advanced": [row for row in rows if row.parameter.group == "advanced"],
        "advanced_open": any(
            row.changed or row.field.errors for row in rows if row.parameter.group == "advanced"
        ),
        "modules": form.modules,
        "parent": task.parent_model if form.locked else None,
    }, {"name": form["name"].value() or "", "model_name": form["model_name"].value() or ""}


def _row(parameter: recipes.Parameter, form: SettingsStepForm, warnings: dict[str, str]) -> ParameterRow:
    field = form[parameter.name]
    default = "" if parameter.kind == "modules" else recipes.number(parameter.default)
    value = field.value()
    if parameter.kind == "modules":
        changed = bool(form.modules) and not set(value or ()) >= set(form.modules)
    else:
        changed = not _same_number(value, parameter.default)
    return ParameterRow(
        parameter=parameter,
        field=field,
        default=default,
        changed=changed,
        warning=warnings.get(parameter.name, ""),
        range=parameter.usual,
        suggestions=[recipes.number(value) for value in parameter.suggestions],
        locked=parameter.name in form.locked,
        band=_band(parameter, value),
    )


def _band(parameter: recipes.Parameter, value: Any) -> str:
    if parameter.name != "beta":
        return ""
    try:
        name, expectation = recipes.beta_band(float(value))
    except (TypeError, ValueError):
        return ""
    return f"{value} is {name}: {expectation}."


def _same_number(written: Any, default: float) -> bool:
    try:
        return written_number(str(written)) == default
    except ValueError:
        return False


# --- step 4 ---------------------------------------------------------------------------------------------
def review_step(task: TrainingTask) -> dict[str, Any]:
    sound = {} if recipes.problems(task.parameters) else task.parameters
    values = recipes.resolve(sound)
    changed = {difference.parameter.name for difference in recipes.differences(sound)}
    return {
        "values": [
            (parameter, recipes.show(parameter, values[parameter.name]), parameter.name in changed)
            for parameter in recipes.PARAMETERS
        ],
        "memory_parts": _memory_parts(task),
    }


def _memory_parts(task: TrainingTask) -> list[tuple[str, str]]:
    estimate = checks.draft_estimate(task)
    if estimate is None:
        return []
    parts = dataclasses.asdict(estimate.memory)
    names = {"adapter": "adapter and optimizer", "runtime": "program"}
    return [(names.get(name, name), show_bytes(size)) for name, size in parts.items()]
