"""The engine as functions and as commands: the same numbers as training, and nothing left changed behind them."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import NewRun, RunFolder, run_maker
from tests.tiny import build_tiny_model, build_tiny_pairs, tiny_pairs
from training import engine
from training.contract import ExitCode, RunConfig
from training.engine import (
    EngineError,
    InterruptedRunError,
    RefusedError,
    estimate,
    evaluate,
    generate,
    merge,
    train,
)
from training.engine.command_line import main
from training.engine.finished import load_config
from training.watch_time import FLOOR_SECONDS_PER_TOKEN

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> RunFolder:
    """One run that all tests of this file look at; its adapter changes the answers."""
    make = run_maker(tmp_path_factory.mktemp("faces"), tiny_model)
    run = make(num_train_epochs=4, learning_rate=2e-2, lora_dropout=0.1, eval_steps=4)
    assert run.train() == 0
    return run


def command(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


# --- train ------------------------------------------------------------------------------------------


def test_importing_the_face_loads_no_torch() -> None:
    code = (
        "import sys; from training.engine import train, evaluate, merge, generate, estimate, RunConfig, Result; "
        "assert callable(train) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_no_module_of_the_engine_takes_a_function_s_name() -> None:
    """Importing `training.engine.train` would put the module where the function is."""
    modules = {path.stem for path in (ROOT / "training/engine").iterdir()}
    assert not modules & set(engine.__all__)


def test_train_returns_the_result_and_continues_where_a_checkpoint_is(
    new_run: NewRun, tmp_path: Path
) -> None:
    config = new_run("written-by-hand", max_steps=3).config
    result = train(config, tmp_path / "new" / "folder")
    assert result["status"] == "succeeded"
    assert result["step"] == 3
    assert result["metrics"]["eval_loss"] is not None
    (tmp_path / "new/folder/result.json").unlink()
    again = train(config, str(tmp_path / "new" / "folder"))
    assert again["adapter_sha256"] == result["adapter_sha256"]
    assert "Continued from the checkpoint of step 3" in (tmp_path / "new/folder/engine.log").read_text()


def test_what_cannot_work_is_raised_with_its_next_step(new_run: NewRun, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as refused:
        train(new_run(loss_type="nonsense").config, tmp_path / "x")
    assert "loss_type" in refused.value.sentence
    assert refused.value.next_step
    assert json.loads((tmp_path / "x/result.json").read_text())["error"] == refused.value.sentence


def test_a_disk_that_is_full_is_an_engine_error_with_its_code(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.engine.training_run.save_trained", full)
    with pytest.raises(EngineError) as raised:
        train(new_run(max_steps=1).config, tmp_path / "x")
    assert raised.value.exit_code == ExitCode.DISK_FULL
    assert isinstance(raised.value.__cause__, OSError)


def test_what_was_not_understood_is_raised_as_it_was(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.engine.loop.Loop.score", lambda *arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        train(new_run().config, tmp_path / "x")


def surroundings() -> dict[str, Any]:
    import accelerate.state
    import transformers

    root = logging.getLogger()
    library = transformers.logging
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "torch random": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "handlers": list(root.handlers),
        "level": root.level,
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "bars": library.is_progress_bar_enabled(),
        "library handlers": list(library.get_logger("transformers").handlers),
        "library propagates": library.get_logger("transformers").propagate,
        "grad": torch.is_grad_enabled(),
        "accelerate": dict(accelerate.state.AcceleratorState._shared_state),
        "partial": dict(accelerate.state.PartialState._shared_state),
    }


@pytest.fixture
def as_in_a_notebook() -> Any:
    """Nothing that an earlier test of this process left behind: the defaults of the libraries."""
    import accelerate.state
    import transformers

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)
    library: Any = transformers.logging
    library.enable_progress_bar()
    library.enable_default_handler()
    library.disable_propagation()
    yield
    library.disable_progress_bar()
    library.disable_default_handler()
    library.enable_propagation()


@pytest.mark.usefixtures("as_in_a_notebook")
def test_nothing_of_the_process_is_left_changed(new_run: NewRun, tmp_path: Path, finished: RunFolder) -> None:
    before = surroundings()
    train(new_run(max_steps=1).config, tmp_path / "x")
    assert surroundings() == before
    with pytest.raises(RefusedError):
        train(new_run("bad", lr_scheduler_type="sideways").config, tmp_path / "y")
    evaluate(finished.path)
    generate(finished.path, ["Hello"], max_new_tokens=1, temperature=1.0)
    estimate(finished.path)
    assert surroundings() == before


def test_signals_are_taken_in_the_main_thread_only_and_given_back(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.engine.loop import Loop

    real = Loop._step

    def interrupted(self: Loop) -> None:
        signal.raise_signal(signal.SIGTERM)
        real(self)

    monkeypatch.setattr(Loop, "_step", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRunError, match="at step 1"):
        train(new_run(max_steps=4).config, tmp_path / "x")
    assert signal.getsignal(signal.SIGTERM) is before

    monkeypatch.setattr(Loop, "_step", real)
    results = []
    config = new_run("other").config
    thread = threading.Thread(target=lambda: results.append(train(config, tmp_path / "y")))
    thread.start()
    thread.join()
    assert results[0]["status"] == "succeeded"


# --- evaluate ---------------------------------------------------------------------------------------


def test_evaluate_equals_what_training_said_to_the_last_digit(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {key: value for key, value in finished.result["metrics"].items() if key.startswith("eval_")}
    before = (finished.path / "result.json").read_bytes(), (finished.path / "events.jsonl").read_bytes()
    assert command("evaluate", str(finished.path)) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((finished.path / "evaluate.json").read_text())
    assert kept == {"status": "succeeded", **printed}
    assert printed["metrics"] == said
    assert (printed["weights"], printed["step"]) == ("adapter", 16)
    assert before == (
        (finished.path / "result.json").read_bytes(),
        (finished.path / "events.jsonl").read_bytes(),
    )


def test_a_checkpoint_is_evaluated_as_it_was(finished: RunFolder) -> None:
    newest = sorted((finished.path / "checkpoints").iterdir())[-1]
    report = evaluate(finished.path, checkpoint=newest.name)
    assert report["step"] == 16
    assert report["metrics"] == finished.points("eval")[16]
    assert report["metrics"] != finished.points("eval")[4]


def test_other_pairs_give_other_metrics_and_the_training_pairs_may_be_gone(
    new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run("gone", max_steps=2, eval_pairs=0)
    assert run.train() == 0
    Path(run.config.train_path).unlink()
    with pytest.raises(RefusedError, match="no validation pairs"):
        evaluate(run.path)
    report = evaluate(run.path, data=build_tiny_pairs(tmp_path / "other.jsonl", 3))
    assert report["data"]["kept"] == 3
    assert report["metrics"]["eval_loss"] is not None


def test_own_watch_prompts_take_time_without_validation_too(new_run: NewRun) -> None:
    """Before step 1, at the end, and by the reference: three times 32 tokens, none faster than the floor."""
    run = new_run(eval_pairs=0)
    watched = dataclasses.replace(run.config, watch_path=run.config.train_path, watch_prompts=4)
    more = estimate(watched)["seconds"] - estimate(run.config)["seconds"]
    assert more == pytest.approx(3 * 32 * FLOOR_SECONDS_PER_TOKEN["cpu"], abs=0.2)


# --- merge ------------------------------------------------------------------------------------------


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def test_a_merged_model_answers_like_base_and_adapter(finished: RunFolder, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = {path: path.read_bytes() for path in tiny_model.iterdir()}
    report = merge(finished.path, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(finished.path / "merged")
    assert report["dtype"] == "float32" and str(merged.dtype) == "torch.float32"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    bare = logits_of(base)
    adapted = logits_of(PeftModel.from_pretrained(base, finished.path / "adapter"))
    assert float((adapted - bare).abs().max()) > 0.1
    torch.testing.assert_close(logits_of(merged), adapted, rtol=1e-5, atol=2e-5)
    assert AutoTokenizer.from_pretrained(finished.path / "merged").chat_template
    assert {path.name for path in (finished.path / "merged").iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"
    }  # fmt: skip
    assert json.loads((finished.path / "merged/config.json").read_text())["use_cache"] is True
    assert before == {path: path.read_bytes() for path in tiny_model.iterdir()}
    # it is a model like any other: something to train from
    assert estimate(RunConfig(**{**vars(finished.config), "model_path": report["path"]}))["total_steps"] == 16


def test_the_dtype_is_stated_and_an_earlier_merge_is_replaced_whole(finished: RunFolder) -> None:
    from transformers import AutoModelForCausalLM

    (finished.path / "merged").mkdir(exist_ok=True)
    (finished.path / "merged/config.json").write_text("{}")
    (finished.path / "merged/old.safetensors").write_bytes(b"old")
    assert command("merge", str(finished.path), "--dtype", "bfloat16") == 0
    told = json.loads((finished.path / "merge.json").read_text())
    assert (told["status"], told["dtype"]) == ("succeeded", "bfloat16")
    assert "stored as bfloat16" in (finished.path / "merged/README.md").read_text()
    assert (
        AutoModelForCausalLM.from_pretrained(finished.path / "merged", dtype="auto").dtype == torch.bfloat16
    )
    assert list(told["sha256"]) == ["model.safetensors"]
    assert not (finished.path / "merged/old.safetensors").exists()


def test_a_merge_that_fails_leaves_the_earlier_one(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(finished.path)
    before = sorted(path.name for path in (finished.path / "merged").iterdir())

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.engine.merging.flush_to_disk", full)
    assert command("merge", str(finished.path)) == ExitCode.DISK_FULL
    assert sorted(path.name for path in (finished.path / "merged").iterdir()) == before
    assert not list(finished.path.glob(".merged-*"))


def test_what_cannot_be_merged_is_refused(finished: RunFolder, tmp_path: Path, new_run: NewRun) -> None:
    folder = build_tiny_model(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"bits": 4}}))
    quantised = new_run("quantised", model_path=str(folder))
    (quantised.path / "adapter").symlink_to(finished.path / "adapter")
    with pytest.raises(RefusedError, match="quantised"):
        merge(quantised.path)
    with pytest.raises(RefusedError, match="has no finished model"):
        merge(new_run("empty").path)
    with pytest.raises(RefusedError, match="holds something else"):
        merge(finished.path, out_dir=finished.path / "adapter")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(RefusedError, match="is not empty and not a model"):
        merge(finished.path, out_dir=full)
    with pytest.raises(RefusedError, match="dtype"):
        merge(finished.path, dtype="int8")


# --- generate ---------------------------------------------------------------------------------------


def test_generate_answers_with_both_sides_and_a_seed(finished: RunFolder, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["What is 3 plus 3?", [{"role": "user", "content": "Hello."}]]
    found = generate(finished.path, prompts, sides=("tuned", "base"), max_new_tokens=12)
    assert [(item["prompt"], item["side"]) for item in found] == [
        (0, "tuned"),
        (0, "base"),
        (1, "tuned"),
        (1, "base"),
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()

    def greedy(model: Any) -> str:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompts[0]}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return str(tokenizer.decode(out, skip_special_tokens=True)).rstrip("\ufffd")

    assert found[1]["text"] == greedy(base)
    assert found[0]["text"] == greedy(PeftModel.from_pretrained(base, finished.path / "adapter").eval())
    assert found[0]["text"] != found[1]["text"]

    draw = {"max_new_tokens": 12, "temperature": 1.0}
    texts = [generate(finished.path, prompts[:1], seed=seed, **draw)[0]["text"] for seed in (1, 1, 2)]  # type: ignore[arg-type]
    assert texts[0] == texts[1] != texts[2]


def test_generate_prints_a_line_for_each_answer(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"Hello"\n[{"role": "user", "content": "Hi"}]\n' + json.dumps(tiny_pairs(1)[0]) + "\n")
    arguments = ["--prompts", str(file), "--prompt", "First", "--max-new-tokens", "2"]
    assert command("generate", str(finished.path), *arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == [0, 1, 2, 3]
    assert json.loads((finished.path / "generate.json").read_text())["answers"] == lines


def test_full_fine_tuning_is_evaluated_and_answers_beside_its_base(new_run: NewRun, tiny_model: Path) -> None:
    run = new_run(
        finetuning_type="full",
        num_train_epochs=2,
        max_steps=6,
        learning_rate=5e-3,
        load_best_model_at_end=False,
    )
    assert run.train() == 0
    said = run.points("eval")[6]
    for report in (evaluate(run.path), evaluate(run.path, checkpoint="step-000006")):
        assert report["step"] == 6
        assert report["metrics"] == {key: said[key] for key in report["metrics"]}
    tuned, base = generate(run.path, ["Hello"], sides=("tuned", "base"), max_new_tokens=8)
    lora = new_run("lora", max_steps=1)
    assert lora.train() == 0
    assert generate(lora.path, ["Hello"], sides=("base",), max_new_tokens=8)[0]["text"] == base["text"]
    assert tuned["text"] != base["text"]
    with pytest.raises(RefusedError, match="trained the whole model"):
        merge(run.path)


def test_a_base_that_was_exchanged_is_noticed(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run(model_path=str(build_tiny_model(tmp_path / "model")), max_steps=1)
    assert run.train() == 0
    build_tiny_model(tmp_path / "model", seed=5)
    with pytest.raises(RefusedError, match="not those that it was trained on"):
        evaluate(run.path)


# --- estimate ---------------------------------------------------------------------------------------


def test_the_estimate_counts_what_training_then_does(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # weights are not read
    assert command("estimate", str(finished.path)) == 0
    found = json.loads(capsys.readouterr().out)
    result = finished.result
    assert found["total_steps"] == result["total_steps"]
    assert found["trained_tokens"] == result["num_tokens"]
    assert found["lora_parameters"] == result["num_trainable_parameters"]
    assert found["data"] == result["data"]
    assert found["memory_bytes"]["total"] == sum(v for k, v in found["memory_bytes"].items() if k != "total")
    assert found["seconds"] > 0
    assert found["fits"] == "fits"


# --- refusals on the command line -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "--checkpoint", "step-000999"], "step-000999"),
        (["evaluate", "--data", "/nowhere.jsonl"], "validation pairs are not there"),
        (["merge", "--checkpoint", "nonsense"], "nonsense"),
        (["generate"], "There is no prompt"),
        (["generate", "--prompts", "/nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["generate", "--prompt", "x", "--top-p", "0"], "top_p"),
        (["generate", "--prompt", "x" * 5000], "Prompt 1"),
    ],
)
def test_a_refusal_is_one_sentence_and_2(
    finished: RunFolder, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished.path / "result.json").read_bytes()
    assert command(arguments[0], str(finished.path), *arguments[1:]) == ExitCode.REFUSED
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    told = json.loads((finished.path / f"{arguments[0]}.json").read_text())
    assert told["status"] == "failed"
    assert words in told["error"]
    assert (finished.path / "result.json").read_bytes() == before


def test_a_damaged_checkpoint_is_not_evaluated(new_run: NewRun) -> None:
    run = new_run(max_steps=2)
    assert run.train() == 0
    file = run.path / "checkpoints/step-000002/adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RefusedError, match="another size"):
        evaluate(run.path, checkpoint="step-000002")


@pytest.mark.parametrize("name", ["train", "evaluate", "merge", "generate", "estimate"])
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(name, "--help") == 0
    text = capsys.readouterr().out
    assert "RUN_DIR" in text
    assert "exit codes" in text
    assert max(len(line) for line in text.splitlines()) <= 120


# --- the documentation ------------------------------------------------------------------------------


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/engine.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    pairs = build_tiny_pairs(tmp_path / "pairs.jsonl", 20)
    exec(
        compile(block, "docs/engine.md", "exec"), {"model_folder": str(tiny_model), "pairs_file": str(pairs)}
    )
    assert "succeeded 2 " in capsys.readouterr().out
    assert (tmp_path / "runs/first/merged/config.json").is_file()


def test_settings_that_look_at_evaluations_do_not_stop_a_finished_run_from_being_used(
    new_run: NewRun,
) -> None:
    run = new_run(eval_steps=2, early_stopping_patience=2, early_stopping_threshold=0.1, kl_budget=0.5)
    run.write()
    assert load_config(run.path).train_path == ""
