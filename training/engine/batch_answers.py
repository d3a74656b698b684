"""Answers to several prompts at once, each with draws of its own: what watch prompts are answered with.

One prompt at a time and as text that comes in pieces: `generation.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import DynamicCache

from training.engine.logps import Head, log_partition
from training.engine.policy import Placement


@dataclasses.dataclass(frozen=True)
class BatchAnswer:
    """Token ids; `stop`: the last of them ends the answer."""

    ids: list[int]
    finish_reason: Literal["stop", "length"]

    @property
    def spoken(self) -> list[int]:
        return self.ids[:-1] if self.finish_reason == "stop" else self.ids


def draw_tokens(
    logits: torch.Tensor, generators: Sequence[torch.Generator], temperature: float
) -> torch.Tensor:
    """One token a row: logits [n, V] -> [n]. Temperature 0: the likeliest.

    By inversion: the first token whose cumulative probability passes one uniform draw of the row's generator.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    _, probabilities = log_partition(logits / temperature)
    mass = probabilities.double().cumsum(dim=-1)  # [n, V]
    uniform = torch.stack([torch.rand((), generator=one, dtype=torch.float64) for one in generators])
    wanted = uniform.to(mass.device)[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, wanted, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def answer_prompts(
    decoder: Any,
    head: Head,
    prompts: Sequence[Sequence[int]],
    *,
    placement: Placement,
    seeds: Sequence[int],
    eos: frozenset[int],
    temperature: float,
    max_new_tokens: int,
    check: Callable[[], None] = lambda: None,
) -> list[BatchAnswer]:
    """Left-padded, with a cache of keys and values. `check` is called before each token and may raise."""
    device, width = placement.device, max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    positions = (mask.cumsum(dim=-1) - 1).clamp_min(0)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cache = DynamicCache(config=decoder.config)
    said: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    head = head.ready()
    for _ in range(max_new_tokens):
        check()
        with placement.autocast():
            hidden = decoder(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        with torch.autocast(device.type, enabled=False):
            tokens = draw_tokens(head.logits(hidden), generators, temperature)
        for row, token in enumerate(tokens.tolist()):
            if not ended[row]:
                said[row].append(token)
                ended[row] = token in eos
        if all(ended):
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=-1)
    return [BatchAnswer(row, "stop" if done else "length") for row, done in zip(said, ended, strict=True)]
