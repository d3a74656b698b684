"""A finished run is not trained over, by the command or from Python; an unfinished one goes on as ever."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import NewRun, RunFolder
from tests.engine.interruptions import StopAt
from training.contract import ExitCode
from training.engine import session
from training.engine import train as train_in_python
from training.engine.ended_run import STEP_SETTINGS, note_on_ended
from training.engine.errors import RefusedError
from training.engine.trajectory import NOT_IDENTITY


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    """`session.main` in this process leaves its signals and log alone."""
    monkeypatch.setattr(session, "open_log", lambda run_dir, rank: sys.stderr)
    monkeypatch.setattr(session.Interrupts, "install", lambda self, stream: None)
    monkeypatch.setattr(session.launch, "die_with_parent", lambda: None)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def finished(new_run: NewRun) -> RunFolder:
    run = new_run(max_steps=2)
    assert run.train() == 0
    return run


@pytest.mark.usefixtures("command")
def test_a_finished_run_is_said_to_be_finished_and_left_alone(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished.path)
    assert session.main(finished.path) == ExitCode.OK
    said = capsys.readouterr().out
    assert f"The run in {finished.path} is finished: succeeded at step 2 of 2. Nothing was done." in said
    assert f"{finished.path / 'adapter'} as adapter_path" in said
    assert snapshot(finished.path) == before
    assert train_in_python(finished.config, finished.path) == finished.result
    assert snapshot(finished.path) == before


@pytest.mark.usefixtures("command")
def test_changed_settings_of_a_finished_run_are_refused_by_name_and_nothing_is_touched(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    other = dataclasses.replace(finished.config, beta=0.3)
    before = snapshot(finished.path)
    with pytest.raises(RefusedError, match=r"beta \(0.1, now 0.3\)"):
        train_in_python(other, finished.path)
    assert snapshot(finished.path) == before
    finished.write(learning_rate=1e-3, target_modules=("q_proj",))
    before = snapshot(finished.path)
    assert session.main(finished.path) == ExitCode.REFUSED
    said = capsys.readouterr().err
    assert "others now: learning_rate (0.002, now 0.001), target_modules ([], now ['q_proj'])." in said
    assert "Make a new folder" in said
    assert snapshot(finished.path) == before


@pytest.mark.usefixtures("command")
def test_a_broken_config_does_not_cost_a_finished_run_its_result(finished: RunFolder) -> None:
    (finished.path / "config.json").write_text("{")
    before = snapshot(finished.path)
    assert session.main(finished.path) == ExitCode.REFUSED
    assert snapshot(finished.path) == before


@pytest.mark.parametrize(
    ("change", "closed"),
    [
        ({}, True),
        ({"status": "stopped", "stopped_by": "early_stopping"}, True),
        ({"status": "stopped", "stopped_by": "request"}, False),
        ({"status": "interrupted"}, False),
        ({"status": "failed"}, False),
    ],
)
def test_only_what_ended_well_is_closed(finished: RunFolder, change: dict[str, Any], closed: bool) -> None:
    (finished.path / "result.json").write_text(json.dumps(finished.result | change))
    assert bool(note_on_ended(finished.path)) == closed


def test_a_run_that_a_person_stopped_is_not_trained_over_with_other_settings(finished: RunFolder) -> None:
    stopped = finished.result | {"status": "stopped", "stopped_by": "request"}
    (finished.path / "result.json").write_text(json.dumps(stopped))
    with pytest.raises(
        RefusedError, match=r"was stopped at step 2, and its settings are others now: seed \(42, now 7"
    ):
        note_on_ended(finished.write(seed=7).path)


@pytest.fixture
def stopped(new_run: NewRun) -> RunFolder:
    run = new_run(save_steps=50)
    assert run.train(StopAt(run, 2)) == 0
    assert run.result["stopped_by"] == "request"
    return run


def test_a_run_that_a_person_stopped_goes_on_with_what_its_checkpoints_go_on_with(
    stopped: RunFolder, tmp_path: Path
) -> None:
    again = (tmp_path / "model-again").resolve()
    again.symlink_to(stopped.config.model_path)
    stopped.write(
        run_id="other", save_steps=1, resume_from=str(stopped.path), model_path=str(again), record_pairs=False,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, eval_steps=3,
    )  # fmt: skip
    assert note_on_ended(stopped.path) == ""
    result = train_in_python(stopped.config, stopped.path)
    assert (result["status"], result["step"]) == ("succeeded", result["total_steps"])
    assert "Continued from the checkpoint of step 2." in stopped.texts()
    with pytest.raises(RefusedError, match=r"is finished, .* eval_steps"):
        note_on_ended(stopped.write(eval_steps=0).path)


def test_no_setting_that_resume_allows_closes_a_stopped_run_and_every_other_does(stopped: RunFolder) -> None:
    """Whatever the values are: result.json of a run that had another one in each."""
    result = stopped.result
    for key, value in json.loads(stopped.config.to_json()).items():
        if key in STEP_SETTINGS:
            continue
        changed = result | {"config": result["config"] | {key: "another" if value != "another" else ""}}
        (stopped.path / "result.json").write_text(json.dumps(changed))
        if key in NOT_IDENTITY:
            assert note_on_ended(stopped.path) == "", key
        else:
            with pytest.raises(
                RefusedError, match=f"was stopped at step 2, and its settings are others now: {key} "
            ):
                note_on_ended(stopped.path)


def test_other_pairs_in_a_step_are_another_trajectory(stopped: RunFolder) -> None:
    stopped.write(gradient_accumulation_steps=3)
    with pytest.raises(RefusedError, match=r"others now: gradient_accumulation_steps \(2, now 3\)\."):
        note_on_ended(stopped.path)


def test_a_folder_of_the_other_kind_is_not_the_run_s_model(finished: RunFolder) -> None:
    """A base model that lies in the run's own folder."""
    (finished.path / "model").mkdir()
    assert "is finished" in note_on_ended(finished.path)
    (finished.path / "adapter").rename(finished.path / "aside")
    assert note_on_ended(finished.path) == ""
    full = finished.result | {"config": finished.result["config"] | {"finetuning_type": "full"}}
    (finished.path / "result.json").write_text(json.dumps(full))
    finished.write(finetuning_type="full")
    assert f"{finished.path / 'model'} as model_path" in note_on_ended(finished.path)
    (finished.path / "model").rename(finished.path / "adapter")
    assert note_on_ended(finished.path) == ""


def test_a_setting_that_is_newer_than_the_run_had_its_default(finished: RunFolder) -> None:
    result = finished.result
    del result["config"]["kl_budget"]
    (finished.path / "result.json").write_text(json.dumps(result))
    assert "is finished" in note_on_ended(finished.path)


def test_without_result_or_model_there_is_something_to_train(finished: RunFolder) -> None:
    aside = (finished.path / "adapter").rename(finished.path / "aside")
    assert note_on_ended(finished.path) == ""
    aside.rename(finished.path / "adapter")
    assert note_on_ended(finished.path)
    (finished.path / "result.json").unlink()
    assert note_on_ended(finished.path) == ""
