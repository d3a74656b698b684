"""Which layers an adapter goes on: the names and presets of `target_modules`, read from the model itself.

Knows the names of a model's modules; nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from training.engine.errors import RefusedError
from training.engine.experts import expert_parameters

ALL_LINEAR = "all-linear"
# Of a layer's path one part says where it lies: `layers.3.self_attn.q_proj`, `h.0.mlp.c_fc`, `experts.7.w1`.
PRESETS = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "feedforward", "ffn", "expert", "moe"),
}


def resolve(base: Any, wanted: Sequence[str]) -> str | list[str]:
    """What peft is told: names that all exist. Raises `RefusedError` with those that do.

    `wanted` holds "all-linear" alone (every linear layer but the one that gives the vocabulary), or presets
    ("attention", "mlp"), names of layers and ends of them ("q_proj", "layers.0.mlp.up_proj") in any mixture;
    nothing means "all-linear".
    """
    linear, head = linear_layers(base)
    if not wanted or list(wanted) == [ALL_LINEAR]:
        if expert_parameters(base):
            return ALL_LINEAR  # for peft to find the experts that it knows
        return _shortest(set(linear), [*linear, *head])
    found: set[str] = set()
    missing = []
    for name in wanted:
        if name in PRESETS:
            layers = {layer for layer in linear if _lies_in(layer, PRESETS[name])}
        else:
            layers = {layer for layer in linear if layer == name or layer.endswith(f".{name}")}
        found |= layers
        if not layers:
            missing.append(name)
    if missing:
        raise RefusedError(
            f"The model has no {' and no '.join(repr(name) for name in missing)} to put an adapter on.",
            f"Use {ALL_LINEAR!r}, the presets {' and '.join(map(repr, PRESETS))}, or names among "
            f"{', '.join(sorted({_leaf(layer) for layer in linear}))}.",
        )
    return _shortest(found, [*linear, *head])


def linear_layers(base: Any) -> tuple[list[str], list[str]]:
    """Full names of the linear layers, and of the one among them that gives the vocabulary."""
    output = base.get_output_embeddings()
    modules = {name: it for name, it in base.named_modules() if isinstance(it, (nn.Linear, Conv1D))}
    head = [name for name, module in modules.items() if module is output]
    return [name for name in modules if name not in head], head


def _lies_in(layer: str, marks: tuple[str, ...]) -> bool:
    """Decided by the outermost part that any preset knows: `mlp.attention_gate` is of the mlp."""
    for part in layer.lower().split("."):
        owners = [known for known in PRESETS.values() if any(mark in part for mark in known)]
        if owners:
            return owners[0] == marks
    return False


def _shortest(found: set[str], every: Sequence[str]) -> list[str]:
    """Last parts of names where they say the same (peft matches ends), full names where they would say more."""
    left_out = {_leaf(layer) for layer in every if layer not in found}
    return sorted({layer if _leaf(layer) in left_out else _leaf(layer) for layer in found})


def _leaf(layer: str) -> str:
    return layer.rpartition(".")[2]
