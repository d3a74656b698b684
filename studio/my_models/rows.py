"""What the pages show about a model, gathered from its rows and from the folder that the row names."""

from __future__ import annotations

import dataclasses
from typing import Any

from training.improvement import MetricChange, changes, kept_sentence, measured_after
from training.models import TrainedModel
from training.monitor.charts import CHARTS, payload
from training.monitor.feed import curves_of
from training.monitor.progress import duration_words
from training.recipes import PARAMETERS, show
from training.services.trained_models import lineage

MODEL_CHARTS = {"loss", "rewards/accuracies", "kl", "rewards/margins"}


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """A line of the list: the model and the two changes people look at first."""

    model: TrainedModel
    highlights: list[MetricChange]


def model_rows(models: list[TrainedModel]) -> list[ModelRow]:
    return [ModelRow(model, changes(model.result)[:2]) for model in models]


def detail_context(model: TrainedModel) -> dict[str, Any]:
    """The rows of the model's page; the name's form is added by the view."""
    context: dict[str, Any] = {
        "section": "models",
        "model": model,
        "changes": changes(model.result),
        "measured_after": measured_after(model.result),
        "kept": kept_sentence(model.result),
        "settings_rows": settings_of(model),
        "run_facts": run_facts(model),
        "lineage": lineage(model),
    }
    curves = curves_of(model.task) if model.task else {}
    if curves:
        figures = [figure for figure in payload(curves) if figure["id"] in MODEL_CHARTS]
        context |= {"charts": [chart for chart in CHARTS if chart.id in MODEL_CHARTS], "figures": figures}
    return context


def settings_of(model: TrainedModel) -> list[tuple[str, str, bool]]:
    """(label as in the wizard, value, whether it differs from the default)."""
    rows = []
    for parameter in PARAMETERS:
        if parameter.name in model.parameters:
            value = model.parameters[parameter.name]
            rows.append((parameter.label, show(parameter, value), _differs(value, parameter.default)))
    return rows


def _differs(value: Any, default: Any) -> bool:
    return (list(value) != list(default)) if isinstance(value, list | tuple) else bool(value != default)


def run_facts(model: TrainedModel) -> list[tuple[str, str]]:
    result = model.result
    facts = []
    if result.get("step"):
        facts.append(("Steps", f"{result['step']} of {result.get('total_steps') or result['step']}"))
    if result.get("seconds"):
        facts.append(("Training time", duration_words(float(result["seconds"]))))
    if result.get("num_tokens"):
        facts.append(("Tokens processed", f"{int(result['num_tokens']):,}"))
    if result.get("num_trainable_parameters"):
        facts.append(("Trained parameters", f"{int(result['num_trainable_parameters']):,}"))
    return facts
