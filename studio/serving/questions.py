"""From a model's row and a valid form to what the chat process is asked."""

from __future__ import annotations

from pathlib import Path

from studio.serving.conversation import TUNED, messages_of
from studio.serving.forms import TryForm
from studio.serving.turns import Question
from training.models import TrainedModel


class NotTriable(Exception):
    """The files that an answer needs are not here. The message is a sentence with what to do."""


def why_not(model: TrainedModel) -> str:
    """Why this model cannot be tried now; "" when it can."""
    base = model.base_model
    if base is None or not base.is_ready or not (Path(base.path) / "config.json").is_file():
        return (
            f"The base model {model.base_model_name} is not on this machine any more: nothing can answer. "
            "Choose it in step 1 of a new task, which brings it back."
        )
    if not (model.folder / "adapter_model.safetensors").is_file():
        return "The files of this model are not on disk, so it cannot be tried. Restore them or delete it."
    return ""


def question_from(model: TrainedModel, form: TryForm) -> Question:
    if refusal := why_not(model):
        raise NotTriable(refusal)
    assert model.base_model is not None  # noqa: S101 - why_not has looked
    data = form.cleaned_data
    against = data["against"]
    adapters = {TUNED: str(model.folder)}
    if against == "parent" and model.parent is not None:
        adapters["parent"] = str(model.parent.folder)
    return Question(
        model_path=model.base_model.path,
        adapters=adapters,
        sides={
            side: messages_of(form.turns, system=data["system"], prompt=data["prompt"], side=side)
            for side in (against, TUNED)
        },
        temperature=data["temperature"],
        top_p=data["top_p"],
        max_new_tokens=data["max_new_tokens"],
        seed=data["seed"],
    )
