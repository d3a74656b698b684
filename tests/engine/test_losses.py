"""Each loss at values worked out by hand: h = beta * (chosen - rejected) = 0.5 * (2 - -3) = 2.5."""

from __future__ import annotations

import math

import pytest
import torch

from training.engine.losses import LOSSES, log1mexp, log_odds, odds_ratio_loss, sigmoid_loss
from training.engine.preflight import LOSS_TYPES

CHOSEN, REJECTED, BETA = 2.0, -3.0, 0.5


def tensors(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def value(name: str, smoothing: float = 0.0, chosen: float = CHOSEN, rejected: float = REJECTED) -> float:
    loss = LOSSES[name](tensors(chosen), tensors(rejected), beta=BETA, label_smoothing=smoothing)
    return loss.item()


AGREE, DISAGREE = math.log1p(math.exp(-2.5)), math.log1p(math.exp(2.5))  # -log sigmoid(h), -log sigmoid(-h)
BY_HAND = {
    ("sigmoid", 0.0): AGREE,
    ("sigmoid", 0.1): 0.9 * AGREE + 0.1 * DISAGREE,
    ("robust", 0.0): AGREE,
    ("robust", 0.1): (0.9 * AGREE - 0.1 * DISAGREE) / 0.8,
    ("ipo", 0.0): (5 - 1) ** 2,
    ("hinge", 0.0): 0.0,
    ("exo_pair", 0.1): sigmoid(2.5) * math.log(sigmoid(2.5) / 0.9)
    + sigmoid(-2.5) * math.log(sigmoid(-2.5) / 0.1),
    ("apo_zero", 0.0): 1 - sigmoid(1) + sigmoid(-1.5),
    ("apo_down", 0.0): sigmoid(1) + 1 - sigmoid(2.5),
    ("nca_pair", 0.0): -math.log(sigmoid(1)) - 0.5 * math.log(sigmoid(-1)) - 0.5 * math.log(sigmoid(1.5)),
    ("sppo_hard", 0.0): (2 - 1) ** 2 + (-3 + 1) ** 2,
}


@pytest.mark.parametrize(("name", "smoothing"), BY_HAND)
def test_hand_derived_values(name: str, smoothing: float) -> None:
    assert value(name, smoothing) == pytest.approx(BY_HAND[name, smoothing], rel=1e-12, abs=1e-12)


def test_the_hinge_where_it_is_not_flat() -> None:
    assert value("hinge", chosen=-3.0, rejected=2.0) == 1 + 2.5


AT_START = {
    "sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 1.0, "apo_zero": 1.0, "apo_down": 1.0,
    "exo_pair": 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2),
    "nca_pair": 2 * math.log(2), "sppo_hard": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_where_policy_and_reference_are_equal(name: str) -> None:
    smoothing = 0.2 if name in ("robust", "exo_pair") else 0.0
    assert value(name, smoothing, 0.0, 0.0) == pytest.approx(AT_START[name], rel=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "exo_pair", "nca_pair", "apo_zero", "apo_down", "robust"])
def test_a_gradient_step_from_the_start_widens_the_margin(name: str) -> None:
    scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    smoothing = 0.1 if name in ("exo_pair", "robust") else 0.0
    LOSSES[name](scores[:1], scores[1:], beta=0.1, label_smoothing=smoothing).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0] < scores.grad[1]


def test_robust_is_without_bias_under_flipped_labels() -> None:
    """With a share eps of the labels flipped, its mean is DPO's loss on the true ones."""
    mean = 0.7 * value("robust", 0.3) + 0.3 * value("robust", 0.3, REJECTED, CHOSEN)
    assert mean == pytest.approx(value("sigmoid"), rel=1e-12)


def test_simpo_subtracts_gamma_from_the_margin_unscaled() -> None:
    loss = sigmoid_loss(tensors(-0.5), tensors(-1.5), beta=2.0, label_smoothing=0.0, margin=0.6)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(2.0 * 1.0 - 0.6))), rel=1e-12)


def test_the_loss_falls_as_the_margin_grows() -> None:
    margins = torch.linspace(-50, 50, 101, dtype=torch.float64)
    losses = LOSSES["sigmoid"](margins, torch.zeros_like(margins), beta=0.3, label_smoothing=0.0)
    assert bool((losses.diff() < 0).all())


@pytest.mark.parametrize("name", ["sigmoid", "robust", "exo_pair", "nca_pair", "hinge"])
def test_extreme_margins_stay_finite(name: str) -> None:
    far = tensors(1e5, -1e5).requires_grad_()
    smoothing = 0.1 if name == "exo_pair" else 0.0
    loss = LOSSES[name](far, tensors(0, 0), beta=1.0, label_smoothing=smoothing)
    loss.sum().backward()
    assert far.grad is not None
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(far.grad).all())


def test_log_odds_by_hand() -> None:
    # p = 0.5: odds 1; p = 0.2: odds 0.25; ratio 4
    odds = log_odds(tensors(math.log(0.5)), tensors(math.log(0.2)))
    assert odds.item() == pytest.approx(math.log(4), rel=1e-12)
    assert odds_ratio_loss(odds, beta=0.3).item() == pytest.approx(0.3 * math.log(1.25), rel=1e-12)


def test_log_odds_of_certain_and_of_hopeless_answers_have_finite_gradients() -> None:
    chosen = tensors(0.0, -1e-12, -1e-6, -500.0).requires_grad_()
    rejected = tensors(-500.0, -1.0, 0.0, -1e-9).requires_grad_()
    odds_ratio_loss(log_odds(chosen, rejected), beta=0.1).sum().backward()
    for tensor in (chosen, rejected):
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())


def test_log_of_one_minus_exp_on_both_branches() -> None:
    for x in (-1e-9, -0.1, -0.69, -0.7, -5.0, -40.0):
        assert log1mexp(tensors(x)).item() == pytest.approx(math.log(-math.expm1(x)), rel=1e-12)


def test_every_loss_that_is_accepted_exists() -> None:
    assert set(LOSS_TYPES) == set(LOSSES)
