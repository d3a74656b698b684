"""Pairs in one row without padding, each prompt computed once: the fast layout, equal to the padded one.

Positions of the rejected side continue the prompt, as if the chosen side were not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from training.engine import shared_attention
from training.engine.data import TokenizedPair
from training.engine.pair_layout import PairLayout, Segment
from training.engine.plain import (
    CompletionStates,
    Layout,
    labels_and_owners,
    padded_states,
    routing_of,
    single_states,
)
from training.engine.shared_attention import LayoutError, watching

# Two layouts agree when the hidden states of each completion differ by less, relative to their norm.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
COARSE_TOLERANCE = 0.05  # bf16
# Tokens of the pairs that are tried. Short sides: what leaks from one into the next is near its start.
CHECK_PROMPT, CHECK_SIDE = 32, 16
# Position embeddings whose frequencies follow the longest row of a forward, not the row itself.
BATCH_ROPE = {"dynamic", "longrope"}


def packed_states(
    decoder: nn.Module, pairs: Sequence[TokenizedPair], device: torch.device
) -> CompletionStates:
    """One row [prompt chosen rejected | prompt chosen rejected | …] of B pairs; rejected may be empty."""
    segments, positions, predicting, counts = [], [], [], []
    start = 0
    for pair in pairs:
        prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        segment = Segment(start, start + prompt, start + prompt + chosen, start + prompt + chosen + rejected)
        segments.append(segment)
        positions += [np.arange(prompt + chosen), np.arange(prompt, prompt + rejected)]
        counts += [np.full(prompt, 2 if rejected else 1), np.ones(chosen + rejected)]
        # The prompt's last token predicts the first token of either side; a side's last predicts none.
        predicting.append(np.arange(segment.prompt_end - 1, segment.chosen_end - 1))
        if rejected:
            predicting += [
                np.array([segment.prompt_end - 1]),
                np.arange(segment.chosen_end, segment.end - 1),
            ]
        start = segment.end
    ids = np.concatenate([part for pair in pairs for part in (pair.prompt, pair.chosen, pair.rejected)])

    def tensor(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device)

    outputs = decoder(
        input_ids=tensor([ids])[None],
        position_ids=tensor(positions)[None],
        # A mask of four dimensions is passed through as it is: none is built, and the layout says it all.
        attention_mask=torch.zeros(1, 1, 1, 1, device=device),
        use_cache=False,
        pair_layout=PairLayout(tuple(segments), device),
    )
    hidden = outputs.last_hidden_state[0, tensor(predicting)]
    routing = routing_of(decoder, outputs, tensor(counts))  # a prompt counts as often as it has answers
    return CompletionStates(hidden, *labels_and_owners(pairs, device), 2 * len(pairs), routing)


def use_shared_prefix(model: PreTrainedModel) -> None:
    """Let the model's attention understand packed pairs; anything else it does stays plain SDPA."""
    model.set_attn_implementation(shared_attention.NAME)


@torch.no_grad()
def choose_layout(
    decoder: nn.Module,
    pairs: Sequence[TokenizedPair],
    device: torch.device,
    *,
    dtype: torch.dtype,
    expected: CompletionStates | None = None,
) -> tuple[Layout, str]:
    """The packed layout when this model gives the same hidden states with it, else a plain one and why.

    Decided by trying, not by a list of names: the masks that the model asks for are compared at the positions
    of the longest pair, and two short pairs go through both layouts. `expected`: what the padded layout gives
    for `tried(pairs)` by the model's own attention.
    """
    longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
    reach = batch_rope_reach(decoder)
    if reach is not None and longest > reach:
        return single_states, f"its position embeddings change with the longest row beyond {reach} tokens"
    sample = tried(pairs)
    was_training = decoder.training
    try:
        reason = _watched(decoder, sample, device, longest)
        if reason:
            return padded_states, reason
        decoder.eval()
        packed = packed_states(decoder, sample, device)
        padded = expected or padded_states(decoder, sample, device)
    except (LayoutError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return padded_states, f"its attention does not take packed pairs ({_first_line(error)})"
    finally:
        decoder.train(was_training)
    difference = _difference(packed, padded)
    limit = TOLERANCE.get(dtype, COARSE_TOLERANCE)
    if not difference <= limit:
        return padded_states, f"packed pairs gave other hidden states (relative difference {difference:.1e})"
    return packed_states, ""


def tried(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The pairs that a model is tried with."""
    return [
        TokenizedPair(
            pair.id, pair.prompt[-CHECK_PROMPT:], pair.chosen[:CHECK_SIDE], pair.rejected[:CHECK_SIDE]
        )
        for pair in pairs[:2]
    ]


def batch_rope_reach(decoder: nn.Module) -> int | None:
    """Up to how many tokens a row's position embeddings are its own; None = always."""
    config: Any = getattr(decoder, "config", None)
    settings = getattr(config, "rope_parameters", None) or {}
    layers = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    reaches = [
        int(layer.get("original_max_position_embeddings") or config.max_position_embeddings)
        for layer in layers
        if layer.get("rope_type") in BATCH_ROPE
    ]
    return min(reaches, default=None)


def _watched(decoder: nn.Module, pairs: Sequence[TokenizedPair], device: torch.device, longest: int) -> str:
    """What the model asks of attention while training, seen on rows of a few tokens."""
    short = [TokenizedPair(p.id, p.prompt[-1:], p.chosen[:1], p.rejected[:2]) for p in pairs]
    decoder.train()
    with watching() as watch:
        padded_states(decoder, short, device)
    return watch.reason(longest)


def _difference(ours: CompletionStates, theirs: CompletionStates) -> float:
    """Of the completion that differs most: norm of the difference over norm."""
    squares = (ours.hidden - theirs.hidden).double().square().sum(-1)
    sizes = theirs.hidden.double().square().sum(-1)
    zeros = torch.zeros(ours.num_completions, dtype=torch.float64, device=squares.device)
    ratios = zeros.index_add(0, ours.owner, squares) / zeros.index_add(0, ours.owner, sizes).clamp_min(1e-24)
    return float(ratios.max().sqrt())


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
