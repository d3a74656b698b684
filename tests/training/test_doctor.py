"""Each rule with a curve that triggers it and one that does not."""

from __future__ import annotations

import random

import pytest

from training.monitor.doctor import Finding, read_curves
from training.monitor.series import Curves

STEPS = 100


def falling(
    start: float, end: float, *, steps: int = STEPS, noise: float = 0.03
) -> list[tuple[int, float | None]]:
    draw = random.Random(7)
    return [(n, start + (end - start) * n / steps + draw.gauss(0, noise)) for n in range(1, steps + 1)]


def healthy() -> Curves:
    draw = random.Random(11)
    return {
        "loss": falling(0.69, 0.35),
        "rewards/accuracies": falling(0.5, 0.85),
        "rewards/margins": falling(0.0, 1.2),
        "grad_norm": [(n, 2 + draw.random()) for n in range(1, STEPS + 1)],
        "logps/chosen": falling(-120, -118),
        "kl": falling(0.0, 0.05, noise=0.002),
        "eval_loss": [(0, 0.693), (25, 0.62), (50, 0.55), (75, 0.5), (100, 0.46)],
        "eval_logps/chosen": [(0, -120.0), (50, -119.0), (100, -121.0)],
        "eval_kl": [(0, 0.0), (50, 0.02), (100, 0.04)],
    }


def read(curves: Curves, *, total_steps: int = STEPS, running: bool = True) -> dict[str, Finding]:
    return {
        finding.code: finding for finding in read_curves(curves, total_steps=total_steps, running=running)
    }


def test_both_losses_falling_is_learning_well_and_nothing_else_is_said() -> None:
    found = read(healthy())
    assert set(found) == {"learning"}
    assert "Both losses decrease steadily" in found["learning"].text
    assert found["learning"].action == "Continue training."


def test_after_the_end_nobody_is_told_to_continue_and_a_model_is_tried_only_when_there_is_one() -> None:
    def ended(*, kept: bool) -> Finding:
        return read_curves(healthy(), total_steps=STEPS, running=False, kept=kept)[0]

    assert "beside its base" in ended(kept=True).action
    assert "No model of this run is kept" in ended(kept=False).action
    assert "Continue" not in ended(kept=True).action


def test_training_falls_and_validation_rises_is_overfitting_with_the_offer_to_stop() -> None:
    curves = healthy() | {"eval_loss": [(0, 0.693), (25, 0.55), (50, 0.52), (75, 0.58), (100, 0.66)]}
    finding = read(curves)["overfitting"]
    assert "step 50" in finding.text
    assert finding.action.startswith("Stop training and use the current model")
    assert finding.offer == "stop"
    assert read(curves, running=False)["overfitting"].offer == ""


def test_a_small_wobble_of_validation_loss_is_not_overfitting() -> None:
    curves = healthy() | {"eval_loss": [(0, 0.693), (25, 0.6), (50, 0.5), (75, 0.505), (100, 0.502)]}
    assert "overfitting" not in read(curves)


def test_both_losses_high_or_rising_asks_to_review_dataset_and_parameters() -> None:
    curves = healthy() | {
        "loss": falling(0.72, 0.95, noise=0.05),
        "rewards/margins": falling(0, -0.6),
        "eval_loss": [(0, 0.693), (25, 0.74), (50, 0.8), (75, 0.84), (100, 0.9)],
    }
    finding = read(curves)["high"]
    assert "Review your dataset" in finding.action
    assert "parameters" in finding.action


@pytest.mark.parametrize("seen", [0, 3, 7])
def test_with_a_few_points_it_says_that_it_is_too_early(seen: int) -> None:
    curves = {"loss": healthy()["loss"][:seen], "eval_loss": [(0, 0.693)]}
    found = read(curves)
    assert set(found) == {"too-early"}
    assert found["too-early"].severity == "info"


def test_two_evaluations_are_not_enough_while_running() -> None:
    curves = healthy() | {"eval_loss": [(0, 0.693), (25, 0.6)]}
    assert "2 evaluations so far" in read(curves)["too-early"].text


def test_without_validation_it_does_not_claim_that_the_model_learns_well() -> None:
    curves = {"loss": healthy()["loss"]}
    found = read(curves)
    assert set(found) == {"train-falls"}
    assert "Hold out" in found["train-falls"].action


