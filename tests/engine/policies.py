"""A policy over the tiny model with an adapter that is not zero, and its tokenised pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_pairs
from training.contract import RunConfig
from training.engine.activations import use_activations
from training.engine.data import TokenizedPair, tokenize_pairs
from training.engine.logps import sum_by_owner, token_logps
from training.engine.policy import Placement, Policy, load_policy, load_tokenizer, use_fast_layout


def tiny_config(model: Path, **settings: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "run_id": "t",
        "model_path": str(model),
        "train_path": "",
        "device": "cpu",
        "lora_dropout": 0.0,
    }
    return RunConfig(**(defaults | settings))


def tiny_data(model: Path, count: int = 6, max_length: int = 1024) -> list[TokenizedPair]:
    tokenizer = load_tokenizer(tiny_config(model))
    return tokenize_pairs(tiny_pairs(count), tokenizer, max_length=max_length)[0]


def tiny_policy(config: RunConfig, *, packed: bool = True, bent: bool = True) -> Policy:
    """`bent`: the adapter's B is not zero, so policy and reference differ."""
    pairs = tiny_data(Path(config.model_path))
    policy = load_policy(config, Placement.choose(config), pairs[:1])
    if packed:
        assert "both of its answers" in use_fast_layout(policy, pairs)
    use_activations(policy, config, pairs)
    if bent:
        bend(policy)
    return policy


def bend(policy: Policy, seed: int = 7, *, scale: float = 0.05) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in policy.trainable.items():
            if "lora_B" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * scale)


def summed(policy: Policy, pairs: Sequence[TokenizedPair]) -> torch.Tensor:
    """Log-probability of each completion [2 * B], with gradient where there is one."""
    states = policy.scorer(pairs)
    return sum_by_owner(token_logps(states.hidden, states.labels, policy.head), states.owner, 2 * len(pairs))


def gradients(policy: Policy) -> torch.Tensor:
    return torch.cat(
        [tensor.grad.flatten() for tensor in policy.trainable.values() if tensor.grad is not None]
    )
