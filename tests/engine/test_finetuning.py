"""Full fine-tuning, and a reference that is another model: what starts where, what moves, what is left behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import NewRun, RunFolder
from tests.engine.policies import tiny_data
from training.engine.logps import sum_by_owner, token_logps
from training.engine.policy import Policy

FULL: dict[str, Any] = {"finetuning_type": "full", "learning_rate": 1e-3}


def summed(policy: Policy) -> torch.Tensor:
    """Log-probabilities of the tiny pairs' completions as the policy, or within `reference()` as that."""
    pairs = tiny_data(Path(policy.model.config._name_or_path))
    states = policy.scorer(pairs)
    return sum_by_owner(token_logps(states.hidden, states.labels, policy.head), states.owner, 2 * len(pairs))


def assert_starts_at_ln_2(run: RunFolder) -> None:
    start = run.points("eval")[0]
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert start["eval_kl"] == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> RunFolder:
    from tests.engine.conftest import run_maker

    run = run_maker(tmp_path_factory.mktemp("sft"), tiny_model)(
        "sft", method="sft", max_steps=4, learning_rate=2e-2, num_train_epochs=3
    )
    assert run.train() == 0
    return run


def test_full_fine_tuning_leaves_a_model_that_transformers_loads(new_run: NewRun, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = new_run(num_train_epochs=4, **FULL)
    assert run.train() == 0
    assert_starts_at_ln_2(run)
    result = run.result
    assert result["metrics"]["eval_kl"] > 1e-4
    assert result["metrics"]["eval_loss"] < 0.6
    assert not (run.path / "adapter").exists()
    assert (result["finetuning_type"], result["adapter"]) == ("full", None)
    assert result["num_trainable_parameters"] == result["num_parameters"]
    model, base = (AutoModelForCausalLM.from_pretrained(p) for p in (run.path / "model", tiny_model))
    assert model.config.use_cache
    assert model.config.tie_word_embeddings
    moved = {
        name
        for (name, new), old in zip(model.named_parameters(), base.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert moved == {name for name, _ in model.named_parameters()}
    assert AutoTokenizer.from_pretrained(run.path / "model").chat_template

    again = new_run("again", model_path=str(run.path / "model"), max_steps=1)
    assert again.train() == 0
    assert_starts_at_ln_2(again)
    assert again.points("eval")[0]["eval_logps/chosen"] == pytest.approx(
        result["metrics"]["eval_logps/chosen"], rel=1e-5
    )
