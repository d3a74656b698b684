"""The DPO loss by hand."""

from __future__ import annotations

import math

import pytest
import torch

from training.engine.losses import LOSSES, rewards
from training.engine.preflight import LOSS_TYPES


def tensors(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_policy_equal_to_reference_gives_ln_2_and_no_margin() -> None:
    chosen, rejected = tensors(-10.0, -3.0), tensors(-12.0, -1.0)
    loss = LOSSES["sigmoid"](chosen, rejected, chosen, rejected, beta=0.1, label_smoothing=0.0)
    assert loss.tolist() == [math.log(2)] * 2
    assert rewards(chosen, chosen, beta=0.1).tolist() == [0.0, 0.0]


def test_hand_derived_values() -> None:
    # h = 0.5 * ((-8 + 10) - (-15 + 12)) = 2.5
    arguments = (tensors(-8), tensors(-15), tensors(-10), tensors(-12))
    loss = LOSSES["sigmoid"](*arguments, beta=0.5, label_smoothing=0.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.5)))
    smoothed = LOSSES["sigmoid"](*arguments, beta=0.5, label_smoothing=0.1)
    expected = 0.9 * math.log1p(math.exp(-2.5)) + 0.1 * math.log1p(math.exp(2.5))
    assert smoothed.item() == pytest.approx(expected)


def test_the_loss_falls_as_the_margin_grows() -> None:
    margins = torch.linspace(-50, 50, 101, dtype=torch.float64)
    zero = torch.zeros_like(margins)
    losses = LOSSES["sigmoid"](margins, zero, zero, zero, beta=0.3, label_smoothing=0.0)
    assert bool((losses.diff() < 0).all())


def test_extreme_margins_stay_finite() -> None:
    far, zero = tensors(1e5, -1e5), tensors(0, 0)
    loss = LOSSES["sigmoid"](far, zero, zero, zero, beta=1.0, label_smoothing=0.0)
    assert loss.tolist() == [0.0, 1e5]


def test_every_loss_that_is_accepted_exists() -> None:
    assert set(LOSS_TYPES) == set(LOSSES)
