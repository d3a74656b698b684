"""Best model, early stopping and KL budget: the rules, and what a run keeps, says and survives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.engine.conftest import NewRun, RunFolder
from tests.engine.interruptions import LeaveAt
from tests.engine.policies import tiny_config
from training.contract import ConfigError, ExitCode, RunConfig, verify_checkpoint
from training.engine import loop
from training.engine.errors import CRASH
from training.engine.evaluation import Evaluator
from training.engine.interrupts import Interrupts
from training.engine.stopping import Best, Stopping

SETTINGS: dict[str, Any] = {
    "pairs": 24, "num_train_epochs": 2, "eval_steps": 3, "save_steps": 100, "lora_dropout": 0.1,
}  # fmt: skip


def rules(**settings: Any) -> RunConfig:
    return tiny_config(Path(), eval_path="/eval", eval_steps=1, **settings)


def judged(config: RunConfig, values: list[Any], *, kl: list[Any] | None = None) -> tuple[Best, str | None]:
    """The values of the evaluations at steps 1, 2, 3 … until one says stop."""
    stopping, best = Stopping(config), Best()
    stopping.judge(best, 0, {config.metric_for_best_model: 0.0}, {})
    for step, value in enumerate(values, start=1):
        evaluation = {"eval_kl": kl[step - 1] if kl else 0.0, config.metric_for_best_model: value}
        for _ in range(2):  # looking twice, as after a resume, changes nothing
            verdict = stopping.judge(best, step, evaluation, {})
        if verdict.stop:
            return best, f"{verdict.stop}@{step}"
    return best, None


@pytest.mark.parametrize(
    ("settings", "values", "step", "stop"),
    [
        ({}, [0.6, 0.5, 0.55, 0.7], 2, None),
        ({}, [0.6, 0.6], 1, None),  # equal is no improvement
        ({}, [None, 0.9, None, 0.8], 4, None),
        ({"early_stopping_patience": 1}, [0.6, 0.5, 0.55], 2, "early_stopping@3"),
        ({"early_stopping_patience": 2}, [0.6, 0.7, 0.5, 0.7, 0.6], 3, "early_stopping@5"),
        ({"early_stopping_patience": 2}, [0.6, None, None], 1, "early_stopping@3"),
        # Better by less than the threshold: the best model all the same, but the patience runs out.
        ({"early_stopping_patience": 2, "early_stopping_threshold": 0.1}, [0.6, 0.55, 0.5], 3, "early_stopping@3"),
        ({"metric_for_best_model": "eval_rewards/accuracies"}, [0.5, 0.8, 0.7], 2, None),
        ({"metric_for_best_model": "eval_rewards/rejected"}, [0.5, -0.8, 0.7], 2, None),
        ({"metric_for_best_model": "eval_entropy", "greater_is_better": True}, [1.0, 3.0, 2.0], 2, None),
        ({"metric_for_best_model": "eval_loss", "greater_is_better": True}, [1.0, 3.0, 2.0], 2, None),
    ],
)  # fmt: skip
def test_the_best_and_the_stop(
    settings: dict[str, Any], values: list[Any], step: int, stop: str | None
) -> None:
    best, stopped = judged(rules(**settings), values)
    assert (best.step, stopped) == (step, stop)


@pytest.mark.parametrize(
    ("kl", "step", "stop"),
    [
        ([0.01, 0.02, 0.2, 0.3], 2, "kl_budget@3"),
        ([0.2], 1, "kl_budget@1"),
        ([0.01, None], 1, "kl_budget@2"),
        ([0.01, 0.05, 0.02, 0.1], 4, None),  # equal to the budget is within it
    ],
)
def test_a_kl_budget_ends_the_run_and_the_best_is_one_within_it(
    kl: list[Any], step: int, stop: str | None
) -> None:
    best, stopped = judged(rules(kl_budget=0.1), [0.6, 0.5, 0.4, 0.3], kl=kl)
    assert (best.step, stopped) == (step, stop)


def test_a_best_by_another_measure_does_not_count() -> None:
    best, _ = judged(rules(), [0.1])
    other = Stopping(rules(metric_for_best_model="eval_kl"))
    assert other.judge(best, 2, {"eval_kl": 5.0, "eval_loss": 0.9}, {}).is_best
    assert best.step == 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"metric_for_best_model": "eval_los"}, "not known: use one of eval_loss"),
        ({"metric_for_best_model": "loss"}, "not known"),
        ({"metric_for_best_model": "eval_grad_norm"}, "not known"),
        ({"metric_for_best_model": "eval_entropy"}, "set greater_is_better"),
        ({"metric_for_best_model": "eval_kl", "method": "sft"}, "not defined under these settings"),
        (
            {"metric_for_best_model": "eval_rewards/margins", "method": "sft"},
            "not defined under these settings",
        ),
        ({"metric_for_best_model": "eval_nll_loss"}, "not defined under these settings"),
        ({"early_stopping_patience": -1}, "early_stopping_patience must be 0"),
        ({"early_stopping_patience": 1.5}, "early_stopping_patience must be 0"),
        ({"early_stopping_threshold": 0.1}, "needs early_stopping_patience"),
        ({"kl_budget": math.nan}, "kl_budget must be 0"),
        ({"kl_budget": 0.1, "method": "orpo"}, "this loss has none"),
        ({"kl_budget": 0.1, "eval_path": ""}, "choose validation data"),
        ({"early_stopping_patience": 1, "eval_steps": 0}, "and eval_steps"),
        ({"greater_is_better": "yes"}, "true, false or null"),
    ],
)
def test_settings_that_could_never_act_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny_config(Path(), **({"eval_path": "/eval", "eval_steps": 1} | settings))


# --- whole runs -----------------------------------------------------------------------------------------


def script(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float], **others: dict[int, float]) -> None:
    """Evaluations that say what the test wants, whatever the model does."""
    real = Evaluator.evaluate

    def evaluate(self: Evaluator, *arguments: Any, step: int, **keywords: Any) -> Any:
        values = real(self, *arguments, step=step, **keywords)
        for key, said in {"loss": losses, **others}.items():
            values[f"eval_{key}"] = said.get(step, values[f"eval_{key}"])
        return values

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)


BEST_AT_6 = {0: 0.7, 3: 0.6, 6: 0.5, 9: 0.55, 12: 0.65}


def steps_on_disk(run: RunFolder) -> list[int]:
    return sorted(verify_checkpoint(path) for path in (run.path / "checkpoints").glob("step-*[0-9]"))


def same_weights(adapter: Path, checkpoint: Path) -> bool:
    left = load_file(adapter / "adapter_model.safetensors")
    right = load_file(checkpoint / "adapter.safetensors")
    by_name = {name.replace(".default.", "."): tensor for name, tensor in right.items()}
    return set(left) == set(by_name) and all(bool((left[name] == by_name[name]).all()) for name in left)


def test_the_best_model_is_offered_and_the_result_tells_its_numbers(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, BEST_AT_6)
    run = new_run(**(SETTINGS | {"save_steps": 2}))
    assert run.train() == 0
    result = run.result
    assert (result["status"], result["step"]) == ("succeeded", 12)
    assert (result["best_step"], result["model_step"], result["best_metric"]) == (6, 6, 0.5)
    assert "stopped_by" not in result
    assert "The best evaluation was at step 6 (eval_loss 0.5): that model is kept." in run.texts()
    assert {key: result["metrics"][key] for key in run.points("eval")[6]} == run.points("eval")[6]
    assert result["metrics"]["loss"] == run.points("train")[6]["loss"]
    assert result["last_metrics"]["eval_loss"] == 0.65
    assert result["last_metrics"]["loss"] == run.points("train")[12]["loss"]
    assert steps_on_disk(run) == [6, 10, 12]
    assert same_weights(run.path / "adapter", run.path / "checkpoints/step-000006")
    assert not same_weights(run.path / "adapter", run.path / "checkpoints/step-000012")


def test_the_best_of_full_fine_tuning_is_offered_too(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, BEST_AT_6)
    settings = {key: value for key, value in SETTINGS.items() if key != "lora_dropout"}
    run = new_run(**settings, finetuning_type="full")
    assert run.train() == 0
    offered = load_file(run.path / "model/model.safetensors")
    best, last = (
        load_file(run.path / f"checkpoints/step-{step:06d}/adapter.safetensors") for step in (6, 12)
    )
    name = next(name for name in best if name.endswith("layers.0.mlp.down_proj.weight"))
    mine = offered["model.layers.0.mlp.down_proj.weight"]
    assert bool((mine == best[name]).all())
    assert not bool((mine == last[name]).all())


def test_the_last_model_is_offered_when_that_is_asked_for(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, BEST_AT_6)
    run = new_run(**SETTINGS, load_best_model_at_end=False)
    assert run.train() == 0
    assert (run.result["best_step"], run.result["model_step"]) == (6, 12)
    assert run.result["metrics"]["eval_loss"] == 0.65
    assert "The model of step 12 is kept, as asked." in run.texts()
    assert same_weights(run.path / "adapter", run.path / "checkpoints/step-000012")


def test_a_run_stops_early_and_has_succeeded(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, BEST_AT_6)
    run = new_run(**SETTINGS, early_stopping_patience=1)
    assert run.train() == 0
    result = run.result
    assert (result["status"], result["step"], result["total_steps"]) == ("succeeded", 9, 12)
    assert (result["stopped_by"], result["model_step"]) == ("early_stopping", 6)
    assert "Stopped early at step 9: eval_loss did not improve in 1 evaluation." in run.texts()
    assert max(run.points("train")) == 9


def test_a_kl_budget_ends_a_run(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, {3: 0.6, 6: 0.5}, kl={3: 0.01, 6: 0.3})
    run = new_run(**SETTINGS, kl_budget=0.1)
    assert run.train() == 0
    assert (run.result["stopped_by"], run.result["step"], run.result["model_step"]) == ("kl_budget", 6, 3)
    assert "eval_kl is 0.3 nats per token, and kl_budget is 0.1" in run.texts()


def test_a_run_that_only_made_it_worse_keeps_a_trained_model_and_says_so(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, {0: 0.001})
    run = new_run(**SETTINGS)
    assert run.train() == 0
    assert run.result["model_step"] > 0
    assert "No evaluation was better than before the first step by eval_loss" in run.texts()


def test_without_validation_the_last_model_is_offered(new_run: NewRun) -> None:
    run = new_run(eval_pairs=0, max_steps=2)
    assert run.train() == 0
    assert run.result["model_step"] == 2
    assert "best_step" not in run.result


@pytest.mark.parametrize(
    ("step", "after", "elsewhere"),
    [
        pytest.param(6, False, True, marks=pytest.mark.slow),
        pytest.param(6, True, False, marks=pytest.mark.slow),
        (8, False, True),
        pytest.param(9, True, False, marks=pytest.mark.slow),
    ],
)
def test_the_best_survives_an_interruption(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, step: int, after: bool, elsewhere: bool
) -> None:
    script(monkeypatch, BEST_AT_6)
    settings = SETTINGS | {"early_stopping_patience": 2}
    undisturbed = new_run("undisturbed", **settings)
    assert undisturbed.train() == 0
    assert undisturbed.result["model_step"] == 6
    run = new_run("interrupted", **settings)
    assert run.train(LeaveAt(run, step, split="eval" if after else "train")) == ExitCode.INTERRUPTED
    if elsewhere:
        newest = run.path / f"checkpoints/step-{step:06d}"
        run = new_run("again", resume_from=str(newest), **settings)
    assert run.train() == 0
    for key in ("adapter_sha256", "step", "model_step", "best_step", "best_metric"):
        assert run.result[key] == undisturbed.result[key], key
    assert run.result["metrics"]["eval_logps/chosen"] == undisturbed.result["metrics"]["eval_logps/chosen"]
    assert 6 in steps_on_disk(run)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_goes_on_from_the_newest_not_from_the_best_it_took_along(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, BEST_AT_6)
    first = new_run("first", **SETTINGS)
    assert first.train(LeaveAt(first, 8)) == ExitCode.INTERRUPTED
    again = new_run("again", resume_from=str(first.path / "checkpoints/step-000008"), **SETTINGS)

    class Kill(Interrupts):
        def check(self) -> None:
            if "Continued from the checkpoint of step 8." in again.texts():
                raise RuntimeError("killed")

    assert again.train(Kill(again.path)) == CRASH
    assert steps_on_disk(again) == [6]
    assert again.train() == 0
    assert "Continued from the checkpoint of step 6." not in again.texts()
    assert min(again.points("train")) == 9
    assert again.result["model_step"] == 6


def test_a_best_checkpoint_that_is_damaged_is_said_and_the_last_model_is_kept(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, BEST_AT_6)
    run = new_run(**SETTINGS)
    real = loop.Loop.run

    def run_and_damage(self: loop.Loop) -> Any:
        status = real(self)
        (run.path / "checkpoints/step-000006/adapter.safetensors").write_bytes(b"torn")
        return status

    monkeypatch.setattr(loop.Loop, "run", run_and_damage)
    assert run.train() == 0
    assert (run.result["model_step"], run.result["metrics"]["eval_loss"]) == (12, 0.65)
    assert "its checkpoint cannot be used, so the model of step 12 is kept" in run.texts()


def test_a_full_disk_keeps_the_best_checkpoint(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    script(monkeypatch, BEST_AT_6)
    real = safetensors.torch.save_file
    run = new_run(**(SETTINGS | {"save_steps": 2}))

    def full_after_nine(tensors: Any, path: Any, **keywords: Any) -> None:
        if 9 in run.points("eval"):
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        real(tensors, path, **keywords)

    monkeypatch.setattr(safetensors.torch, "save_file", full_after_nine)
    assert run.train() == ExitCode.DISK_FULL
    assert run.result["error"] == "The disk is full."
    assert "The checkpoint of step 6, the best so far, is kept." in run.texts()
    assert steps_on_disk(run) == [6, 8]
