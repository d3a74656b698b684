"""Which evaluation was the best, and whether to stop: decided from metric values alone. Knows no weights.

The weights before step 1 are no candidate: a run that makes everything worse still ends with a trained model,
and says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from training.contract import EVAL_PREFIX, Metric, RunConfig
from training.metric_keys import is_greater_better

Values = dict[str, float | None]
Reason = Literal["early_stopping", "kl_budget"]
EVAL_KL = EVAL_PREFIX + Metric.KL
COIN_TOSS = 0.5  # what an accuracy is worth before step 1, where all margins are rounding


@dataclasses.dataclass
class Best:
    """The best evaluation so far, as JSON in a checkpoint's state."""

    step: int = 0  # 0 = none yet
    judged_step: int = 0  # the last evaluation that was looked at
    judged_by: str = ""  # under another measure it does not count
    without_improvement: int = 0  # evaluations in a row
    evaluation: Values = dataclasses.field(default_factory=dict)
    training: Values = dataclasses.field(default_factory=dict)  # of the training step before it


@dataclasses.dataclass(frozen=True)
class Verdict:
    is_best: bool
    stop: Reason | None = None
    sentence: str = ""  # why it stops


class Stopping:
    """Looks at each evaluation once; looking at the same one again (after a resume) changes nothing."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.metric = config.metric_for_best_model
        greater = config.greater_is_better
        self._greater = is_greater_better(self.metric) if greater is None else greater
        self.measure = f"{self.metric}, {'greater' if self._greater else 'smaller'} is better"

    def judge(self, best: Best, step: int, evaluation: Values, training: Values) -> Verdict:
        """Update `best` with the evaluation at `step` and say what follows."""
        if best.judged_by != self.measure:
            self._forget(best)
        if step == 0:
            return Verdict(is_best=False)
        if step != best.judged_step:
            self._update(best, step, evaluation, training)
        return self._verdict(best, step, evaluation)

    def value(self, evaluation: Mapping[str, float | None]) -> float | None:
        found = evaluation.get(self.metric)
        return found if found is not None and math.isfinite(found) else None

    def is_within_budget(self, evaluation: Mapping[str, float | None]) -> bool:
        """A divergence that is no number is within no budget."""
        if not self._config.kl_budget:
            return True
        kl = evaluation.get(EVAL_KL)
        return kl is not None and kl <= self._config.kl_budget

    def is_worse_than_start(self, best: Best, start: Values) -> bool:
        value = self.value(best.evaluation)
        before = COIN_TOSS if self.metric.endswith(Metric.REWARDS_ACCURACIES) else self.value(start)
        return value is not None and before is not None and self._gain(value, before) < 0

    def _forget(self, best: Best) -> None:
        for field in dataclasses.fields(best):
            setattr(best, field.name, getattr(Best(), field.name))
        best.judged_by = self.measure

    def _update(self, best: Best, step: int, evaluation: Values, training: Values) -> None:
        best.judged_step = step
        gain = self._improvement(best, evaluation)
        best.without_improvement += 1
        if gain > self._config.early_stopping_threshold:
            best.without_improvement = 0
        if gain > 0:
            best.step, best.evaluation, best.training = step, dict(evaluation), dict(training)

    def _improvement(self, best: Best, evaluation: Values) -> float:
        """How much better than the best; infinite for the first, and for the first within the budget."""
        value, before = self.value(evaluation), self.value(best.evaluation)
        if not best.step:
            return math.inf
        inside, was_inside = self.is_within_budget(evaluation), self.is_within_budget(best.evaluation)
        if inside != was_inside:
            return math.inf if inside else -math.inf
        if value is None or before is None:
            return math.inf if before is None and value is not None else -math.inf
        return self._gain(value, before)

    def _gain(self, value: float, before: float) -> float:
        return value - before if self._greater else before - value

    def _verdict(self, best: Best, step: int, evaluation: Values) -> Verdict:
        is_best = best.step == step
        if not self.is_within_budget(evaluation):
            kl = evaluation.get(EVAL_KL)
            said = "is no number" if kl is None else f"is {kl:.4g} nats per token"
            return Verdict(
                is_best,
                "kl_budget",
                f"Stopped at step {step}: {EVAL_KL} {said}, and kl_budget is {self._config.kl_budget:g}.",
            )
        patience = self._config.early_stopping_patience
        if patience and best.without_improvement >= patience:
            times = "evaluation" if best.without_improvement == 1 else "evaluations"
            return Verdict(
                is_best,
                "early_stopping",
                f"Stopped early at step {step}: {self.metric} did not improve in "
                f"{best.without_improvement} {times}.",
            )
        return Verdict(is_best)
