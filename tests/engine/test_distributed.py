"""Two ranks are one: losses, metrics, weights, resuming; and they end together, whatever happens to one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.conftest import NewRun, RunFolder, run_maker
from tests.engine.interruptions import LeaveAt, StopAt
from tests.engine.ranks import train_on
from tests.tiny import build_tiny_model
from training.contract import ExitCode, verify_checkpoint
from training.engine import loop, training_run
from training.engine.distributed import World

# 21 pairs in steps of 8: the last step of an epoch has 5 pairs in 3 micro-batches, 2 for one rank, 1 for the other.
SETTINGS: dict[str, Any] = {
    "pairs": 21, "eval_pairs": 9, "gradient_accumulation_steps": 4, "num_train_epochs": 2,
    "lora_dropout": 0.2, "eval_steps": 3, "max_length": 512,
}  # fmt: skip

FULL: dict[str, Any] = {"finetuning_type": "full", "lora_dropout": 0.05}  # the default: there is no adapter


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> RunFolder:
    run = run_maker(tmp_path_factory.mktemp("alone"), tiny_model)("alone", **SETTINGS)
    assert run.train() == 0
    return run


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> RunFolder:
    run = run_maker(tmp_path_factory.mktemp("both"), tiny_model)("both", **SETTINGS)
    assert train_on(run, 2) == [0, 0]
    return run


def weights(run: RunFolder) -> torch.Tensor:
    found = load_file(run.path / "adapter/adapter_model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


def assert_alike(run: RunFolder, other: RunFolder) -> None:
    """Up to the order in which float32 gradients were added; Adam makes of that at most a few units in 1e-5."""
    for split in ("train", "eval"):
        found, expected = run.points(split), other.points(split)
        assert found.keys() == expected.keys()
        for step, values in expected.items():
            assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-6), (split, step)
    torch.testing.assert_close(weights(run), weights(other), rtol=1e-4, atol=2e-5)
    for key in ("num_tokens", "step", "data_sha256", "weights_sha256"):
        assert run.result[key] == other.result[key], key
    assert run.result["initial_metrics"] == pytest.approx(other.result["initial_metrics"], rel=1e-6, abs=1e-9)


def test_two_ranks_train_what_one_trains_with_dropout_on(alone: RunFolder, both: RunFolder) -> None:
    assert max(alone.points("train")) == 6
    assert_alike(both, alone)


def test_the_first_step_differs_by_rounding_alone(alone: RunFolder, both: RunFolder) -> None:
    assert both.points("train")[1] == pytest.approx(alone.points("train")[1], rel=1e-6, abs=1e-9)


def test_one_rank_speaks_and_the_plan_says_the_effective_batch(both: RunFolder) -> None:
    (plan,) = [event for event in both.events if event["type"] == "plan"]
    assert (plan["num_devices"], plan["pairs_per_step"]) == (2, 8)
    steps = [event["step"] for event in both.events if event["type"] == "metrics"]
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert both.result["num_devices"] == 2


def test_the_record_has_every_pair_of_both_ranks_once(alone: RunFolder, both: RunFolder) -> None:
    from pyarrow import parquet

    def rows(run: RunFolder) -> dict[tuple[str, str, int, str], dict[str, Any]]:
        files = sorted(run.path.glob("pairs/*.parquet"))
        found = [(path.name, row) for path in files for row in parquet.read_table(path).to_pylist()]
        keyed = {(name, row.pop("split"), row.pop("step"), row.pop("id")): row for name, row in found}
        assert len(keyed) == len(found)
        return keyed

    expected, found = rows(alone), rows(both)
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert found[key] == pytest.approx(row, rel=1e-5, abs=1e-5), key


def test_each_rank_scores_its_own_pairs_of_the_reference(both: RunFolder) -> None:
    shards = sorted(both.path.parent.glob("reference/*/*.safetensors"))
    keys = [{row.numpy().tobytes() for row in load_file(path)["keys"]} for path in shards]
    assert len(keys) == 2 and all(keys)
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 21  # the 9 held-out pairs are among them


@pytest.mark.parametrize("size", [2, 1])
def test_a_rank_that_leaves_takes_the_other_along_and_both_resume(
    new_run: NewRun, both: RunFolder, alone: RunFolder, size: int
) -> None:
    """SIGTERM reaches rank 1 alone. Resumed on two devices every bit is the same; on one it is as near."""
    run = new_run(**SETTINGS)
    codes = train_on(run, 2, as_rank=lambda rank: LeaveAt(run, 4) if rank == 1 else None)
    assert codes == [ExitCode.INTERRUPTED] * 2
    assert run.result["status"] == "interrupted"
    assert max(run.points("train")) == verify_checkpoint(run.path / "checkpoints/step-000004") == 4
    assert train_on(run, size) == [0] * size
    assert "Continued from the checkpoint of step 4." in run.texts()
    if size == 2:
        assert run.result["adapter_sha256"] == both.result["adapter_sha256"]
        assert run.points("train") == both.points("train")
        assert "under another" not in run.texts()
    else:
        assert_alike(run, alone)
        assert "Continued under another num_devices" in run.texts()


def test_the_stop_file_ends_both_at_the_same_step(new_run: NewRun) -> None:
    run = new_run(**SETTINGS)
    assert train_on(run, 2, as_rank=lambda rank: StopAt(run, 2) if rank == 1 else None) == [0, 0]
    assert (run.result["status"], run.result["step"]) == ("stopped", 2)
    assert (run.path / "adapter/adapter_model.safetensors").is_file()


def test_an_error_of_one_rank_ends_both_with_its_sentence(new_run: NewRun) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    def bend(rank: int) -> None:
        if rank == 1:
            loop.Loop.score = full  # type: ignore[method-assign]

    run = new_run(**SETTINGS)
    assert train_on(run, 2, as_rank=bend) == [ExitCode.OUT_OF_MEMORY] * 2
    assert run.result["error"] == "Out of memory at batch size 2 × 512 tokens."
    assert "batch_size 1" in run.result["next_step"]


def test_a_killed_rank_is_a_crash_of_the_run(new_run: NewRun) -> None:
    real = loop.Loop._step

    def bend(rank: int) -> None:
        def die(self: loop.Loop) -> None:
            if self.state.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self)

        if rank == 1:
            loop.Loop._step = die  # type: ignore[method-assign]

    run = new_run(**SETTINGS)
    assert train_on(run, 2, as_rank=bend) == [1, -signal.SIGKILL]
    assert "ended without a word" in run.result["error"]
    assert verify_checkpoint(run.path / "checkpoints/step-000002") == 2


def test_weights_that_drift_apart_are_found_before_they_are_saved(new_run: NewRun) -> None:
    real = World.sum_gradients

    def bend(rank: int) -> None:
        def forget(self: World, parameters: Any) -> None:
            parameters = list(parameters)
            real(self, parameters)
            parameters[0].grad[0] += rank

        World.sum_gradients = forget  # type: ignore[method-assign]

    run = new_run(**SETTINGS)
    assert train_on(run, 2, as_rank=bend) == [1, 1]
    assert run.result["error"] == "The devices no longer agree on the weights."
    assert not (run.path / "checkpoints").exists()


def test_a_device_without_a_micro_batch_is_said_and_does_no_harm(new_run: NewRun) -> None:
    settings = {"pairs": 6, "gradient_accumulation_steps": 1, "eval_pairs": 0, "lora_dropout": 0.2}
    one, two = new_run("one", **settings), new_run("two", **settings)
    assert one.train() == 0
    assert train_on(two, 2) == [0, 0]
    assert "1 of the 2 devices will have nothing to do" in two.texts()
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-5, atol=1e-7)


def test_shares_hold_everything_once_and_are_even() -> None:
    costs = [7, 1, 1, 9, 4, 4, 2, 8]
    shares = World(rank=0, size=3).shares(costs)
    assert sorted(index for share in shares for index in share) == list(range(8))
    assert all(share == sorted(share) for share in shares)
    assert [sum(costs[index] for index in share) for share in shares] == [12, 12, 12]
    assert World().shares(costs) == [list(range(8))]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_devices": 3}, "num_devices is 3, and the run was started on 2"),
        ({"num_devices": 2, "method": "ppo"}, "'ppo' is not known here"),
    ],
)
def test_all_ranks_refuse_alike(new_run: NewRun, settings: dict[str, Any], sentence: str) -> None:
    run = new_run(**settings)
    assert train_on(run, 2) == [ExitCode.REFUSED] * 2
    assert sentence in run.result["error"]


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused modules round otherwise, and divided weights are never fused."""
    monkeypatch.setattr(training_run, "fuse", lambda model, adapter: 0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.usefixtures("unfused")
def test_divided_weights_train_what_whole_ones_train(new_run: NewRun, checkpointing: str) -> None:
    """FSDP: each rank holds half of every layer; bit for bit what two whole models give."""
    both = new_run("whole", **SETTINGS)
    assert train_on(both, 2) == [0, 0]
    real = loop.Loop.run

    def bend(rank: int) -> None:
        def look(self: loop.Loop) -> Any:
            layers = self.policy.scorer.decoder.layers
            frozen = [tensor for tensor in layers.parameters() if not tensor.requires_grad]
            mine = sum(tensor.to_local().numel() for tensor in frozen)
            (run.path / f"share-{rank}").write_text(f"{mine} {sum(tensor.numel() for tensor in frozen)}")
            return real(self)

        loop.Loop.run = look  # type: ignore[method-assign]

    run = new_run(**SETTINGS, parallelism="fsdp", gradient_checkpointing=checkpointing)
    assert train_on(run, 2, as_rank=bend) == [0, 0]
    mine, whole = map(int, (run.path / "share-1").read_text().split())
    assert mine == whole / 2
    assert run.result["adapter_sha256"] == both.result["adapter_sha256"]
    assert run.points("train") == both.points("train")
    assert run.points("eval") == both.points("eval")


@pytest.mark.slow
@pytest.mark.usefixtures("unfused")
def test_divided_weights_continue_an_adapter_and_a_checkpoint(new_run: NewRun, both: RunFolder) -> None:
    settings = SETTINGS | {"adapter_path": str(both.path / "adapter"), "gradient_accumulation_steps": 3}
    whole, divided = new_run("whole", **settings), new_run("divided", **settings, parallelism="fsdp")
    assert train_on(whole, 2) == [0, 0]
    codes = train_on(divided, 2, as_rank=lambda rank: LeaveAt(divided, 3))
    assert codes == [ExitCode.INTERRUPTED] * 2
    assert train_on(divided, 2) == [0, 0]
    assert divided.points("eval")[0]["eval_loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert divided.points("train") == whole.points("train")
    assert divided.result["adapter_sha256"] == whole.result["adapter_sha256"]


def test_divided_weights_need_more_than_one_device(new_run: NewRun) -> None:
    run = new_run(parallelism="fsdp")
    assert run.train() == ExitCode.REFUSED
    assert "Set num_devices to 2 or more" in run.result["next_step"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"use_dora": True}, FULL | {"learning_rate": 1e-4}])
