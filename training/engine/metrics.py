"""Sums over a window of pairs (an optimizer step, an evaluation) and the metric values they give."""

from __future__ import annotations

import dataclasses

import torch

from training.contract import EVAL_PREFIX, Metric
from training.engine.logps import sampled_kl, sum_by_owner
from training.engine.losses import rewards
from training.engine.plain import CompletionStates


@dataclasses.dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a batch of B pairs under policy and reference."""

    policy_tokens: torch.Tensor  # [C]
    reference_tokens: torch.Tensor  # [C]
    policy_chosen: torch.Tensor  # [B], summed over completion tokens, float64
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor

    @classmethod
    def of(cls, states: CompletionStates, policy: torch.Tensor, reference: torch.Tensor) -> PairLogps:
        ours = sum_by_owner(policy, states.owner, states.num_completions)
        theirs = sum_by_owner(reference, states.owner, states.num_completions)
        return cls(policy, reference, ours[0::2], ours[1::2], theirs[0::2], theirs[1::2])


@dataclasses.dataclass
class Window:
    """Every value is a mean over the pairs of the window (`kl`: over its completion tokens)."""

    beta: float
    num_pairs: int = 0
    kl_tokens: int = 0
    _sums: torch.Tensor | None = None  # on the device, so that adding does not wait for it
    _kl: torch.Tensor | None = None

    _KEYS = (
        Metric.LOSS,
        Metric.REWARDS_CHOSEN,
        Metric.REWARDS_REJECTED,
        Metric.REWARDS_MARGINS,
        Metric.REWARDS_ACCURACIES,
        Metric.LOGPS_CHOSEN,
        Metric.LOGPS_REJECTED,
    )

    @torch.no_grad()
    def add(self, losses: torch.Tensor, logps: PairLogps) -> None:
        """Losses [B] of one micro-batch and its log-probabilities."""
        chosen = rewards(logps.policy_chosen, logps.reference_chosen, beta=self.beta)
        rejected = rewards(logps.policy_rejected, logps.reference_rejected, beta=self.beta)
        margins = chosen - rejected
        columns = (
            losses, chosen, rejected, margins, (margins > 0).double(),
            logps.policy_chosen, logps.policy_rejected,
        )  # fmt: skip
        sums = torch.stack([column.detach().double().sum() for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums
        self.num_pairs += len(losses)

    def add_kl(self, tokens: torch.Tensor) -> None:
        """Divergences [C] of completion tokens, exact or estimated."""
        total = tokens.detach().double().sum()
        self._kl = total if self._kl is None else self._kl + total
        self.kl_tokens += len(tokens)

    def add_sampled_kl(self, logps: PairLogps) -> None:
        self.add_kl(sampled_kl(logps.policy_tokens, logps.reference_tokens))

    def values(self) -> dict[str, float | None]:
        if self._sums is None:
            return {}
        means = (self._sums / self.num_pairs).tolist()
        result: dict[str, float | None] = dict(zip(self._KEYS, means, strict=True))
        if self._kl is not None:
            result[Metric.KL] = float(self._kl) / self.kl_tokens
        return result


def as_evaluation(values: dict[str, float | None]) -> dict[str, float | None]:
    return {EVAL_PREFIX + key: value for key, value in values.items()}
