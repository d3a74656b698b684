"""Adapters on a mixture's experts: stacked weights, which peft adapts as parameters, not as layers.

"all-linear" reaches experts and routers where peft knows the architecture (Mixtral, Qwen MoE), elsewhere only
what is a linear layer; the preset "experts" reaches stacked experts of any. peft adds the whole product B A to
every expert's weight in each forward: far more memory and work than an adapter on attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from training.engine.errors import RefusedError

PRESET = "experts"


def split_experts(base: Any, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what is left for layers, peft's `target_parameters`). The preset stays where the model has none."""
    parameters = expert_parameters(base) if PRESET in wanted else []
    return [name for name in wanted if name != PRESET or not parameters], parameters


def expert_parameters(base: Any) -> list[str]:
    """Ends of the names of stacked expert weights [E, out, in], as in "experts.gate_up_proj"."""
    found = set()
    for name, parameter in base.named_parameters():
        owner, leaf = ["", *name.split(".")][-2:]
        if parameter.ndim == 3 and "expert" in owner:
            found.add(f"{owner}.{leaf}")
    return sorted(found)


def explain_dropout(error: ValueError, dropout: float) -> None:
    """peft cannot drop out the inputs of a stacked weight, and says so of its own class."""
    if dropout and "ParamWrapper" in str(error):
        raise RefusedError(
            f"Adapters on experts cannot have dropout, and lora_dropout is {dropout:g}.",
            "Set lora_dropout to 0, or set target_modules to attention.",
        ) from error
