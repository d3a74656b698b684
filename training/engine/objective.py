"""What a run minimises, from its settings: which loss, over which scores, with which share of NLL.

The loss of an optimizer step over N pairs whose chosen answers have T tokens together is
    1/N * sum of the pairs' preference losses + weight / T * sum over chosen tokens of -log p(token)
so the likelihood part is a mean over all chosen tokens of the step: every token counts the same, as in TRL,
however micro-batches cut the step (TRL's own mean there is one of means of micro-batches). SFT has only
that part; ORPO has it with weight 1, on the answer alone (TRL's ORPO also learns the prompt); `rpo_alpha`
adds it to DPO.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from training.contract import Metric, RunConfig
from training.engine.data import BOTH_SIDES, CHOSEN_SIDE, Sides, TokenizedPair
from training.engine.logps import sum_by_owner
from training.engine.losses import LENGTH_NORMALISED, LOSSES, log_odds, odds_ratio_loss, sigmoid_loss
from training.engine.plain import CompletionStates
from training.run_checks import uses_reference

NO_REFERENCE = "No reference is used: this loss does not need one."


@dataclasses.dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a batch of B pairs under the policy and, where there is one, the reference.

    [B] tensors are sums over completion tokens, nats, float64. An SFT row's rejected side has length 0.
    """

    policy_tokens: torch.Tensor  # [C]
    policy_chosen: torch.Tensor  # [B]
    policy_rejected: torch.Tensor
    chosen_lengths: torch.Tensor  # [B] tokens
    rejected_lengths: torch.Tensor
    reference_tokens: torch.Tensor | None = None  # [C]
    reference_chosen: torch.Tensor | None = None  # [B]
    reference_rejected: torch.Tensor | None = None

    @classmethod
    def of(cls, states: CompletionStates, policy: torch.Tensor, reference: torch.Tensor | None) -> PairLogps:
        """From token log-probabilities [C] in the order of `states`."""

        def summed(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            totals = sum_by_owner(values, states.owner, states.num_completions)
            return totals[0::2], totals[1::2]

        lengths = summed(torch.ones_like(policy, requires_grad=False))
        theirs = (None, None) if reference is None else summed(reference)
        return cls(policy, *summed(policy), *lengths, reference, *theirs)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Pure: log-probabilities in, losses and metric values out."""

    config: RunConfig

    @property
    def is_sft(self) -> bool:
        return self.config.method == "sft"

    @property
    def is_orpo(self) -> bool:
        return self.config.method == "orpo"

    @property
    def is_simpo(self) -> bool:
        return self.config.simpo_gamma > 0

    @property
    def sides(self) -> Sides:
        return CHOSEN_SIDE if self.is_sft else BOTH_SIDES

    @property
    def needs_reference(self) -> bool:
        return uses_reference(self.config.method, self.config.simpo_gamma)

    @property
    def by_length(self) -> bool:
        """Whether the scores are means over an answer's tokens, not sums."""
        config = self.config
        asked = config.dpo_normalize_logratios_by_length
        return asked or self.is_simpo or self.is_orpo or config.loss_type in LENGTH_NORMALISED

    @property
    def nll_weight(self) -> float:
        return 1.0 if self.is_sft or self.is_orpo else self.config.rpo_alpha

    @property
    def undefined_metrics(self) -> tuple[str, ...]:
        """Null in every metrics event."""
        if self.is_sft:
            return (
                Metric.REWARDS_CHOSEN, Metric.REWARDS_REJECTED, Metric.REWARDS_MARGINS,
                Metric.REWARDS_ACCURACIES, Metric.LOGPS_REJECTED, Metric.KL,
            )  # fmt: skip
        return () if self.needs_reference else (Metric.KL,)

    def scores(self, logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        """What the loss compares, of the chosen and of the rejected answers, [B] each."""
        chosen, rejected = logps.policy_chosen, logps.policy_rejected
        if self.needs_reference:
            assert logps.reference_chosen is not None and logps.reference_rejected is not None  # noqa: S101
            chosen, rejected = chosen - logps.reference_chosen, rejected - logps.reference_rejected
        if self.by_length:
            chosen, rejected = chosen / logps.chosen_lengths, rejected / logps.rejected_lengths
        return chosen, rejected

    def losses(self, logps: PairLogps, *, tokens_per_pair: float) -> torch.Tensor:
        """[B], whose mean over all pairs of the step (or of an evaluation) is its loss.

        `tokens_per_pair`: chosen tokens of the whole step over its pairs (`mean_chosen_tokens`). A pair's
        NLL is divided by it, so that the mean over pairs is the mean over tokens.
        """
        nll = -logps.policy_chosen / tokens_per_pair
        if self.is_sft:
            return nll
        chosen, rejected = self.scores(logps)
        preference = self._preference(chosen, rejected)
        return preference + self.nll_weight * nll if self.nll_weight else preference

    def _preference(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        config = self.config
        if self.is_orpo:
            return odds_ratio_loss(log_odds(chosen, rejected), beta=config.beta)
        if self.is_simpo:
            return sigmoid_loss(
                chosen, rejected,
                beta=config.beta, label_smoothing=config.label_smoothing, margin=config.simpo_gamma,
            )  # fmt: skip
        loss = LOSSES[config.loss_type]
        return loss(chosen, rejected, beta=config.beta, label_smoothing=config.label_smoothing)

    @torch.no_grad()
    def pair_metrics(self, logps: PairLogps) -> dict[str, torch.Tensor]:
        """Values [B] whose means over pairs are metrics. Accuracy: the share with a margin above 0."""
        if self.is_sft:
            return {Metric.LOGPS_CHOSEN: logps.policy_chosen}
        scores = self.scores(logps)
        chosen, rejected = (self.config.beta * score for score in scores)
        values = {
            Metric.REWARDS_CHOSEN: chosen,
            Metric.REWARDS_REJECTED: rejected,
            Metric.REWARDS_MARGINS: chosen - rejected,
            Metric.REWARDS_ACCURACIES: (chosen - rejected > 0).double(),
            Metric.LOGPS_CHOSEN: logps.policy_chosen,
            Metric.LOGPS_REJECTED: logps.policy_rejected,
        }
        if self.is_orpo:
            odds = log_odds(*scores)
            values[Metric.LOG_ODDS_CHOSEN] = odds
            values[Metric.LOG_ODDS_RATIO] = torch.nn.functional.logsigmoid(odds)
        return values

    @property
    def sentence(self) -> str:
        """For the plan, the result and the model card."""
        config = self.config
        nll = "the negative log-likelihood of the chosen answers, per token"
        if self.is_sft:
            return f"SFT: {nll}."
        if self.is_orpo:
            return f"ORPO: {nll}, and {config.beta:g} times the odds-ratio loss."
        name = f"SimPO with gamma {config.simpo_gamma:g}" if self.is_simpo else f"DPO ({config.loss_type})"
        parts = [f"{name}, beta {config.beta:g}"]
        if config.label_smoothing:
            parts.append(f"label_smoothing {config.label_smoothing:g}")
        if self.by_length:
            ratios = "log-ratios" if self.needs_reference else "log-probabilities"
            parts.append(f"{ratios} divided by the answer's tokens")
        if self.nll_weight:
            parts.append(f"plus {self.nll_weight:g} times {nll}")
        return ", ".join(parts) + "."


def mean_chosen_tokens(pairs: Sequence[TokenizedPair]) -> float:
    return sum(len(pair.chosen) for pair in pairs) / len(pairs)
