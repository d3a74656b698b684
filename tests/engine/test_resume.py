"""Train 12 equals train 6, leave, resume 6: bit for bit. And checkpoints that are damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import NewRun, RunFolder, run_maker
from tests.engine.interruptions import LeaveAt
from training.contract import ExitCode, RunConfig, file_sha256, verify_checkpoint
from training.engine import checkpoints
from training.engine.errors import explain
from training.engine.training_run import identity_of
from training.engine.trajectory import FIRST_SETTINGS, NOT_IDENTITY

SETTINGS: dict[str, Any] = {"pairs": 24, "num_train_epochs": 2, "lora_dropout": 0.2, "eval_steps": 3}


def checkpoint_steps(run: RunFolder) -> list[int]:
    return sorted(verify_checkpoint(path) for path in (run.path / "checkpoints").glob("step-*[0-9]"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> RunFolder:
    """What every resumed run is compared with; nobody writes into it."""
    run = run_maker(tmp_path_factory.mktemp("undisturbed"), tiny_model)("undisturbed", **SETTINGS)
    assert run.train() == 0
    assert run.result["step"] == 12
    return run


def interrupted(new_run: NewRun, step: int, **settings: Any) -> RunFolder:
    run = new_run("interrupted", **(SETTINGS | settings))
    assert run.train(LeaveAt(run, step)) == ExitCode.INTERRUPTED
    assert run.result["status"] == "interrupted"
    assert max(run.points("train")) == step
    return run


def assert_same(run: RunFolder, undisturbed: RunFolder, from_step: int) -> None:
    assert run.result["adapter_sha256"] == undisturbed.result["adapter_sha256"]
    expected = {step: v for step, v in undisturbed.points("train").items() if step > from_step}
    found = run.points("train")
    assert {step: found[step] for step in expected} == expected
    assert run.points("eval")[12] == undisturbed.points("eval")[12]
    assert run.result["num_tokens"] == undisturbed.result["num_tokens"]
    assert run.result["initial_metrics"] == undisturbed.result["initial_metrics"]


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 7])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(
    new_run: NewRun, undisturbed: RunFolder, step: int
) -> None:
    run = interrupted(new_run, step)
    assert checkpoint_steps(run)[-1] == step
    assert run.train() == 0
    assert f"Continued from the checkpoint of step {step}." in run.texts()
    assert_same(run, undisturbed, 0)


def test_another_attempt_continues_from_the_checkpoint_it_is_given(
    new_run: NewRun, undisturbed: RunFolder
) -> None:
    first = interrupted(new_run, 5)
    again = new_run("again", resume_from=str(first.path / "checkpoints/step-000005"), **SETTINGS)
    assert again.train() == 0
    assert min(again.points("train")) == 6
    assert_same(again, undisturbed, 5)


@pytest.mark.slow
def test_another_seed_would_differ(new_run: NewRun, undisturbed: RunFolder) -> None:
    other = new_run("other", **(SETTINGS | {"seed": 1}))
    assert other.train() == 0
    assert other.result["adapter_sha256"] != undisturbed.result["adapter_sha256"]


def damage(path: Path, kind: str) -> None:
    """One of the ways in which a checkpoint is not what was written."""
    name, _, how = kind.partition(" ")
    file = path / name
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "half":
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "half", "empty", "bit"])
@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]
)
def test_any_damage_is_found(
    new_run: NewRun, shared_checkpoint: Path, tmp_path: Path, name: str, how: str
) -> None:
    copy = tmp_path / shared_checkpoint.name
    shutil.copytree(shared_checkpoint, copy)
    assert verify_checkpoint(copy) == 4
    damage(copy, f"{name} {how}")
    with pytest.raises(ValueError, match="step-000004"):
        verify_checkpoint(copy)


@pytest.fixture(scope="module")
def shared_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint over one small parameter: damage does not depend on the model."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return checkpoints.save_checkpoint(
        tmp_path_factory.mktemp("run"), step=4, run_id="r", identity=checkpoints.Identity("c", "d", "w"),
        fingerprint={}, trainable={"w": parameter}, optimizer=optimizer, state={"step": 4},
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        "adapter.safetensors bit",
        pytest.param("optimizer.safetensors missing", marks=pytest.mark.slow),
        pytest.param("MANIFEST.json missing", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(
    new_run: NewRun, undisturbed: RunFolder, kind: str
) -> None:
    run = interrupted(new_run, 7)
    damage(run.path / "checkpoints/step-000007", kind)
    assert run.train() == 0
    assert "Continued from the checkpoint of step 6." in run.texts()
    assert list((run.path / "checkpoints").glob("step-000007.*.bad"))
    assert_same(run, undisturbed, 6)


@pytest.mark.slow
def test_a_damaged_checkpoint_of_an_earlier_attempt_is_left_alone_and_the_one_before_is_taken(
    new_run: NewRun, undisturbed: RunFolder
) -> None:
    first = interrupted(new_run, 7)
    newest = first.path / "checkpoints/step-000007"
    damage(newest, "state.json bit")
    again = new_run("again", resume_from=str(newest), **SETTINGS)
    assert again.train() == 0
    assert newest.is_dir()
    assert min(again.points("train")) == 7
    assert_same(again, undisturbed, 6)


def test_a_checkpoint_of_a_foreign_run_is_not_used(new_run: NewRun, undisturbed: RunFolder) -> None:
    first = interrupted(new_run, 5, learning_rate=1e-4)
    again = new_run("again", resume_from=str(first.path / "checkpoints/step-000005"), **SETTINGS)
    assert again.train() == 0
    assert "belongs to other settings, data or weights" in again.texts()
    assert_same(again, undisturbed, 0)


def test_two_checkpoints_are_kept_and_leftovers_are_removed(new_run: NewRun) -> None:
    run = new_run(**SETTINGS)
    leftover = run.path / "checkpoints/.tmp-dead"
    leftover.mkdir(parents=True)
    assert run.train() == 0
    assert checkpoint_steps(run) == [10, 12]
    assert not leftover.exists()
    said = [event["path"] for event in run.events if event["type"] == "checkpoint"]
    assert said == [f"checkpoints/step-{step:06d}" for step in (2, 3, 4, 6, 8, 9, 10, 12)]
    manifest = json.loads((run.path / "checkpoints/step-000012/MANIFEST.json").read_text())
    assert manifest["run_id"] == "run"
    assert manifest["files"]["adapter.safetensors"]["sha256"] == file_sha256(
        run.path / "checkpoints/step-000012/adapter.safetensors"
    )


def test_tensors_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    with torch.no_grad():
        parameter[1] = float("nan")
    with pytest.raises(checkpoints.NonFiniteError):
        checkpoints.save_checkpoint(
            tmp_path, step=1, run_id="r", identity=checkpoints.Identity("c", "d", "w"),
            fingerprint={}, trainable={"w": parameter}, optimizer=optimizer, state={},
        )  # fmt: skip
    assert not (tmp_path / "checkpoints").exists()


def test_a_full_disk_ends_with_44_and_keeps_the_checkpoint_before(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    real, calls = safetensors.torch.save_file, iter(range(99))

    def full_at_the_third(tensors: Any, path: Any, **keywords: Any) -> None:
        if next(calls) >= 3:
            raise OSError(28, "No space left on device")
        real(tensors, path, **keywords)

    monkeypatch.setattr(safetensors.torch, "save_file", full_at_the_third)
    run = new_run(**SETTINGS)
    assert run.train() == ExitCode.DISK_FULL
    assert run.result["error"] == "The disk is full."
    assert checkpoint_steps(run) == [2]
    assert not list((run.path / "checkpoints").glob(".tmp-*"))


def test_disk_full_is_known_by_text_too() -> None:
    class SafetensorError(Exception):
        pass

    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert explain(error, None).exit_code == ExitCode.DISK_FULL


def test_a_setting_at_its_default_is_no_part_of_what_a_checkpoint_belongs_to() -> None:
    """Else every new setting would end the checkpoints of the tasks of before."""
    names = {field.name for field in dataclasses.fields(RunConfig)}
    assert names - NOT_IDENTITY >= FIRST_SETTINGS

    class Weights:
        trajectory_sha256 = "w"

    def identity(**settings: Any) -> str:
        config = RunConfig(run_id="r", model_path="m", train_path="t", **settings)
        return identity_of(config, [], Weights()).config_sha256  # type: ignore[arg-type]

    plain = {**dataclasses.asdict(RunConfig(run_id="r", model_path="m", train_path="t"))}
    kept = {key: plain[key] for key in FIRST_SETTINGS} | {"pairs_per_step": 16}
    assert identity() == hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    assert identity(use_dora=True) != identity() != identity(beta=0.2)
