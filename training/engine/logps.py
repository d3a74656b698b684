"""From hidden states to log-probabilities: the vocabulary projection, on completion tokens only, in chunks.

No chunk's logits outlive it. The log-probability of a token depends on its own hidden state alone. Where the
projection is frozen (adapters), the forward therefore knows the gradient: d logp / d hidden = W[label] -
sum_v p_v W[v]. Where it is trained (full fine-tuning), the gradient of the weight is a sum over tokens of
what only the loss knows, so the backward computes each chunk's logits once more.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from training.engine.cpu_products import multiply
from training.engine.products import operand_dtype, product

CHUNK_ROWS = 128  # 25 MB of logits over a vocabulary of 49k; more of them are no faster


@dataclasses.dataclass(frozen=True)
class Head:
    """hidden [n, H] -> logits [n, V]: W h + b, scaled, soft-capped."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None
    scale: float = 1.0
    softcap: float = 0.0  # 0 = none
    compute_dtype: torch.dtype | None = None  # of the matrix product, where it is not the weight's

    @property
    def is_trained(self) -> bool:
        return self.weight.requires_grad and torch.is_grad_enabled()

    def ready(self) -> Head:
        """Its weight in the type that the product is computed in, once for many chunks."""
        dtype = operand_dtype(self.weight, self.compute_dtype)
        if self.compute_dtype is None and dtype == self.weight.dtype:
            return self
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        weight = self.weight.detach().to(dtype)
        return dataclasses.replace(self, weight=weight, bias=bias, compute_dtype=None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, V] in float32 or better, whatever the weights are kept in. Call it with autocast off."""
        if self.compute_dtype not in (None, self.weight.dtype):
            return self.ready().logits(hidden)
        raw = product(hidden, self.weight)
        if self.bias is not None:
            raw = raw + self.bias
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        return raw

    def product_gradient(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """d L / d (W h + b) [n, V] from d L / d logits [n, V], in the type of the weight."""
        if self.softcap:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return (gradient * self.scale).to(self.weight.dtype)

    def pull_back(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """d L / d hidden [n, H] from d L / d logits [n, V]."""
        return multiply(self.product_gradient(gradient, logits), self.weight.T).to(gradient.dtype)


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


class _TrainedTokenLogps(torch.autograd.Function):
    """The same values with the gradient of the projection too: 8 n V H products, of which no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        head: Head,
    ) -> torch.Tensor:
        values = []
        ready = head.ready()
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, targets in zip(row_chunks(hidden), row_chunks(labels), strict=True):
                logits = ready.logits(rows)
                partition, _ = log_partition(logits)
                values.append((logits.gather(-1, targets[:, None]) - partition).squeeze(-1))
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.head = head
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        head = dataclasses.replace(ctx.head, weight=weight, bias=bias).ready()
        slopes = []
        of_weight = torch.zeros_like(weight)
        of_bias = None if bias is None else torch.zeros_like(bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, targets, upstream in zip(
                row_chunks(hidden), row_chunks(labels), row_chunks(gradients[0][:, None]), strict=True
            ):
                logits = head.logits(rows)
                _, probabilities = log_partition(logits)
                gradient = probabilities.neg_().mul_(upstream)
                gradient.scatter_add_(-1, targets[:, None], upstream.to(gradient.dtype))
                of_product = head.product_gradient(gradient, logits)
                slopes.append(multiply(of_product, head.weight.T).to(hidden.dtype))
                rows = rows.to(of_product.dtype)
                if of_product.dtype == of_weight.dtype:
                    of_weight.addmm_(of_product.T, rows)
                else:
                    of_weight += of_product.T @ rows
                if of_bias is not None:
                    of_bias += of_product.sum(dim=0)
        return torch.cat(slopes), of_weight, of_bias, None, None


def token_logps(hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> torch.Tensor:
    """log p(label | context) of each completion token: hidden [C, H], labels [C] -> [C], nats."""
    if head.is_trained:
        trained: torch.Tensor = _TrainedTokenLogps.apply(hidden, head.weight, head.bias, labels, head)  # type: ignore[no-untyped-call]
        return trained
    values: torch.Tensor = _TokenLogps.apply(hidden, labels, head.ready())  # type: ignore[no-untyped-call]
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
