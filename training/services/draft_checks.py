"""What keeps a draft from becoming a task, what deserves a second look, and its numbers. Reads only.

Every check looks at the row as it is: a draft may be old, its dataset deleted, its model replaced.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from pathlib import Path
from typing import Any

from datasets_app.models import Dataset
from datasets_app.splitting import count_split
from training import recipes
from training.base_models import linear_modules, shape_of
from training.estimates import Estimate, Fit, Machine, PairTokens, estimate_run
from training.models import BaseModel, TrainedModel, TrainingTask
from training.services.machines import training_machine
from training.services.queue import live_hosts, most_gpus

logger = logging.getLogger(__name__)

STEPS = ("model", "data", "settings", "review")
NAME_LIMIT = 120
MAX_SHARE = 0.5
MAX_EVAL_STEPS = 1_000_000
PAIRS_ADVISED = (100, 100_000)
# A run may be created while its model still loads: it waits in the queue for it.
COMING = (BaseModel.Status.READY, BaseModel.Status.QUEUED, BaseModel.Status.DOWNLOADING)
Evaluation = TrainingTask.Evaluation


@dataclasses.dataclass(frozen=True)
class Problem:
    """A sentence, and the step on which it is mended."""

    step: str
    text: str


def draft_problems(task: TrainingTask) -> list[Problem]:
    """Everything that stands in the way, in the order of the steps. Empty = ready."""
    return [
        *(Problem("model", text) for text in _model_problems(task)),
        *(Problem("data", text) for text in _data_problems(task)),
        *(Problem("settings", text) for text in _settings_problems(task)),
    ]


def furthest_step(problems: list[Problem]) -> str:
    """The first step with a problem: later ones cannot be opened yet."""
    with_problem = {problem.step for problem in problems}
    return next((step for step in STEPS if step in with_problem), "review")


# --- problems -------------------------------------------------------------------------------------------
def _model_problems(task: TrainingTask) -> list[str]:
    parent, base = task.parent_model, task.base_model
    if parent is not None and parent.owner_id != task.owner_id:
        return ["This model is not in your My Models. Choose another."]
    if parent is not None and (base is None or parent.base_model_id != base.pk):
        return [f"The base of “{parent.name}” ({parent.base_model_name}) is gone. Choose another model."]
    if base is None:
        return ["Choose a base model."]
    if base.owner_id not in (None, task.owner_id):
        return ["This base model is not yours to use. Choose another."]
    if base.status not in COMING:
        reason = f" {base.problem}" if base.problem else ""
        return [f"{base.name} is not on this machine.{reason} Download it, or choose another."]
    if base.facts.get("has_chat_template") is False:
        return [
            f"{base.name} has no chat template, so conversations cannot be written for it. Choose its instruct "
            "variant, or put a chat_template.jinja into its folder."
        ]
    return []


def _data_problems(task: TrainingTask) -> list[str]:
    found = [
        _dataset_problem(task, task.dataset) or "" if task.dataset else "Choose a dataset, or upload one."
    ]
    found.append(_evaluation_problem(task))
    found = [text for text in found if text]
    if not found and task.evaluation == Evaluation.SPLIT:
        train, held_out = pair_counts(task)
        if not held_out:
            found.append(
                "All pairs share one prompt, so none can be held out. Choose no validation, or add prompts."
            )
        elif not train:
            found.append("Nothing is left to train on. Hold out a smaller share.")
    return found


def _dataset_problem(task: TrainingTask, dataset: Dataset) -> str:
    if dataset.owner_id != task.owner_id:
        return "This dataset is not yours to use. Choose another."
    if dataset.status in (Dataset.Status.QUEUED, Dataset.Status.VALIDATING):
        return f"“{dataset.name}” is still being validated. This takes a moment."
    if not dataset.is_ready:
        return f"“{dataset.name}” cannot be used: {dataset.problem or 'it has no usable pair.'}"
    return ""


def _evaluation_problem(task: TrainingTask) -> str:
    if task.evaluation not in Evaluation.values:
        return "Choose how the model is validated."
    if not 0 <= task.eval_steps <= MAX_EVAL_STEPS:
        return "Evaluate every so many steps: a whole number, or 0 to let the studio choose."
    if task.evaluation == Evaluation.SPLIT:
        share = task.validation_share
        if not (math.isfinite(share) and 0 < share <= MAX_SHARE):
            return "Hold out a share above 0 and at most 50 percent; 10 is usual."
    if task.evaluation == Evaluation.FILE:
        other = task.validation_dataset
        if other is None:
            return "Choose the dataset to validate on, or hold out a share of the training data."
        if other.pk == task.dataset_id:
            return "The validation dataset is the training dataset. Choose another, or hold out a share."
        return _dataset_problem(task, other)
    return ""


def _settings_problems(task: TrainingTask) -> list[str]:
    found = []
    for what, name in (("model", task.model_name), ("task", task.name)):
        if not name.strip():
            found.append(f"Give the {what} a name.")
        elif len(name) > NAME_LIMIT:
            found.append(f"The name of the {what} is too long: use at most {NAME_LIMIT} characters.")
    if task.num_devices > 1 and live_hosts().exists() and task.num_devices > most_gpus():
        found.append(
            f"num_devices is {task.num_devices}, and the largest machine has {most_gpus()}. Choose fewer."
        )
    refused = recipes.problems(task.parameters)
    found += refused.values()
    known = linear_modules(task.base_model.facts) if task.base_model else ()
    if "target_modules" not in refused and known:
        unknown = [name for name in task.parameters.get("target_modules", ()) if name not in known]
        if unknown:
            found.append(f"{task.base_model} has no layers named {', '.join(unknown)}. Choose from its list.")
    return found


# --- warnings -------------------------------------------------------------------------------------------
def draft_warnings(task: TrainingTask) -> list[Problem]:
    """What will run but deserves a second look."""
    found = [Problem("data", text) for text in _data_warnings(task)]
    if recipes.problems(task.parameters):
        return found
    found += [Problem("settings", text) for text in recipes.warnings(task.parameters).values()]
    found += [Problem("settings", text) for text in _length_warnings(task)]
    estimate = draft_estimate(task)
    if estimate and estimate.fit.verdict in ("tight", "too_large"):
        found.append(Problem("settings", estimate.fit.sentence))
    return found


def _data_warnings(task: TrainingTask) -> list[str]:
    dataset = task.dataset
    if dataset is None or not dataset.is_ready:
        return []
    found = []
    low, high = PAIRS_ADVISED
    if not low <= dataset.num_pairs <= high:
        pairs = "1 pair" if dataset.num_pairs == 1 else f"{dataset.num_pairs:,} pairs"
        found.append(f"{pairs}: {low:,} to {high:,} are recommended. You can go on; quality counts more.")
    if dataset.num_errors:
        lines = (
            "1 line of the file is"
            if dataset.num_errors == 1
            else f"{dataset.num_errors:,} lines of the file are"
        )
        found.append(f"{lines} left out because of errors.")
    if task.evaluation == Evaluation.NONE:
        found.append("Without validation, overfitting cannot be seen while it happens.")
    return found


def _length_warnings(task: TrainingTask) -> list[str]:
    found = []
    limit = recipes.resolve(task.parameters)["max_length"]
    context = (task.base_model.facts or {}).get("context_length") if task.base_model else None
    if isinstance(context, int) and limit > context:
        found.append(
            f"max_context_length {limit:,} is more than the {context:,} tokens that {task.base_model} was made for."
        )
    longest = pair_tokens(task.dataset).longest
    if longest > limit:
        found.append(
            f"The longest pair has about {longest:,} tokens a side; what is beyond max_context_length {limit:,} is cut."
        )
    return found


# --- numbers --------------------------------------------------------------------------------------------
def pair_counts(task: TrainingTask) -> tuple[int, int]:
    """(training pairs, validation pairs) of this draft as it stands."""
    dataset = task.dataset
    if dataset is None or not dataset.is_ready:
        return 0, 0
    if task.evaluation == Evaluation.SPLIT:
        seed = recipes.resolve({} if recipes.problems(task.parameters) else task.parameters)["seed"]
        try:
            return _count_split(str(dataset.pairs_path), dataset.pairs_sha256, task.validation_share, seed)
        except (OSError, ValueError, TypeError):
            logger.warning("The pairs of %s cannot be counted", dataset.pairs_path, exc_info=True)
            return 0, 0
    other = task.validation_dataset
    held_out = other.num_pairs if task.evaluation == Evaluation.FILE and other and other.is_ready else 0
    return dataset.num_pairs, held_out


@functools.lru_cache(maxsize=256)
def _count_split(path: str, sha256: str, share: float, seed: Any) -> tuple[int, int]:
    """By content: the file behind a hash never changes, and a page asks on every keystroke. A failure to read
    it is raised, not remembered.
    """
    return count_split(Path(path), share, int(seed))


def draft_estimate(task: TrainingTask) -> Estimate | None:
    """Steps, memory and time; None while there is too little to say anything."""
    shape = shape_of(task.base_model.facts) if task.base_model else None
    if shape is None or recipes.problems(task.parameters):
        return None
    train, held_out = pair_counts(task)
    return estimate_run(
        shape=shape,
        parameters=recipes.resolve(task.parameters),
        tokens=pair_tokens(task.dataset),
        machine=training_machine(),
        num_train_pairs=train,
        num_eval_pairs=held_out,
        eval_steps=task.eval_steps,
    )


def fit_of(base: BaseModel, task: TrainingTask, machine: Machine) -> Fit | None:
    """Would this model's training fit, at the settings and pairs of this draft? A layer list belongs to another
    model and counts as all layers."""
    shape = shape_of(base.facts or {})
    if shape is None:
        return None
    parameters = {} if recipes.problems(task.parameters) else task.parameters
    return estimate_run(
        shape=shape,
        parameters=recipes.resolve(parameters) | {"target_modules": ()},
        tokens=pair_tokens(task.dataset),
        machine=machine,
        num_train_pairs=1,
    ).fit


def pair_tokens(dataset: Dataset | None) -> PairTokens:
    """What validation found out about the lengths; typical ones before there is a dataset."""
    known = (dataset.stats or {}).get("tokens_estimate") if dataset and dataset.is_ready else None
    if not known:
        return PairTokens()
    return PairTokens(
        prompt=float(known["prompt"]),
        chosen=float(known["chosen"]),
        rejected=float(known["rejected"]),
        longest=int(known["total_max"]),
    )


def lora_of_parent(parent: TrainedModel | None) -> dict[str, Any]:
    """Rank, alpha and layers of the adapter that a run starts from: they are its own and cannot be changed."""
    values = parent.parameters if parent and isinstance(parent.parameters, dict) else {}
    found = {name: values[name] for name in recipes.OF_THE_ADAPTER if name in values}
    return {} if recipes.problems(found) else found
