"""Whatever cannot work ends with the contract's exit code and one sentence with the next step in result.json."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import NewRun, RunFolder
from tests.tiny import CHAT_TEMPLATE, build_tiny_model, build_tiny_pairs
from training.contract import ExitCode
from training.engine.divergence import ENOUGH, EXPLODING_LIMIT, is_exploding
from training.engine.loop import Loop

Bad = Callable[[NewRun, Path, pytest.MonkeyPatch], RunFolder]


def unknown_model_type(new_run: NewRun, folder: Path, _: Any) -> RunFolder:
    model = build_tiny_model(folder / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"model_type": "nobody-knows"}))
    return new_run(model_path=str(model))


def no_chat_template(new_run: NewRun, folder: Path, _: Any) -> RunFolder:
    return new_run(model_path=str(build_tiny_model(folder / "model", chat_template=None)))


def no_file_for_the_template(new_run: NewRun, folder: Path, _: Any) -> RunFolder:
    return new_run(chat_template_path=str(folder / "nowhere.jinja"))


def broken_template(new_run: NewRun, folder: Path, _: Any) -> RunFolder:
    (folder / "broken.jinja").write_text("{% for %}")
    return new_run(chat_template_path=str(folder / "broken.jinja"))


def tokenizer_larger_than_the_model(new_run: NewRun, folder: Path, _: Any) -> RunFolder:
    import torch
    from transformers import AutoModelForCausalLM

    path = build_tiny_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.resize_token_embeddings(100)
    model.save_pretrained(path)
    return new_run(model_path=str(path))


def adapter_for_another_base(new_run: NewRun, folder: Path, _: Any) -> RunFolder:
    other = new_run("other", model_path=str(build_tiny_model(folder / "model", hidden_size=48)), max_steps=1)
    assert other.train() == 0
    return new_run(adapter_path=str(other.path / "adapter"))


def adapter_with_another_vocabulary(new_run: NewRun, folder: Path, _: Any) -> RunFolder:
    other = new_run("other", max_steps=1)
    assert other.train() == 0
    path = other.path / "adapter/tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|the_end|>"))
    return new_run(adapter_path=str(other.path / "adapter"))


def empty_split(new_run: NewRun, folder: Path, _: Any) -> RunFolder:
    (folder / "empty.jsonl").write_text("\n")
    return new_run(eval_path=str(folder / "empty.jsonl"))


def one_pair(new_run: NewRun, folder: Path, _: Any) -> RunFolder:
    return new_run(train_path=str(build_tiny_pairs(folder / "one.jsonl", 1)))


def all_pairs_over_long(new_run: NewRun, folder: Path, _: Any) -> RunFolder:
    return new_run(max_length=16, truncation_mode="keep_start")


def wrong_dtype(new_run: NewRun, folder: Path, _: Any) -> RunFolder:
    return new_run(dtype="float16")


def no_such_device(new_run: NewRun, folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return new_run(device="cuda")


def device_without_bfloat16(new_run: NewRun, folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: False)
    return new_run(device="cuda", dtype="bfloat16")


def nan_loss(new_run: NewRun, folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    scale_losses(monkeypatch, lambda step: math.nan)
    return new_run(num_train_epochs=4)


def exploding_gradient(new_run: NewRun, folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    scale_losses(monkeypatch, lambda step: 1e6 if step >= ENOUGH + 2 else 1.0)
    return new_run(num_train_epochs=9)


def full_disk(new_run: NewRun, folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    def full(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.engine.loop.save_checkpoint", full)
    return new_run()


def scale_losses(monkeypatch: pytest.MonkeyPatch, factor: Callable[[int], float]) -> None:
    real = Loop.score

    def scaled(self: Loop, *arguments: Any) -> Any:
        losses, logps = real(self, *arguments)
        return losses * factor(self.state.step), logps

    monkeypatch.setattr(Loop, "score", scaled)


REFUSED, DIVERGED = ExitCode.REFUSED, ExitCode.DIVERGED


@pytest.mark.parametrize(
    ("bad", "code", "words", "next_words"),
    [
        (unknown_model_type, REFUSED, "nobody-knows", "base model"),
        (no_chat_template, REFUSED, "no chat template", "chat_template.jinja"),
        (no_file_for_the_template, REFUSED, "chat template is not there", "chat_template_path"),
        (broken_template, REFUSED, "chat template refused them", "dataset"),
        (tokenizer_larger_than_the_model, REFUSED, "more tokens than the base model", "base model"),
        (adapter_for_another_base, REFUSED, "base model", "base model"),
        (adapter_with_another_vocabulary, REFUSED, "token", "base model"),
        (empty_split, REFUSED, "There are no validation pairs in ", "Prepare the dataset again"),
        (one_pair, REFUSED, "Only one training pair is left of 1", "Add more"),
        (all_pairs_over_long, REFUSED, "No training pair is left of 16", "max_context_length"),
        (wrong_dtype, REFUSED, "float16", "bfloat16"),
        (no_such_device, REFUSED, "no usable CUDA device", "cpu"),
        (device_without_bfloat16, REFUSED, "no bfloat16", "float32"),
        (nan_loss, DIVERGED, "no finite loss or gradient", "learning_rate"),
        (exploding_gradient, DIVERGED, "over 100 times its usual value", "learning_rate"),
        (full_disk, ExitCode.DISK_FULL, "disk is full", "Free some space"),
    ],
)
def test_bad_input_ends_with_a_code_and_a_sentence(
    bad: Bad, code: int, words: str, next_words: str,
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = bad(new_run, tmp_path, monkeypatch)
    assert run.train() == code
    result = run.result
    assert result["status"] == "failed"
    assert words in result["error"]
    assert next_words in result["next_step"]
    assert "\n" not in result["error"] + result["next_step"]
    assert "Traceback" not in result["error"]
    assert not (run.path / "adapter").exists()


def test_a_run_whose_gradient_jumps_once_goes_on(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_losses(monkeypatch, lambda step: 1e6 if step == ENOUGH + 2 else 1.0)
    run = new_run(num_train_epochs=4)
    assert run.train() == 0
    assert "had a gradient norm of" in run.texts()
    assert f"step-{ENOUGH + 3:06d}" not in str([event.get("path") for event in run.events])


def test_a_jump_is_measured_by_the_calm_steps_and_by_the_clipping() -> None:
    norms: list[float] = []
    assert not any(is_exploding(norms, norm, 1.0) for norm in [1e9] * (ENOUGH - 1))  # no median yet
    norms = [1.0] * ENOUGH
    for _ in range(99):
        assert is_exploding(norms, 101.0, 1.0)  # and never becomes usual
    assert not is_exploding(norms, 99.0, 1.0)
    learnt = [1e-6] * ENOUGH
    assert not is_exploding(learnt, 9.0, 1.0)  # a wrong pair among learnt ones
    assert is_exploding(learnt, 11.0, 1.0)
    assert EXPLODING_LIMIT > 1


def test_a_chat_template_can_be_named(new_run: NewRun, tmp_path: Path) -> None:
    bare = build_tiny_model(tmp_path / "model", chat_template=None)
    (tmp_path / "mine.jinja").write_text(CHAT_TEMPLATE.replace("<|im_end|>", "<|im_end|>!"))
    named = new_run(model_path=str(bare), chat_template_path=str(tmp_path / "mine.jinja"), max_steps=1)
    assert named.train() == 0
    assert "<|im_end|>!" in (named.path / "adapter/chat_template.jinja").read_text()
    own = new_run("own", max_steps=1)
    assert own.train() == 0
    assert own.result["data_sha256"] != named.result["data_sha256"]


def test_a_base_that_prepares_embeddings_before_its_decoder_is_refused(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training calls the decoder alone: what a base does before it would be left out."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    theirs = LlamaForCausalLM.forward

    def scaled(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **keywords: Any) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids) * 5
        return theirs(self, inputs_embeds=inputs_embeds, **keywords)

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    run = new_run(max_steps=1)
    assert run.train() == ExitCode.REFUSED
    assert "have an output layer that is not known here" in run.result["error"]
