"""From settings and log-probabilities to the loss of a step: what is compared, what is divided by what."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from training.contract import Metric, RunConfig
from training.engine.metrics import Window
from training.engine.objective import Objective, PairLogps
from training.engine.plain import CompletionStates
from training.run_checks import ConfigError


def config(**settings: Any) -> RunConfig:
    return RunConfig(run_id="t", model_path="m", train_path="t", **settings)


def logps(lengths: list[tuple[int, int]], seed: int = 0, *, reference: bool = True) -> PairLogps:
    """Random token log-probabilities of pairs with these numbers of chosen and rejected tokens."""
    flat = [length for pair in lengths for length in pair]
    owner = torch.repeat_interleave(torch.arange(len(flat)), torch.tensor(flat))
    states = CompletionStates(torch.zeros(len(owner), 1), torch.zeros(len(owner)), owner, len(flat))
    draw = torch.Generator().manual_seed(seed)
    ours, theirs = (-2 * torch.rand(len(owner), generator=draw) for _ in range(2))
    return PairLogps.of(states, ours, theirs if reference else None)


def losses(found: PairLogps, tokens_per_pair: float = 1.0, **settings: Any) -> torch.Tensor:
    return Objective(config(**settings)).losses(found, tokens_per_pair=tokens_per_pair)


def test_sums_and_lengths_belong_to_their_side() -> None:
    found = logps([(3, 1), (2, 4)])
    assert found.chosen_lengths.tolist() == [3, 2]
    assert found.rejected_lengths.tolist() == [1, 4]
    tokens = found.policy_tokens.double()
    assert found.policy_chosen.tolist() == pytest.approx([tokens[:3].sum().item(), tokens[4:6].sum().item()])
    assert found.policy_rejected.tolist() == pytest.approx([tokens[3].item(), tokens[6:].sum().item()])


def test_log_ratios_are_divided_by_their_own_length_when_asked() -> None:
    found = logps([(3, 5)])
    assert found.reference_chosen is not None and found.reference_rejected is not None
    chosen = (found.policy_chosen - found.reference_chosen) / 3
    rejected = (found.policy_rejected - found.reference_rejected) / 5
    expected = math.log1p(math.exp(-0.7 * (chosen - rejected).item()))
    loss = losses(found, beta=0.7, dpo_normalize_logratios_by_length=True)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert losses(found, beta=0.7).item() != pytest.approx(expected, rel=1e-3)
    ipo = losses(found, beta=0.7, loss_type="ipo")
    assert ipo.item() == pytest.approx(((chosen - rejected).item() - 1 / 1.4) ** 2, rel=1e-12)


def test_simpo_looks_at_log_probabilities_per_token_and_at_no_reference() -> None:
    found = logps([(3, 5)])
    margin = 2.5 * (found.policy_chosen / 3 - found.policy_rejected / 5).item() - 0.8
    expected = math.log1p(math.exp(-margin))
    assert losses(found, beta=2.5, simpo_gamma=0.8).item() == pytest.approx(expected, rel=1e-12)
    without = logps([(3, 5)], reference=False)
    assert losses(without, beta=2.5, simpo_gamma=0.8).item() == pytest.approx(expected, rel=1e-12)


def test_orpo_is_nll_and_odds_ratio() -> None:
    found = logps([(3, 5)], reference=False)
    chosen, rejected = found.policy_chosen.item() / 3, found.policy_rejected.item() / 5
    odds = [math.exp(x) / (1 - math.exp(x)) for x in (chosen, rejected)]
    expected = -chosen + 0.2 * math.log1p(odds[1] / odds[0])
    assert losses(found, 3.0, method="orpo", beta=0.2).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "weight"),
    [({"method": "sft"}, 1.0), ({"method": "orpo"}, 1.0), ({"rpo_alpha": 0.7}, 0.7)],
)
def test_nll_counts_every_chosen_token_of_the_step_the_same(settings: dict[str, Any], weight: float) -> None:
    """Two micro-batches with very different lengths: the sum of their shares is one mean over tokens."""
    parts = [logps([(2, 3), (1, 4)], seed=1), logps([(30, 2)], seed=2)]
    shares = torch.cat([losses(part, 33 / 3, **settings) for part in parts])
    without = Objective(config(**settings))
    preference = [
        torch.zeros(1) if without.is_sft else without._preference(*without.scores(part)) for part in parts
    ]
    mean_preference = sum(p.sum().item() for p in preference) / 3
    nll = -sum(part.policy_chosen.sum().item() for part in parts) / 33
    assert shares.mean().item() == pytest.approx(mean_preference + weight * nll, rel=1e-12)

    window = Window(without)
    for part in parts:
        window.add(losses(part, 33 / 3, **settings), part)
    values = window.values()
    assert values[Metric.LOSS] == pytest.approx(shares.mean().item(), rel=1e-12)
    assert values[Metric.NLL_LOSS] == pytest.approx(nll, rel=1e-12)


def test_rewards_are_beta_times_what_the_loss_compares() -> None:
    found = logps([(3, 5), (4, 2)])
    for settings in ({}, {"loss_type": "ipo"}, {"simpo_gamma": 0.5}, {"method": "orpo"}):
        objective = Objective(config(beta=0.3, **settings))
        values = objective.pair_metrics(found)
        chosen, rejected = objective.scores(found)
        torch.testing.assert_close(values[Metric.REWARDS_MARGINS], 0.3 * (chosen - rejected))
        assert values[Metric.REWARDS_ACCURACIES].tolist() == (chosen > rejected).double().tolist()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "sft", "loss_type": "ipo"}, "loss_type belong to the method dpo"),
        ({"method": "orpo", "rpo_alpha": 0.5, "simpo_gamma": 1.0}, "rpo_alpha and simpo_gamma belong"),
        ({"method": "sft", "dpo_normalize_logratios_by_length": True}, "belong to the method dpo"),
        ({"method": "orpo", "label_smoothing": 0.1}, "belong to the method dpo"),
        ({"simpo_gamma": 0.5, "loss_type": "hinge"}, "simpo_gamma is a margin inside the loss_type sigmoid"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "ipo has no label_smoothing"),
        ({"loss_type": "exo_pair"}, "exo_pair needs a label_smoothing above 0"),
        ({"rpo_alpha": -1.0}, "rpo_alpha must be 0 or a number above it"),
        ({"simpo_gamma": math.nan}, "simpo_gamma must be 0 or a number above it"),
        ({"rpo_alpha": math.inf}, "rpo_alpha must be 0 or a number above it"),
        ({"label_smoothing": 0.5}, "label_smoothing must be from"),
        ({"dpo_normalize_logratios_by_length": "no"}, "must be true or false"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "DPO (sigmoid), beta 0.1."),
        (
            {"rpo_alpha": 0.5, "label_smoothing": 0.1, "dpo_normalize_logratios_by_length": True},
            "DPO (sigmoid), beta 0.1, label_smoothing 0.1, log-ratios divided by the answer's tokens, plus 0.5 "
            "times the negative log-likelihood of the chosen answers, per token.",
        ),
        (
            {"simpo_gamma": 1.0, "beta": 2.0},
            "SimPO with gamma 1, beta 2, log-probabilities divided by the answer's tokens.",
        ),
        ({"method": "sft"}, "SFT: the negative log-likelihood of the chosen answers, per token."),
        (
            {"method": "orpo"},
            "ORPO: the negative log-likelihood of the chosen answers, per token, and 0.1 times the odds-ratio "
            "loss.",
        ),
    ],
)
def test_the_sentence_says_what_is_minimised(settings: dict[str, Any], sentence: str) -> None:
    assert Objective(config(**settings)).sentence == sentence
