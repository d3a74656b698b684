"""Answers of base and tuned model: equal to those of transformers, reproducible, in whole characters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import build_tiny_model
from training.engine.chat import ChatRefused, Models, prompt_tokens
from training.engine.generation import Answer, GenerationError, Sampler, Sampling, TextStream, generate

REPOSITORY = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "Say something."}]
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=40, seed=0)


def make_adapter(base: Path, folder: Path, *, spread: float, seed: int = 1, **lora: Any) -> Path:
    """An adapter on the tiny model. `spread` 0 leaves B at zero: it changes nothing."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **lora)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name and spread:
            torch.nn.init.normal_(weight, std=spread)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), spread=0.3)


def answers_of(
    models: Models, sampling: Sampling, messages: list[dict[str, str]] = MESSAGES
) -> dict[str, list[int]]:
    prompt = prompt_tokens(models.tokenizer, messages)
    answers = [
        Answer(side, model, prompt, models.tokenizer, sampling) for side, model in models.sides.items()
    ]
    for _ in generate(answers, is_cancelled=lambda: False):
        pass
    return {answer.side: answer.tokens for answer in answers}


def reference_answer(model: Any, prompt: list[int], eos: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    tokens = out[0, len(prompt) :].tolist()
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


def test_greedy_answers_equal_those_of_transformers_on_both_sides(base: Path, adapter: Path) -> None:
    models = Models(str(base))
    models.attach({"tuned": str(adapter)})
    found = answers_of(models, GREEDY)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = prompt_tokens(tokenizer, MESSAGES)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert found["base"] == reference_answer(plain, prompt, tokenizer.eos_token_id)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    assert found["tuned"] == reference_answer(tuned, prompt, tokenizer.eos_token_id)
    assert found["base"] != found["tuned"]


def test_a_zero_adapter_answers_as_the_base_even_when_drawing(base: Path, tmp_path: Path) -> None:
    models = Models(str(base))
    models.attach({"tuned": str(make_adapter(base, tmp_path / "zero", spread=0.0))})
    found = answers_of(models, Sampling(temperature=1.0, top_p=0.9, max_new_tokens=40, seed=7))
    assert len(found["base"]) > 5
    assert found["base"] == found["tuned"]


def test_the_base_is_in_memory_once_and_stays_bare(base: Path, adapter: Path) -> None:
    models = Models(str(base))
    models.attach({"tuned": str(adapter), "parent": str(adapter)})
    for name, weight in models.base.named_parameters():
        assert "lora" not in name
        for side in ("tuned", "parent"):
            shared = dict(models.sides[side].named_parameters())
            assert weight.data_ptr() in {tensor.data_ptr() for tensor in shared.values()}, name


def test_attaching_other_adapters_drops_those_not_named(base: Path, adapter: Path) -> None:
    models = Models(str(base))
    models.attach({"tuned": str(adapter), "parent": str(adapter)})
    kept = models.sides["tuned"]
    models.attach({"tuned": str(adapter)})
    assert set(models.sides) == {"base", "tuned"}
    assert models.sides["tuned"] is kept


def test_both_sides_grow_together_and_a_cancelled_answer_ends_at_once(base: Path, adapter: Path) -> None:
    models = Models(str(base))
    models.attach({"tuned": str(adapter)})
    prompt = prompt_tokens(models.tokenizer, MESSAGES)
    hot = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=1000, seed=5)
    left, right = (Answer(side, model, prompt, models.tokenizer, hot) for side, model in models.sides.items())
    finished = []
    for piece in generate([left, right], is_cancelled=lambda: len(left.tokens) >= 12):
        if piece.finish_reason:
            finished.append((piece.side, piece.finish_reason))
        elif not finished:
            assert abs(len(left.tokens) - len(right.tokens)) <= 1
    assert ("base", "cancelled") in finished
    # Unless it ended by itself before, the other side is cancelled with it.
    assert len(right.tokens) < 12 or ("tuned", "cancelled") in finished
    assert len(left.tokens) == 12


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(base: Path) -> None:
    models = Models(str(base))
    hot = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 30}
    first = answers_of(models, Sampling(**hot, seed=1))
    assert answers_of(models, Sampling(**hot, seed=1)) == first
    assert answers_of(models, Sampling(**hot, seed=2)) != first


def test_top_p_never_draws_outside_the_smallest_sufficient_set() -> None:
    logits = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3]))
    draw = Sampler(Sampling(temperature=1.0, top_p=0.75, max_new_tokens=1, seed=3))
    drawn = [draw(logits) for _ in range(400)]
    assert set(drawn) == {1, 3}  # 0.5 + 0.3 is the smallest set that reaches 0.75
    assert abs(drawn.count(1) / 400 - 0.5 / 0.8) < 0.08


