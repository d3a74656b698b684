"""Full fine-tuning: what starts where, what moves, what is compared with, what is left behind."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import NewRun
from tests.engine.interruptions import LeaveAt
from tests.engine.policies import summed, tiny_config, tiny_data, tiny_policy
from tests.engine.starts import assert_starts_at_ln_2
from training.contract import ConfigError, ExitCode
from training.engine import RefusedError, merge, reference_model
from training.engine.adapters import POLICY
from training.engine.fused import fuse
from training.engine.logps import token_logps
from training.engine.loop import decayed
from training.engine.objective import Objective, PairLogps

FULL: dict[str, Any] = {"finetuning_type": "full", "learning_rate": 1e-3}


def test_full_fine_tuning_leaves_a_model_that_transformers_loads(new_run: NewRun, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = new_run(num_train_epochs=4, **FULL)
    assert run.train() == 0
    assert "high where all weights are trained" in run.texts()
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
    assert "all weights" not in again.texts()
    assert_starts_at_ln_2(again)
    assert again.points("eval")[0]["eval_logps/chosen"] == pytest.approx(
        result["metrics"]["eval_logps/chosen"], rel=1e-5
    )


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_of_all_weights_is_that_of_plain_autograd_in_float64(
    tiny_model: Path, packed: bool
) -> None:
    """The whole path, tied embeddings included; the policy is moved, so that it differs from its reference."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(tiny_model, beta=0.3, lora_dropout=0.05, **FULL)
    policy = tiny_policy(config, packed=packed, bent=False)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in policy.trainable.values():
            tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.02)
    fuse(policy.model, POLICY)  # as a run does: what is trained must not be taken for frozen
    pairs = tiny_data(tiny_model)
    states = policy.scorer(pairs)
    tokens = token_logps(states.hidden, states.labels, policy.head)
    with policy.reference():
        before = policy.scorer(pairs)
        theirs = token_logps(before.hidden, before.labels, policy.head)
    losses = Objective(config).losses(PairLogps.of(states, tokens, theirs), tokens_per_pair=1.0)
    losses.mean().backward()

    model, base = (AutoModelForCausalLM.from_pretrained(tiny_model).double() for _ in range(2))
    model.load_state_dict({name: tensor.double() for name, tensor in policy.model.state_dict().items()})

    def plain(scored: Any, pair: Any, side: Any) -> torch.Tensor:
        ids = torch.tensor([[*pair.prompt.tolist(), *side.tolist()]])
        rows = torch.arange(len(side)) + len(pair.prompt) - 1
        logps: torch.Tensor = scored(ids).logits[0].log_softmax(-1)[rows, torch.tensor(side.tolist())].sum()
        return logps

    expected = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        chosen, rejected = (
            plain(model, pair, side) - plain(base, pair, side).detach()
            for side in (pair.chosen, pair.rejected)
        )
        expected = expected - torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)) / len(pairs)
    expected.backward()
    assert abs(expected.item() - math.log(2)) > 1e-2
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    slopes = dict(model.named_parameters())
    assert set(slopes) == set(policy.trainable)
    for name, tensor in policy.trainable.items():
        exact, ours = slopes[name].grad, tensor.grad
        assert exact is not None and ours is not None
        assert ((ours - exact).norm() / exact.norm()).item() < 1e-4, name


@pytest.mark.slow
def test_full_fine_tuning_resumes_bit_for_bit(new_run: NewRun) -> None:
    settings = FULL | {"num_train_epochs": 2, "eval_steps": 3}
    undisturbed, run = new_run("undisturbed", **settings), new_run("interrupted", **settings)
    assert undisturbed.train() == 0
    assert run.train(LeaveAt(run, 5)) == ExitCode.INTERRUPTED
    assert run.train() == 0
    assert "Continued from the checkpoint of step 5." in run.texts()
    assert run.result["model_sha256"] == undisturbed.result["model_sha256"]
    assert run.points("train") == undisturbed.points("train")
    assert run.points("eval") == undisturbed.points("eval")


