"""Where a run starts: as its own reference."""

from __future__ import annotations

import math

import pytest

from tests.engine.conftest import RunFolder


def assert_starts_at_ln_2(run: RunFolder) -> None:
    """Loss ln 2, margin 0 and divergence 0 at the evaluation before step 1."""
    start = run.points("eval")[0]
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert start["eval_kl"] == pytest.approx(0, abs=1e-6)
