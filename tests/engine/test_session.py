"""How a run ends, and what it says: result.json, exit codes, events."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import NewRun, RunFolder
from tests.engine.interruptions import StopAt
from tests.tiny import build_tiny_model
from training.contract import EVAL_PREFIX, PHASES, ExitCode, Metric
from training.engine import session
from training.engine.errors import explain
from training.engine.loop import Loop


def test_a_run_learns_and_leaves_an_adapter_that_peft_loads(new_run: NewRun, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = new_run(pairs=8, num_train_epochs=15, learning_rate=5e-3)
    assert run.train() == 0
    result = run.result
    assert result["status"] == "succeeded"
    assert result["step"] == result["total_steps"] == 30
    assert result["metrics"]["rewards/accuracies"] == 1.0
    assert result["metrics"]["eval_loss"] < result["initial_metrics"]["eval_loss"] / 2
    adapter = run.path / "adapter"
    assert {path.name for path in adapter.iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
        "chat_template.jinja", "README.md",
    }  # fmt: skip
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "model"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    assert any(bool(tensor.any()) for name, tensor in loaded.named_parameters() if "lora_B" in name)
    assert AutoTokenizer.from_pretrained(adapter).chat_template


def test_the_metrics_are_those_of_the_contract(new_run: NewRun) -> None:
    run = new_run(max_steps=2)
    assert run.train() == 0
    common = {
        Metric.LOSS, Metric.REWARDS_CHOSEN, Metric.REWARDS_REJECTED, Metric.REWARDS_MARGINS,
        Metric.REWARDS_ACCURACIES, Metric.LOGPS_CHOSEN, Metric.LOGPS_REJECTED, Metric.KL, Metric.TRUNCATED,
    }  # fmt: skip
    of_steps = {Metric.GRAD_NORM, Metric.LEARNING_RATE, Metric.EPOCH, Metric.NUM_TOKENS}
    assert set(run.points("train")[1]) == common | of_steps
    assert set(run.points("eval")[0]) == {EVAL_PREFIX + key for key in common | {Metric.ENTROPY}}


def test_phases_come_in_the_order_of_the_contract(new_run: NewRun) -> None:
    run = new_run(max_steps=1, watch_prompts=1, watch_max_new_tokens=2)
    assert run.train() == 0
    first_seen = list(dict.fromkeys(event["phase"] for event in run.events if event["type"] == "phase"))
    assert set(first_seen) == set(PHASES)
    assert first_seen[:4] == list(PHASES)[:4]
    (plan,) = [event for event in run.events if event["type"] == "plan"]
    assert (plan["total_steps"], plan["num_train_pairs"], plan["num_eval_pairs"]) == (1, 16, 4)


def test_the_stop_file_ends_after_the_step_with_an_evaluation_and_a_model(new_run: NewRun) -> None:
    run = new_run(num_train_epochs=5)
    assert run.train(StopAt(run, 3)) == 0
    assert (run.result["status"], run.result["step"]) == ("stopped", 3)
    assert list(run.points("eval")) == [0, 3]
    assert (run.path / "adapter/adapter_model.safetensors").is_file()


def test_a_stop_before_the_first_step_takes_that_step_and_keeps_it(new_run: NewRun) -> None:
    """Whoever asks for "stop and keep" while the model loads gets what was promised, not a failed task."""
    run = new_run(num_train_epochs=5)
    (run.path / "stop").touch()
    assert run.train() == ExitCode.OK
    assert (run.result["status"], run.result["step"]) == ("stopped", 1)
    assert list(run.points("eval")) == [0, 1]
    assert (run.path / "adapter/adapter_model.safetensors").is_file()


def test_no_validation_is_allowed(new_run: NewRun) -> None:
    run = new_run(eval_pairs=0, max_steps=2)
    assert run.train() == 0
    assert run.points("eval") == {}
    assert run.result["initial_metrics"] == {}


def test_three_updates_that_are_not_finite_end_with_43(new_run: NewRun) -> None:
    run = new_run(learning_rate=1e30, warmup_ratio=0.0, num_train_epochs=10, save_steps=1)
    assert run.train() == ExitCode.DIVERGED
    assert "diverged" in run.result["error"]
    assert run.result["next_step"]
    points = run.points("train")
    assert [step for step, values in points.items() if values["loss"] is None][-1] == max(points)
    assert "NaN" not in (run.path / "events.jsonl").read_text()
    assert not (run.path / "adapter").exists()


def test_one_update_that_is_not_finite_is_skipped(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(pairs=24, num_train_epochs=1, lora_dropout=0.0, save_steps=1)
    real = Loop.score

    def poisoned(self: Loop, *arguments: Any) -> Any:
        losses, logps = real(self, *arguments)
        return (losses * math.nan if self.state.step == 2 else losses), logps

    monkeypatch.setattr(Loop, "score", poisoned)
    assert run.train() == 0
    assert run.points("train")[3]["loss"] is None
    assert run.points("train")[4]["loss"] is not None
    assert "Step 3 gave a loss or gradient that is not finite: skipped." in run.texts()
    assert "checkpoints/step-000003" not in [e.get("path") for e in run.events]


def test_out_of_memory_is_42_with_what_to_try(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_big(self: Loop, *arguments: Any) -> Any:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr(Loop, "score", too_big)
    run = new_run()
    assert run.train() == ExitCode.OUT_OF_MEMORY
    assert run.result["error"] == "Out of memory at batch size 2 × 1024 tokens."
    assert "batch_size 1 with twice the gradient_accumulation_steps" in run.result["next_step"]


def test_a_crash_is_1_and_its_traceback_is_in_the_log_only(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Loop, *arguments: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(Loop, "score", broken)
    run = new_run()
    assert run.train() == 1
    assert "secret detail" not in json.dumps(run.result)
    assert "secret detail" in caplog.text


def spoil_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def unknown_type(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "nobody-knows"}))


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize("spoil", [spoil_weights, unknown_type, no_tokenizer])
def test_a_model_that_cannot_be_read_is_refused(new_run: NewRun, tmp_path: Path, spoil: Any) -> None:
    folder = build_tiny_model(tmp_path / "model")
    spoil(folder)
    run = new_run(model_path=str(folder))
    assert run.train() == ExitCode.REFUSED
    assert run.result["status"] == "failed"
    assert "base model" in run.result["error"]
    assert run.result["next_step"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ("no_such_proj",)}, "no 'no_such_proj' to put an adapter on"),
        ({"method": "ppo"}, "method 'ppo'"),
        ({"loss_type": "nonsense"}, "loss_type"),
        ({"lr_scheduler_type": "sideways"}, "lr_scheduler_type"),
        ({"model_path": "/nowhere"}, "base model's folder"),
        ({"train_path": "/nowhere.jsonl"}, "training pairs are not there"),
        ({"adapter_path": "/nowhere"}, "model to start from"),
        ({"device": "abacus"}, "device"),
        ({"max_length": 1}, "No training pair is left"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(
    new_run: NewRun, settings: dict[str, Any], words: str
) -> None:
    run = new_run(**settings)
    assert run.train() == ExitCode.REFUSED
    assert words in run.result["error"]
    assert run.result["next_step"]


def test_an_empty_split_is_refused(new_run: NewRun, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    run = new_run(eval_path=str(empty))
    assert run.train() == ExitCode.REFUSED
    assert run.result["error"] == f"There are no validation pairs in {empty}."


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id": "x", "wrong": 1}', '{"run_id": "x"}'])
def test_a_broken_configuration_is_refused(tmp_path: Path, text: str, new_run: NewRun) -> None:
    run = new_run()
    (run.path / "config.json").write_text(text)
    assert run.train() == ExitCode.REFUSED
    assert run.result["status"] == "failed"


def test_the_result_of_an_earlier_attempt_does_not_survive_a_crash(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    (run.path / "result.json").write_text('{"status": "succeeded"}')
    monkeypatch.setattr(
        "training.engine.session.check_config", lambda config: (_ for _ in ()).throw(SystemExit)
    )
    with pytest.raises(SystemExit):
        run.train()
    assert not (run.path / "result.json").exists()


def test_a_torn_last_line_of_events_is_closed(new_run: NewRun) -> None:
    run: RunFolder = new_run(max_steps=1)
    (run.path / "events.jsonl").write_text('{"type": "phase"}\n{"type": "me')
    assert run.train() == 0
    lines = (run.path / "events.jsonl").read_text().splitlines()
    assert lines[1] == '{"type": "me'
    assert json.loads(lines[2])["phase"] == "starting"


def test_memory_errors_without_a_configuration_are_explained() -> None:
    assert explain(MemoryError(), None).exit_code == ExitCode.OUT_OF_MEMORY


def test_a_long_step_says_between_its_batches_that_it_is_alive(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a worker takes a step of an hour on a slow machine for a run that hangs, and ends it."""
    monkeypatch.setattr("training.engine.events.PHASE_INTERVAL", 0.0)
    run = new_run(max_steps=1, gradient_accumulation_steps=6, per_device_train_batch_size=1)
    assert run.train() == 0
    alive = [
        event
        for event in run.events
        if event["type"] == "phase" and event["phase"] == "training" and event["done"] == 0
    ]
    assert len(alive) >= 6


def test_a_run_of_one_step_trains(new_run: NewRun) -> None:
    """Warm-up starts at 0, and of one step 10 % are, rounded up, one."""
    run = new_run(max_steps=1)
    assert run.train() == 0
    assert run.points("train")[1]["learning_rate"] > 0
    assert run.result["metrics"]["eval_kl"] > 0


def test_a_failure_of_the_command_is_said_on_its_error_stream(
    new_run: NewRun, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(train_path="nowhere.jsonl")
    monkeypatch.setattr(session, "open_log", lambda run_dir, rank: sys.stderr)
    monkeypatch.setattr(session.Interrupts, "install", lambda self, stream: None)
    monkeypatch.setattr(session.launch, "die_with_parent", lambda: None)
    assert session.main(run.path) == 2
    said = capfd.readouterr().err
    assert run.result["error"] in said and run.result["next_step"] in said