def test_a_reference_that_gave_up_its_memory_gives_the_same_numbers(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    real = reference_model.SeparateReference.get

    def counted(self: Any) -> Any:
        loads.append(not self.is_loaded)
        return real(self)

    monkeypatch.setattr(reference_model.SeparateReference, "get", counted)
    runs, counts = [], []
    for name, free in (("kept", 10**15), ("given-up", 0)):
        monkeypatch.setattr(reference_model, "free_memory", lambda device, free=free: free)
        run = new_run(name, eval_steps=2, reference_cache_dir="", **FULL)
        assert run.train() == 0
        runs.append(run)
        counts.append(sum(loads))
        loads.clear()
    assert counts[0] == 1
    assert counts[1] > 1
    assert runs[0].points("eval") == runs[1].points("eval")
    assert runs[0].result["model_sha256"] == runs[1].result["model_sha256"]


def test_the_reference_does_not_move_with_the_policy(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_config(tiny_model, lora_dropout=0.05, **FULL), bent=False)
    with policy.reference():
        before = summed(policy, tiny_data(tiny_model))
    own = policy.model
    with torch.no_grad():
        for tensor in policy.trainable.values():
            tensor.mul_(1.05)
    with policy.reference():
        assert policy.model is not own
        torch.testing.assert_close(summed(policy, tiny_data(tiny_model)), before, rtol=0, atol=0)
    assert policy.model is own
    with policy.inference():
        assert not torch.allclose(summed(policy, tiny_data(tiny_model)), before, atol=0.1)


@pytest.mark.slow
def test_a_chain_of_full_fine_tuning_goes_through_adapters_models_and_checkpoints(new_run: NewRun) -> None:
    """SFT of an adapter, DPO of all weights on it, DPO from that run's checkpoint, an adapter on its model."""
    sft = new_run("sft", method="sft", learning_rate=2e-2, num_train_epochs=2)
    assert sft.train() == 0
    on_adapter = new_run("on-adapter", adapter_path=str(sft.path / "adapter"), **FULL)
    assert on_adapter.train() == 0
    checkpoint = sorted((on_adapter.path / "checkpoints").glob("step-*"))[-1]
    on_checkpoint = new_run("on-checkpoint", adapter_path=str(checkpoint), max_steps=2, **FULL)
    assert on_checkpoint.train() == 0
    on_model = new_run("on-model", model_path=str(on_adapter.path / "model"), max_steps=2)
    assert on_model.train() == 0
    for before, run in ((sft, on_adapter), (on_adapter, on_checkpoint), (on_adapter, on_model)):
        assert_starts_at_ln_2(run)
        assert run.points("eval")[0]["eval_logps/chosen"] == pytest.approx(
            before.result["metrics"]["eval_logps/chosen"], rel=1e-4
        )
    assert "with the checkpoint that training starts from" in on_checkpoint.result["reference"]


def test_an_adapter_does_not_stand_on_a_checkpoint_of_full_fine_tuning(new_run: NewRun) -> None:
    full = new_run("full", eval_pairs=0, max_steps=1, save_steps=1, **FULL)
    assert full.train() == 0
    refused = new_run("refused", adapter_path=str(full.path / "checkpoints/step-000001"))
    assert refused.train() == ExitCode.REFUSED
    assert refused.result["error"] == (
        f"{full.path}/checkpoints/step-000001 is a checkpoint of full fine-tuning: an adapter cannot stand on it."
    )
    assert "merge with --checkpoint" in refused.result["next_step"]


@pytest.mark.slow
def test_an_adapter_starts_where_such_a_checkpoint_was_once_it_is_a_folder(new_run: NewRun) -> None:
    full = new_run("full", eval_steps=2, save_steps=2, load_best_model_at_end=False, **FULL)
    assert full.train() == 0
    folder = merge(full.path, checkpoint="step-000002")["path"]
    run = new_run("on-checkpoint", model_path=folder, max_steps=1)
    assert run.train() == 0
    assert_starts_at_ln_2(run)
    logps = [full.points("eval")[step]["eval_logps/chosen"] for step in (0, 2, 4)]
    assert run.points("eval")[0]["eval_logps/chosen"] == pytest.approx(logps[1], rel=1e-6)
    assert min(abs(logps[1] - other) for other in (logps[0], logps[2])) > 1e-3
    assert (
        "with all weights trained by dpo after 2 steps, stored as float32."
        in Path(folder, "README.md").read_text()
    )
    with pytest.raises(RefusedError, match="trained the whole model") as told:
        merge(full.path)
    assert "name a checkpoint" in told.value.next_step
    with pytest.raises(RefusedError, match="holds something else"):
        merge(full.path, checkpoint="step-000002", out_dir=full.path / "model")


def test_bfloat16_keeps_trained_weights_in_float32_and_saves_them_lowered(
    new_run: NewRun,
) -> None:
    """An update of 1e-6 on a weight of 1 does not exist in bfloat16."""
    from safetensors.torch import load_file

    run = new_run(dtype="bfloat16", num_train_epochs=1, **(FULL | {"learning_rate": 1e-6}))
    assert run.train() == 0
    assert run.points("eval")[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    checkpoint = load_file(sorted((run.path / "checkpoints").glob("step-*"))[-1] / "adapter.safetensors")
    assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}
    start = load_file(Path(run.config.model_path) / "model.safetensors")
    moved = [name for name, tensor in checkpoint.items() if not torch.equal(tensor, start[name])]
    assert len(moved) == len(checkpoint)
    saved = load_file(run.path / "model/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_settings_of_an_adapter_are_not_ignored_by_full_fine_tuning(tiny_model: Path) -> None:
    config = tiny_config(tiny_model, finetuning_type="full", lora_dropout=0.05)
    for changes in ({"lora_r": 8}, {"use_dora": True}, {"quantization": "nf4"}, {"target_modules": ("mlp",)}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))} belong to an adapter"):
            dataclasses.replace(config, **changes)


def test_weight_decay_leaves_norms_alone() -> None:
    matrix, norm = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW(decayed([matrix, norm], 0.5), lr=0.1)
    for tensor in (matrix, norm):
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    assert matrix.flatten().tolist() == pytest.approx([0.95] * 4)
    assert norm.tolist() == [1.0, 1.0]
