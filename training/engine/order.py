"""Which pairs belong to which step, and which random draws: functions of (seed, step) alone.

Resuming therefore needs no random state and skips no batches: step 11 is the same step whoever computes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math

import torch

from training.contract import RunConfig


def mixed_seed(*parts: int | str) -> int:
    """An independent 63-bit seed for each tuple of parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclasses.dataclass(frozen=True)
class Order:
    """A step holds batch_size * accumulation pairs; the last step of an epoch what is left."""

    num_pairs: int
    batch_size: int
    accumulation: int
    num_epochs: float
    max_steps: int
    seed: int

    @classmethod
    def of(cls, config: RunConfig, num_pairs: int) -> Order:
        return cls(
            num_pairs=num_pairs,
            batch_size=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            num_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            seed=config.seed,
        )

    @property
    def pairs_per_step(self) -> int:
        return self.batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_pairs / self.pairs_per_step)

    @property
    def total_steps(self) -> int:
        wanted = max(1, math.ceil(self.steps_per_epoch * self.num_epochs - 1e-9))
        return min(wanted, self.max_steps) if self.max_steps > 0 else wanted

    def epoch_after(self, step: int) -> float:
        """Passes done when `step` steps are done."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + min(1.0, rest * self.pairs_per_step / self.num_pairs)

    def micro_batches(self, step: int) -> list[list[int]]:
        """Indices of the pairs of step `step` (0-based), `batch_size` at a time."""
        epoch, within = divmod(step, self.steps_per_epoch)
        mine = self._shuffled(epoch)[within * self.pairs_per_step : (within + 1) * self.pairs_per_step]
        return [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]

    def pairs_met(self) -> list[int]:
        """Indices of the pairs of all steps: every one, unless the run ends within its first pass."""
        return sorted(self._shuffled(0)[: self.total_steps * self.pairs_per_step])

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, "order", epoch))
        indices: list[int] = torch.randperm(self.num_pairs, generator=generator).tolist()
        return indices

    def reseed_dropout(self, step: int, micro_step: int) -> None:
        """Before each micro-batch: its dropout masks depend on nothing that came before."""
        torch.manual_seed(mixed_seed(self.seed, "dropout", step, micro_step))
