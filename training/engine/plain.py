"""The plain layouts: each pair is two sequences, padded or alone. The measure of the others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from training.engine.data import TokenizedPair
from training.engine.routing import Routing


@dataclasses.dataclass(frozen=True)
class CompletionStates:
    """What the loss needs of a batch of B pairs: only the positions that predict completion tokens.

    Completion 2 * i is the chosen side of pair i, 2 * i + 1 its rejected side; tokens lie in that order.
    """

    hidden: torch.Tensor  # [C, H] final hidden states
    labels: torch.Tensor  # [C] the token each of them predicts
    owner: torch.Tensor  # [C] which of the 2 * B completions it belongs to
    num_completions: int
    routing: Routing | None = None  # of a mixture of experts, where it was asked for


class Layout(Protocol):
    """How pairs are laid out for the decoder. Same result from every layout, within rounding."""

    def __call__(
        self, decoder: nn.Module, pairs: Sequence[TokenizedPair], device: torch.device
    ) -> CompletionStates: ...


def labels_and_owners(
    pairs: Sequence[TokenizedPair], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Completion tokens [C] and the completion each belongs to [C], in the order that every layout keeps."""
    completions = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    labels = torch.from_numpy(np.concatenate(completions).astype(np.int64))
    lengths = torch.tensor([len(side) for side in completions])
    owner = torch.repeat_interleave(torch.arange(len(completions)), lengths)
    return labels.to(device), owner.to(device)


def padded_states(
    decoder: nn.Module,
    pairs: Sequence[TokenizedPair],
    device: torch.device,
    *,
    padding_side: Literal["right", "left"] = "right",
    extra_padding: int = 0,
) -> CompletionStates:
    """2 * B rows of prompt + completion, padded to the longest; none for an empty completion."""
    sides = [(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected) if len(side)]
    rows = [np.concatenate(parts) for parts in sides]
    prompts = [len(prompt) for prompt, _ in sides]
    width = max(len(row) for row in rows) + extra_padding
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    row_index, column_index = [], []
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        start = 0 if padding_side == "right" else width - len(row)
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = 1
        columns = np.arange(start + prompt - 1, start + len(row) - 1)
        column_index.append(columns)
        row_index.append(np.full(len(columns), number))
    positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    outputs = decoder(
        input_ids=tensor(ids), attention_mask=tensor(mask), position_ids=tensor(positions), use_cache=False
    )
    hidden = outputs.last_hidden_state[
        tensor(np.concatenate(row_index)), tensor(np.concatenate(column_index))
    ]
    labels, owner = labels_and_owners(pairs, device)
    routing = routing_of(decoder, outputs, tensor(mask).flatten())
    return CompletionStates(hidden, labels, owner, 2 * len(pairs), routing)


def routing_of(decoder: nn.Module, outputs: Any, weights: torch.Tensor) -> Routing | None:
    """Of a forward whose tokens count `weights` [B * T] times."""
    return Routing.of(outputs, weights, getattr(decoder.config, "num_experts_per_tok", 0) or 0)


def single_states(
    decoder: nn.Module, pairs: Sequence[TokenizedPair], device: torch.device
) -> CompletionStates:
    """Every sequence in a forward of its own: right even where a row's result depends on its neighbours."""
    nothing = np.zeros(0, dtype=np.int32)
    alone = [
        padded_states(decoder, [TokenizedPair(pair.id, pair.prompt, side, nothing)], device)
        for pair in pairs
        for side in (pair.chosen, pair.rejected)
        if len(side)
    ]
    labels, owner = labels_and_owners(pairs, device)
    routings = [states.routing for states in alone if states.routing is not None]
    routing = functools.reduce(Routing.joined, routings) if routings else None
    hidden = torch.cat([states.hidden for states in alone])
    return CompletionStates(hidden, labels, owner, 2 * len(pairs), routing)