def test_temperature_zero_takes_the_best_and_a_tiny_temperature_too() -> None:
    logits = torch.tensor([0.1, 2.0, 1.9])
    for temperature in (0.0, 0.001):
        assert Sampler(Sampling(temperature=temperature, top_p=1.0, max_new_tokens=1, seed=0))(logits) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_predictions_that_are_not_numbers_are_a_sentence(temperature: float) -> None:
    draw = Sampler(Sampling(temperature=temperature, top_p=0.9, max_new_tokens=1, seed=0))
    with pytest.raises(GenerationError, match="not numbers"):
        draw(torch.full((8,), float("nan")))


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=40).filter(lambda text: "\ufffd" not in text))
def test_streamed_text_is_the_text_and_no_piece_holds_half_a_character(base: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    pieces.append(stream.flush())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_by_the_token_limit_is_left_out(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("a🌊", add_special_tokens=False)["input_ids"]  # one token a byte: the wave is four
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in ids[:-1]) + stream.flush() == "a"


def test_a_conversation_longer_than_the_model_reads_is_refused_with_a_sentence(base: Path) -> None:
    models = Models(str(base))
    with pytest.raises(GenerationError, match="4096"):
        answers_of(models, GREEDY, [{"role": "user", "content": "x" * 5000}])


def test_an_adapter_of_another_model_is_refused_with_a_sentence(base: Path, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "other", hidden_size=64)
    adapter = make_adapter(other, tmp_path / "adapter", spread=0.1)
    with pytest.raises(ChatRefused, match="does not fit"):
        Models(str(base)).attach({"tuned": str(adapter)})


def test_an_adapter_with_weights_that_have_no_place_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """peft only warns, and would answer as the bare base."""
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", "query"): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(ChatRefused, match="does not fit"):
        Models(str(base)).attach({"tuned": str(tmp_path)})


def test_a_template_that_refuses_the_system_role_says_so(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_model(tmp_path, chat_template=template))
    with pytest.raises(ChatRefused, match="without"):
        prompt_tokens(tokenizer, [{"role": "system", "content": "s"}, *MESSAGES])


# --- the process ------------------------------------------------------------------------------------------
class Child:
    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "training.engine", "chat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=REPOSITORY,
            env=environment,
        )

    def say(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        event: dict[str, Any] = json.loads(self.process.stdout.readline())
        return event

    def generate(self, name: str, **changes: Any) -> None:
        self.say(
            **{
                "type": "generate",
                "id": name,
                "sides": {"base": MESSAGES, "tuned": MESSAGES},
                "temperature": 0.0,
                "top_p": 1.0,
                "max_new_tokens": 30,
                "seed": 0,
                **changes,
            }
        )


@pytest.fixture
def child(base: Path, adapter: Path) -> Iterator[Child]:
    child = Child()
    child.say(type="load", model_path=str(base), adapters={"tuned": str(adapter)})
    assert child.hear()["type"] == "ready"
    yield child
    child.process.kill()
    child.process.wait()


@pytest.mark.slow
def test_the_process_streams_both_sides_cancels_and_leaves_when_its_stdin_closes(
    child: Child, base: Path
) -> None:
    child.generate("one", temperature=1.0, max_new_tokens=60)
    events = [child.hear()]
    while events[-1]["type"] != "end":
        events.append(child.hear())
    text = {"base": "", "tuned": ""}
    for event in events:
        if event["type"] == "text":
            text[event["side"]] += event["text"]
    assert text["base"] and text["tuned"] and text["base"] != text["tuned"]
    done = {event["side"]: event for event in events if event["type"] == "done"}
    assert done["base"]["num_prompt_tokens"] == len(
        prompt_tokens(AutoTokenizer.from_pretrained(base), MESSAGES)
    )

    child.generate("two", max_new_tokens=2048, temperature=2.0, seed=3, sides={"base": MESSAGES})
    assert child.hear()["type"] == "text"
    child.say(type="cancel", id="two")
    while (event := child.hear())["type"] == "text":
        pass
    assert event["finish_reason"] == "cancelled"
    assert event["num_tokens"] < 2048
    assert child.hear()["type"] == "end"

    child.generate("three", sides={"base": [{"role": "user", "content": "x" * 5000}]})
    assert "4096" in child.hear()["text"]
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.process.wait(timeout=5) == 0


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="the death signal is Linux's; elsewhere the closed pipe does it"
)
def test_the_process_dies_with_the_one_that_started_it(tmp_path: Path) -> None:
    """Also when another process still holds its stdin open, so that no end of file comes."""
    program = (
        "import os,subprocess,sys,time\n"
        "r,w=os.pipe()\n"
        "p=subprocess.Popen([sys.executable,'-m','training.engine','chat'],stdin=r,stdout=subprocess.PIPE)\n"
        "keeper=subprocess.Popen(['sleep','60'],pass_fds=[w])\n"
        "p.stdin=None\n"
        'os.write(w,b\'{"type":"generate","id":"x"}\\n\')\n'
        "p.stdout.readline()\n"
        "print(p.pid,keeper.pid,flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=REPOSITORY, text=True
    )
    assert parent.stdout is not None
    chat, keeper = map(int, parent.stdout.readline().split())
    try:
        parent.kill()
        parent.wait()
        for _ in range(100):
            if not Path(f"/proc/{chat}").exists() or "Z" in Path(f"/proc/{chat}/stat").read_text().split()[2]:
                return
            signal.sigtimedwait([], 0.05)
        pytest.fail("the chat process outlived its parent")
    finally:
        os.kill(keeper, signal.SIGKILL)
