"""A reference that is another model than the one that training starts from."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import NewRun, RunFolder, run_maker
from tests.engine.interruptions import LeaveAt
from tests.engine.policies import tiny_data
from tests.tiny import build_tiny_model
from training.contract import ConfigError, ExitCode


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another architecture's shape, the same tokens."""
    return build_tiny_model(tmp_path_factory.mktemp("other") / "bigger", hidden_size=48, seed=5)


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> RunFolder:
    run = run_maker(tmp_path_factory.mktemp("sft"), tiny_model)("sft", method="sft", learning_rate=2e-2)
    assert run.train() == 0
    return run


def by_hand(model_path: Path, adapter: Path | None = None) -> list[torch.Tensor]:
    """Log-probabilities [L, V] of each completion of the held-out pairs, from the model's own logits, float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    found = []
    with torch.no_grad():
        for pair in tiny_data(model_path, 4):
            for side in (pair.chosen, pair.rejected):
                ids = torch.tensor([[*pair.prompt.tolist(), *side.tolist()]])
                start = len(pair.prompt) - 1
                found.append(model(ids).logits[0, start : start + len(side)].double().log_softmax(-1))
    return found


def expected_at_start(
    policy: list[torch.Tensor], reference: list[torch.Tensor], data: Path
) -> tuple[float, float]:
    """DPO's loss with beta 0.1, and the exact divergence per completion token."""
    sides = [side for pair in tiny_data(data, 4) for side in (pair.chosen, pair.rejected)]
    ratios, divergence = [], []
    for ours, theirs, side in zip(policy, reference, sides, strict=True):
        labels = torch.tensor(side.tolist())[:, None]
        ratios.append((ours.gather(-1, labels) - theirs.gather(-1, labels)).sum().item())
        divergence.append((ours.exp() * (ours - theirs)).sum(-1))
    losses = [math.log1p(math.exp(-0.1 * (c - r))) for c, r in zip(ratios[::2], ratios[1::2], strict=True)]
    return sum(losses) / len(losses), torch.cat(divergence).mean().item()


CASES = {
    "another model": lambda other, sft: ({"reference_model_path": other}, (other, None)),
    "an adapter": lambda other, sft: ({"reference_adapter_path": sft}, (None, sft)),
    "the bare base of an adapter that is continued": lambda other, sft: (
        {"adapter_path": sft, "reference_model_path": "BASE"}, (None, None)
    ),
    "an adapter, under full fine-tuning": lambda other, sft: (
        {"reference_adapter_path": sft, "finetuning_type": "full"}, (None, sft)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_first_evaluation_is_that_of_plain_logits(
    new_run: NewRun, tiny_model: Path, other_model: Path, sft_run: RunFolder, case: str
) -> None:
    sft = sft_run.path / "adapter"
    settings, (model, adapter) = CASES[case](other_model, sft)
    settings = {key: str(tiny_model if value == "BASE" else value) for key, value in settings.items()}
    run = new_run(max_steps=1, **settings)
    assert run.train() == 0
    policy = by_hand(tiny_model, sft if "adapter_path" in settings else None)
    loss, divergence = expected_at_start(policy, by_hand(model or tiny_model, adapter), tiny_model)
    start = run.points("eval")[0]
    assert abs(loss - math.log(2)) > 1e-3
    assert start["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert start["eval_kl"] == pytest.approx(divergence, rel=1e-4)
    result = run.result
    assert result["reference_sha256"] != result["weights_sha256"]
    sentence = {
        "another model": "The reference is bigger.",
        "the bare base of an adapter that is continued": "The reference is model.",
    }
    assert result["reference"] == sentence.get(case, "The reference is model with the adapter adapter.")


@pytest.mark.slow
def test_another_reference_has_its_own_place_in_the_cache_and_its_own_checkpoints(
    new_run: NewRun, other_model: Path
) -> None:
    first = new_run("first", max_steps=4)
    assert first.train(LeaveAt(first, 2)) == ExitCode.INTERRUPTED
    cache = Path(first.config.reference_cache_dir)
    assert len(list(cache.iterdir())) == 1
    settings: dict[str, Any] = {"max_steps": 4, "reference_model_path": str(other_model)}
    second = new_run("second", resume_from=str(first.path / "checkpoints/step-000002"), **settings)
    assert second.train() == 0
    assert "belongs to other settings, data or weights" in second.texts()
    assert len(list(cache.iterdir())) == 2
    again = new_run("again", **settings)
    assert again.train() == 0
    assert (
        again.result["adapter_sha256"]
        == second.result["adapter_sha256"]
        != first.result.get("adapter_sha256")
    )
    progress = [event["done"] for event in again.events if event.get("phase") == "reference"]
    assert progress[-1] == progress[1]  # all of it was in the cache


def test_a_reference_of_another_vocabulary_is_refused_before_the_pass(
    new_run: NewRun, other_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tokens = Path(shutil.copytree(other_model, tmp_path / "tokens"))
    text = json.loads((tokens / "tokenizer.json").read_text())
    names = text["model"]["vocab"]
    names["Ġ"], names["!"] = names["!"], names["Ġ"]
    (tokens / "tokenizer.json").write_text(json.dumps(text))
    run = new_run(reference_model_path=str(tokens))
    assert run.train() == ExitCode.REFUSED
    assert run.result["error"] == f"The reference {tokens} has another vocabulary than the base model."
    assert "reference" not in {event.get("phase") for event in run.events}
    wide = Path(shutil.copytree(other_model, tmp_path / "wide"))
    model = AutoModelForCausalLM.from_pretrained(other_model)
    model.resize_token_embeddings(264)  # padded rows: another vocabulary to diverge over
    model.save_pretrained(wide)
    run = new_run("wide-run", reference_model_path=str(wide))
    assert run.train() == ExitCode.REFUSED
    assert run.result["error"] == f"The reference {wide} has another vocabulary than the base model."
    missing = new_run("missing", reference_model_path=str(tmp_path / "nowhere"))
    assert missing.train() == ExitCode.REFUSED
    assert "The folder of reference_model_path is not there" in missing.result["error"]


@pytest.mark.parametrize("settings", [{"method": "sft"}, {"method": "orpo"}, {"simpo_gamma": 0.5}])
def test_a_reference_that_no_loss_looks_at_is_refused(new_run: NewRun, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="This loss uses no reference"):
        new_run(reference_model_path="x", **settings)
