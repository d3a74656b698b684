"""Pairs in one row without padding, each prompt computed once: the fast layout, equal to the padded one.

Positions of the rejected side continue the prompt, as if the chosen side were not there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from training.engine import shared_attention
from training.engine.data import TokenizedPair
from training.engine.plain import CompletionStates, Layout, labels_and_owners, padded_states
from training.engine.shared_attention import LayoutError, PairLayout, Segment

# Two layouts agree when their hidden states differ by less, relative to their norm.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
COARSE_TOLERANCE = 0.05  # bf16
CHECK_TOKENS = 96  # tokens of each part of the pair that the check looks at


def packed_states(
    decoder: nn.Module, pairs: Sequence[TokenizedPair], device: torch.device
) -> CompletionStates:
    """One row [prompt chosen rejected | prompt chosen rejected | …] of B pairs; rejected may be empty."""
    segments, positions, predicting = [], [], []
    start = 0
    for pair in pairs:
        prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        segment = Segment(start, start + prompt, start + prompt + chosen, start + prompt + chosen + rejected)
        segments.append(segment)
        positions += [np.arange(prompt + chosen), np.arange(prompt, prompt + rejected)]
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
    labels, owner = labels_and_owners(pairs, device)
    return CompletionStates(outputs.last_hidden_state[0, tensor(predicting)], labels, owner, 2 * len(pairs))


def use_shared_prefix(model: PreTrainedModel) -> None:
    """Let the model's attention understand packed pairs; anything else it does stays plain SDPA."""
    model.set_attn_implementation(shared_attention.NAME)


@torch.no_grad()
def choose_layout(
    decoder: nn.Module, pairs: Sequence[TokenizedPair], device: torch.device, *, dtype: torch.dtype
) -> tuple[Layout, str]:
    """The packed layout when this model gives the same hidden states with it, else the padded one and why.

    Decided by trying, not by a list of names: two short pairs through both, compared after the final norm.
    """
    sample = [
        TokenizedPair(
            pair.id, pair.prompt[:CHECK_TOKENS], pair.chosen[:CHECK_TOKENS], pair.rejected[:CHECK_TOKENS]
        )
        for pair in pairs[:2]
    ]
    longest = max(pairs, key=lambda pair: len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))
    window = getattr(getattr(decoder, "config", None), "sliding_window", None)
    span = len(longest.prompt) + max(len(longest.chosen), len(longest.rejected))
    if window is not None and span > window:
        return (
            padded_states,
            f"its window of {window} tokens is shorter than the longest pair ({span})",
        )
    was_training = decoder.training
    decoder.eval()
    try:
        packed = packed_states(decoder, sample, device).hidden.double()
        padded = padded_states(decoder, sample, device).hidden.double()
    except (LayoutError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return padded_states, f"its attention does not take packed pairs ({error})"
    finally:
        decoder.train(was_training)
    difference = float((packed - padded).norm() / padded.norm().clamp_min(1e-12))
    limit = TOLERANCE.get(dtype, COARSE_TOLERANCE)
    if not difference <= limit:
        return padded_states, f"packed pairs gave other hidden states (relative difference {difference:.1e})"
    return packed_states, ""
