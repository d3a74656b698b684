"""What a training changed on held-out pairs: metrics before the first step and after the last. Pure."""

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


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
