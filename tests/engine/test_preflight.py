"""The names that are let through before torch is imported are the names that torch's side knows."""

from __future__ import annotations

from training.engine.losses import LOSSES
from training.engine.preflight import LOSS_TYPES


def test_every_loss_that_is_let_through_exists_and_every_loss_is_let_through() -> None:
    assert set(LOSS_TYPES) == set(LOSSES)