def test_a_flat_tail_is_levelled_off() -> None:
    curves = healthy() | {
        "eval_loss": [
            (0, 0.69),
            (10, 0.55),
            (20, 0.5),
            (30, 0.47),
            (40, 0.47),
            (50, 0.469),
            (60, 0.47),
            (70, 0.469),
        ]
    }
    assert read(curves)["levelled"].offer == "stop"


def test_chosen_falling_far_is_likelihood_displacement() -> None:
    curves = healthy() | {"eval_logps/chosen": [(0, -120.0), (50, -150.0), (100, -190.0)]}
    finding = read(curves)["displacement"]
    assert "-120 to -190" in finding.text
    assert finding.severity == "bad"


def test_displacement_is_seen_in_training_points_when_there_is_no_validation() -> None:
    curves = {"loss": healthy()["loss"], "logps/chosen": falling(-100, -140, noise=1)}
    assert "displacement" in read(curves)


def test_chosen_falling_a_little_is_not_displacement() -> None:
    curves = healthy() | {"eval_logps/chosen": [(0, -120.0), (100, -131.0)]}
    assert "displacement" not in read(curves)


def trivial() -> Curves:
    return healthy() | {
        "loss": [(n, 0.69 if n < 4 else 0.005) for n in range(1, STEPS + 1)],
        "rewards/accuracies": [(n, 0.6 if n < 4 else 1.0) for n in range(1, STEPS + 1)],
    }


def test_loss_zero_and_accuracy_one_at_once_means_trivial_pairs() -> None:
    assert "Look at the pairs" in read(trivial())["trivial"].action


def test_the_same_values_late_in_a_run_are_not_trivial() -> None:
    curves = healthy() | {
        "loss": [(n, 0.69 if n < 70 else 0.005) for n in range(1, STEPS + 1)],
        "rewards/accuracies": [(n, 0.6 if n < 70 else 1.0) for n in range(1, STEPS + 1)],
    }
    assert "trivial" not in read(curves)


def stuck() -> Curves:
    return {
        "loss": falling(0.6931, 0.6925, noise=0.002),
        "rewards/margins": falling(0, 0.001, noise=0.002),
        "eval_loss": [(0, 0.6931), (25, 0.6931), (50, 0.693), (75, 0.693), (100, 0.6929)],
    }


def test_a_loss_that_stays_at_ln_2_is_stuck_and_said_once() -> None:
    found = read(stuck())
    assert set(found) == {"stuck"}
    assert "Raise learning_rate" in found["stuck"].action


def test_stuck_is_not_said_in_the_first_steps() -> None:
    curves = {"loss": stuck()["loss"][:20]}
    assert "stuck" not in read(curves)


def test_a_loss_near_ln_2_with_moving_margins_is_not_stuck() -> None:
    assert "stuck" not in read(stuck() | {"rewards/margins": falling(0, 3.0, noise=0.5)})


@pytest.mark.parametrize(("kl", "severity"), [(0.5, "warning"), (1.5, "bad")])
def test_a_large_divergence_is_told_with_its_figure(kl: float, severity: str) -> None:
    finding = read(healthy() | {"eval_kl": [(0, 0.0), (100, kl)]})["kl"]
    assert f"{kl:.2f} nats per token (exact" in finding.text
    assert finding.severity == severity


def test_the_estimate_is_used_and_named_when_there_is_no_exact_divergence() -> None:
    curves = healthy() | {"kl": falling(0, 0.8, noise=0.01)}
    del curves["eval_kl"]
    assert "an estimate on training tokens" in read(curves)["kl"].text


def test_gradient_spikes_are_counted() -> None:
    curves = healthy()
    curves["grad_norm"] = [(n, 90.0 if n in {60, 70, 80} else value) for n, value in curves["grad_norm"]]
    finding = read(curves)["spikes"]
    assert finding.text.startswith("3 of the last 100 steps")
    assert finding.severity == "warning"


def test_an_ordinary_gradient_has_no_spikes() -> None:
    assert "spikes" not in read(healthy())


def test_a_loss_that_is_no_number_is_said_first() -> None:
    curves = healthy()
    curves["loss"] = [*curves["loss"][:-1], (STEPS, None)]
    assert read_curves(curves, total_steps=STEPS, running=True)[0].code == "not-a-number"