def test_two_ranks_train_dora_and_all_weights_too(new_run: NewRun, settings: dict[str, Any]) -> None:
    one, two = new_run("one", **SETTINGS | settings), new_run("two", **SETTINGS | settings)
    assert one.train() == 0
    assert train_on(two, 2) == [0, 0]
    for split in ("train", "eval"):
        for step, values in one.points(split).items():
            assert two.points(split)[step] == pytest.approx(values, rel=2e-4, abs=2e-5), (split, step)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["dora", "reference"])
@pytest.mark.usefixtures("unfused")
def test_divided_weights_with_dora_and_with_another_reference(
    new_run: NewRun, tmp_path: Path, which: str
) -> None:
    settings = {"use_dora": True}
    if which == "reference":
        settings = {"reference_model_path": str(build_tiny_model(tmp_path / "other", seed=5))}
    whole, divided = (
        new_run(kind, **SETTINGS, **settings, parallelism=kind, reference_cache_dir=str(tmp_path / kind))
        for kind in ("data", "fsdp")
    )
    assert train_on(whole, 2) == [0, 0]
    assert train_on(divided, 2) == [0, 0]
    assert divided.points("train") == whole.points("train")
    assert divided.points("eval") == whole.points("eval")


@pytest.mark.slow
def test_weights_that_are_trained_are_not_divided(new_run: NewRun) -> None:
    run = new_run(**SETTINGS | FULL, parallelism="fsdp")
    assert train_on(run, 2) == [ExitCode.REFUSED] * 2
    assert "here all weights are trained" in run.result["error"]
