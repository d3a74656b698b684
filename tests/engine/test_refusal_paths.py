"""A refusal that is about a file or a folder names it: absolute, or as it is called inside the run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.conftest import NewRun
from tests.tiny import build_tiny_model
from training.contract import ExitCode
from training.engine.command_line import main
from training.engine.errors import Explanation


@pytest.mark.parametrize(
    "name",
    [
        "model_path", "adapter_path", "reference_model_path", "reference_adapter_path", "train_path", "eval_path",
        "watch_path", "chat_template_path",
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(new_run: NewRun, tmp_path: Path, name: str) -> None:
    settings = {"watch_prompts": 1} if name == "watch_path" else {}
    run = new_run(**{name: str(tmp_path / "gone")}, **settings)
    assert run.train() == ExitCode.REFUSED
    assert f"not there: {tmp_path / 'gone'}." in run.result["error"].replace(" any more", "")


@pytest.mark.parametrize(
    "name", ["model_path", "adapter_path", "reference_adapter_path"]
)  # an empty folder in the place of what it should hold
def test_a_folder_that_holds_something_else_is_named(new_run: NewRun, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    run = new_run(**{name: str(tmp_path / "empty")})
    assert run.train() == ExitCode.REFUSED
    assert str(tmp_path / "empty") in run.result["error"]


def test_a_model_without_a_template_or_with_spoilt_weights_is_named(new_run: NewRun, tmp_path: Path) -> None:
    bare = build_tiny_model(tmp_path / "bare", chat_template=None)
    spoilt = build_tiny_model(tmp_path / "spoilt")
    (spoilt / "model.safetensors").write_bytes(b"nothing")
    tongue_tied = build_tiny_model(tmp_path / "tongue-tied")
    (tongue_tied / "tokenizer.json").write_text("{")
    for model in (bare, spoilt, tongue_tied):
        run = new_run(f"run-{model.name}", model_path=str(model))
        assert run.train() == ExitCode.REFUSED
        assert f"base model in {model} " in run.result["error"]


def test_an_adapter_that_does_not_fit_is_named(new_run: NewRun, tmp_path: Path) -> None:
    first = new_run("first", max_steps=1)
    assert first.train() == 0
    other = build_tiny_model(tmp_path / "other", seed=1)
    for name in ("adapter_path", "reference_adapter_path"):
        run = new_run(name, model_path=str(other), **{name: str(first.path / "adapter")})
        assert run.train() == ExitCode.REFUSED
        assert f"{first.path / 'adapter'}, does not fit" in run.result["error"]


def test_the_commands_name_what_they_looked_for(
    new_run: NewRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(max_steps=2, save_steps=1)
    assert main(["evaluate", str(run.path)]) == ExitCode.REFUSED
    assert f"{run.path} has no finished model." in capsys.readouterr().err
    assert run.train() == 0
    (run.path / "checkpoints/step-000001/state.json").write_text("{}")
    assert main(["evaluate", str(run.path), "--checkpoint", "step-000001"]) == ExitCode.REFUSED
    assert "The checkpoint checkpoints/step-000001 cannot be used" in capsys.readouterr().err
    said = json.loads((run.path / "evaluate.json").read_text())["error"]
    assert str(run.path) not in said
    (tmp_path / "prompts").write_text("{")
    assert main(["generate", str(run.path), "--prompts", str(tmp_path / "prompts")]) == ExitCode.REFUSED
    assert f"A line of {tmp_path / 'prompts'} is not a prompt" in capsys.readouterr().err


def test_pairs_inside_the_run_directory_are_called_as_there(new_run: NewRun) -> None:
    run = new_run()
    (run.path / "mine.jsonl").write_text("3\n")
    run.write(train_path=str(run.path / "mine.jsonl"))
    assert run.train() == ExitCode.REFUSED
    assert run.result["error"].startswith("Line 1 of mine.jsonl is not a preference pair")


def test_only_what_lies_inside_is_shortened() -> None:
    text = "/runs/a/pairs, (/runs/a/x) and /runs/ab/pairs, /mnt/runs/a/base"
    seen = Explanation(text, "/runs/a", 2).seen_from(Path("/runs/a"))
    assert seen.sentence == "pairs, (x) and /runs/ab/pairs, /mnt/runs/a/base"
    assert seen.next_step == "/runs/a"
