"""What a training changed on held-out pairs: metrics before the first step and of the model that is kept. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from training.contract import EVAL_PREFIX, Metric

# Key without its prefix, what the page calls it, and which way is better: 1 up, -1 down, 0 neither.
COMPARED: tuple[tuple[str, str, int], ...] = (
    (Metric.REWARDS_ACCURACIES, "DPO accuracy", 1),
    (Metric.REWARDS_MARGINS, "Reward margin", 1),
    (Metric.LOSS, "Validation loss", -1),
    (Metric.REWARDS_CHOSEN, "Reward, chosen", 1),
    (Metric.REWARDS_REJECTED, "Reward, rejected", -1),
    (Metric.KL, "KL divergence, nats per token", 0),
    (Metric.LOGPS_CHOSEN, "Log-probability, chosen", 0),
    (Metric.LOGPS_REJECTED, "Log-probability, rejected", 0),
)


# Before the first step the model is its own reference: every margin is 0 but for rounding, and the share of those
# above 0 says nothing. What the accuracy after is compared with is a coin toss.
COIN_TOSS = 0.5


@dataclasses.dataclass(frozen=True)
class MetricChange:
    key: str
    label: str
    before: float | None
    after: float | None
    better: int

    @property
    def before_text(self) -> str:
        return self._text(self.before)

    @property
    def after_text(self) -> str:
        return self._text(self.after)

    @property
    def verdict(self) -> str:
        """ "better", "worse", or "" when it did not move or neither way is better."""
        start = COIN_TOSS if self.is_accuracy else self.before
        if start is None or self.after is None or self.better == 0 or self.after == start:
            return ""
        return "better" if (self.after > start) == (self.better > 0) else "worse"

    @property
    def is_accuracy(self) -> bool:
        return self.key.endswith(Metric.REWARDS_ACCURACIES)

    def _text(self, value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:.1%}" if self.is_accuracy else f"{value:.4g}"


def changes(result: Mapping[str, Any]) -> list[MetricChange]:
    """From the engine's result; empty when the run had no validation data."""
    before, after = result.get("initial_metrics") or {}, result.get("metrics") or {}
    found = []
    for key, label, better in COMPARED:
        name = EVAL_PREFIX + key
        first = None if key == Metric.REWARDS_ACCURACIES else _finite(before.get(name))
        change = MetricChange(name, label, first, _finite(after.get(name)), better)
        if change.before is not None or change.after is not None:
            found.append(change)
    return found


def kept_sentence(result: Mapping[str, Any]) -> str:
    """Which step's model is offered, where it is not simply the last."""
    step, last, best = (result.get(key) for key in ("model_step", "step", "best_step"))
    if best is None or step is None:
        return ""
    metric = result.get("metric_for_best_model")
    value = _finite(result.get("best_metric"))
    why = f" ({metric} {value:.4g})" if metric and value is not None else ""
    if step != best:
        return f"The best evaluation was at step {best}{why}; the model of step {step} is kept."
    if step == last:
        return f"The last evaluation, at step {step}, was the best{why}: that model is kept."
    return f"The best evaluation was at step {step}{why}: that model is kept."


def stopped_sentence(result: Mapping[str, Any]) -> str:
    """Why the run ended before its last step by itself."""
    ended = f"at step {result.get('step')} of {result.get('total_steps')}"
    reasons = {
        "early_stopping": f"It stopped early {ended}, because evaluations no longer improved.",
        "kl_budget": f"It stopped {ended}, because the model had moved from its reference as far as kl_budget allows.",
    }
    return reasons.get(str(result.get("stopped_by")), "")


def measured_after(result: Mapping[str, Any]) -> str:
    """After what the second column was measured: "after step 40"."""
    step = result.get("model_step")
    return (
        f"after step {step}, whose model is kept" if step and step != result.get("step") else "after the last"
    )


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
