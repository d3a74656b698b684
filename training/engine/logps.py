"""From hidden states to log-probabilities: the vocabulary projection, on completion tokens only, in chunks.

No chunk's logits outlive it. The projection is frozen under LoRA, and the log-probability of a token
depends on its own hidden state alone, so the forward knows the gradient: d logp / d hidden = W[label] -
sum_v p_v W[v].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

CHUNK_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Head:
    """hidden [n, H] -> logits [n, V]: W h + b, scaled, soft-capped. Frozen."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None
    scale: float = 1.0
    softcap: float = 0.0  # 0 = none

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, V] in float32 or better, whatever the weights are kept in."""
        raw = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        raw = raw.to(torch.promote_types(torch.float32, raw.dtype))
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        return raw

    def pull_back(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """d L / d hidden [n, H] from d L / d logits [n, V]."""
        if self.softcap:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return ((gradient * self.scale).to(self.weight.dtype) @ self.weight).to(gradient.dtype)


def log_partition(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log sum exp over the vocabulary, and the normalised probabilities: [n, V] -> [n, 1], [n, V].

    Written out because `torch.log_softmax` on CPU was measured 8 times less exact over a vocabulary of 49k.
    """
    highest = logits.amax(dim=-1, keepdim=True)
    exponentials = (logits - highest).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    return highest + total.log(), exponentials.div_(total)


def row_chunks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(tensor, CHUNK_ROWS)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> torch.Tensor:
        values, slopes = [], []
        wants_gradient = ctx.needs_input_grad[0]
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, targets in zip(row_chunks(hidden), row_chunks(labels), strict=True):
                logits = head.logits(rows)
                partition, probabilities = log_partition(logits)
                picked = logits.gather(-1, targets[:, None])
                values.append((picked - partition).squeeze(-1))
                if wants_gradient:
                    gradient = probabilities.neg_()
                    gradient.scatter_add_(-1, targets[:, None], torch.ones_like(picked))
                    slopes.append(head.pull_back(gradient, logits))
        if wants_gradient:
            ctx.save_for_backward(torch.cat(slopes))
            ctx.hidden_dtype = hidden.dtype
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(ctx.hidden_dtype), None, None


def token_logps(hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> torch.Tensor:
    """log p(label | context) of each completion token: hidden [C, H], labels [C] -> [C], nats."""
    values: torch.Tensor = _TokenLogps.apply(hidden, labels, head)  # type: ignore[no-untyped-call]
    return values


def sum_by_owner(values: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """Sum token values [C] over the completion that owns them: -> [count], in float64.

    700 tokens of a few nats each lose 1e-3 in float32, which beta would carry into the loss.
    """
    total = torch.zeros(count, dtype=torch.float64, device=values.device)
    return total.index_add(0, owner, values.double())


def sampled_kl(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) estimated on the data's tokens: log-probabilities [C] twice -> [C], >= 0.

    With w = pi / ref: w log w - (w - 1). Its mean over tokens drawn from the reference is the divergence;
    the data's tokens stand in for such draws. For draws from the policy the same idea is the k3 estimator
    of Schulman (2020, "Approximating KL divergence"), 1 / w - 1 + log w: on rejected tokens, which training
    makes unlikely, that one grows without bound, while this one stays below 1.
    """
    log_ratio = (policy.detach() - reference).double()
    return log_ratio * log_ratio.exp() - torch.expm1(log_ratio)
