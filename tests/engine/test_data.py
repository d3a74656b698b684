"""Pairs as token ids: the template, the rule for over-long pairs, what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.pairs import message, pair
from tests.engine.policies import tiny_config
from tests.tiny import build_tiny_model, tiny_pairs
from training.engine.data import (
    CHOSEN_SIDE,
    TokenizedPair,
    data_sha256,
    length_sorted_batches,
    read_pairs,
    tokenize_pairs,
    within_budget,
)
from training.engine.errors import RefusedError
from training.engine.policy import load_tokenizer


def test_completions_are_what_the_template_adds(tokenizer: Any) -> None:
    source = tiny_pairs(5)
    tokenized, report = tokenize_pairs(source, tokenizer, max_length=1024)
    assert (report.read, report.truncated, report.dropped) == (5, 0, 0)
    for raw, ids in zip(source, tokenized, strict=True):
        assert tokenizer.decode(ids.prompt).endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(ids.chosen) == raw["chosen"][0]["content"] + "<|im_end|>\n"  # type: ignore[index]
        assert tokenizer.decode(ids.rejected) == raw["rejected"][0]["content"] + "<|im_end|>\n"  # type: ignore[index]


def test_any_text_survives(tokenizer: Any) -> None:
    text = "naïve 你好 😀\r\n\t<script>"
    source = [
        {"id": "1", "prompt": [message(text, "user")], "chosen": [message(text)], "rejected": [message("x")]}
    ]
    tokenized, _ = tokenize_pairs(source, tokenizer, max_length=1024)
    assert tokenizer.decode(tokenized[0].chosen) == text + "<|im_end|>\n"


def test_a_template_that_refuses_a_conversation_costs_only_that_pair(tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role here') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    folder = build_tiny_model(tmp_path / "model", chat_template=template)
    kept, report = tokenize_pairs(tiny_pairs(8), load_tokenizer(tiny_config(folder)), max_length=999)
    assert (len(kept), report.refused_by_template) == (6, 2)
    assert "No system role here" in "\n".join(report.sentences("training", 999))


def test_a_model_without_template_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", chat_template=None)
    with pytest.raises(RefusedError) as refused:
        load_tokenizer(tiny_config(folder))
    assert "no chat template" in refused.value.sentence
    assert "chat_template.jinja" in refused.value.next_step


USER, ANSWER = [message("hello", "user")], [message("good")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "it is not JSON (Expecting property name enclosed in double quotes at character 2)"),
        ("[", "it begins a list, and each line must be one object"),
        ("[]", "it is a list, not an object"),
        ("3", "it is the number 3, not an object"),
        ('{"prompt": []}', "it has no chosen and no rejected; its keys are prompt"),
        (
            {"input": {"messages": USER}, "preferred_output": ANSWER, "non_preferred_output": ANSWER},
            "it has no prompt and no chosen and no rejected; its keys are input, non_preferred_output, "
            "preferred_output (the preference form of Together and OpenAI)",
        ),
        (
            {"chosen": USER + ANSWER, "rejected": USER + ANSWER},
            "TRL's form with the prompt inside both sides",
        ),
        (
            {"prompt": "x", "chosen": "y", "rejected": "z"},
            "its prompt is the text “x”, not a list of messages",
        ),
        ({"prompt": USER, "chosen": 3, "rejected": []}, "its chosen is the number 3, not a list of messages"),
        ({"prompt": USER, "chosen": ANSWER, "rejected": ["z"]}, "its rejected is a list with the text “z”"),
        ({"prompt": [{"role": "user"}], "chosen": [], "rejected": []}, "a message without content"),
        (
            {"prompt": USER, "chosen": [{"role": "assistant", "content": None}], "rejected": []},
            "its chosen is a list with a message whose content is null",
        ),
    ],
)
def test_a_line_of_another_form_is_named_with_what_was_found_and_what_is_read(
    line: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        f"{json.dumps(tiny_pairs(1)[0])}\n{line if isinstance(line, str) else json.dumps(line)}\n"
    )
    with pytest.raises(RefusedError) as refused:
        read_pairs(path)
    assert refused.value.sentence.startswith(f"Line 2 of {path} is not a preference pair: ")
    assert words in refused.value.sentence
    expected = '"chosen": [{"role": "assistant", "content": "…"}], "rejected": [{"role": "assistant", "content": "…"}]}'
    assert expected in refused.value.next_step


def test_a_form_is_asked_only_for_the_sides_that_are_read(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({"prompt": USER, "completion": ANSWER}) + "\n")
    assert read_pairs(path, sides=()) == [{"id": "1", "prompt": USER, "completion": ANSWER}]
    with pytest.raises(RefusedError) as refused:
        read_pairs(path, sides=CHOSEN_SIDE)
    assert "is not an example with a prompt and a chosen answer: it has no chosen;" in refused.value.sentence
    assert "TRL's prompt and completion" in refused.value.sentence
    assert "rejected" not in refused.value.next_step


@pytest.mark.parametrize("blank", [[], [message("")], [message(" \n\t")], [message("well"), message("")]])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_empty_answer_is_dropped_and_counted_not_learnt_as_its_end(
    blank: list[dict[str, str]], side: str, tokenizer: Any
) -> None:
    source = tiny_pairs(3)
    source[1][side] = blank
    kept, report = tokenize_pairs(source, tokenizer, max_length=1024)
    assert [item.id for item in kept] == ["pair-0000", "pair-0002"]
    assert (report.counts()["empty_answer"], report.counts()["dropped"], report.counts()["kept"]) == (1, 1, 2)
    assert "1 training pairs were dropped: an answer is empty text." in report.sentences("training", 1024)
    kept, report = tokenize_pairs(source, tokenizer, max_length=1024, sides=CHOSEN_SIDE)
    assert len(kept) == (2 if side == "chosen" else 3)  # SFT does not read the other answer


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content"])
def test_an_answer_that_says_something_beside_its_text_is_not_empty(key: str, tokenizer: Any) -> None:
    source = tiny_pairs(2)
    source[0]["chosen"] = [message("") | {key: [{"name": "search"}]}]
    source[1]["chosen"] = [message("") | {key: None}]
    kept, report = tokenize_pairs(source, tokenizer, max_length=1024)
    assert [item.id for item in kept] == ["pair-0000"] and report.counts()["empty_answer"] == 1


def test_a_number_of_thousands_of_digits_and_a_key_without_end_are_said_shortly(tmp_path: Path) -> None:
    for line, said in ((f'{{"score": {"9" * 5000}}}', "too many digits"), (f'{{"{"k" * 9999}": 1}}', "kkk…")):
        (tmp_path / "pairs").write_text(line + "\n")
        with pytest.raises(RefusedError) as refused:
            read_pairs(tmp_path / "pairs")
        assert said in refused.value.sentence and len(refused.value.sentence) < 400


def test_the_hash_sees_where_prompt_and_completion_meet() -> None:
    ids = np.arange(10, dtype=np.int32)
    one = TokenizedPair("x", ids[:4], ids[4:7], ids[7:])
    two = TokenizedPair("x", ids[:5], ids[5:7], ids[7:])
    assert one.digest() != two.digest()
    assert data_sha256([one, two]) != data_sha256([two, one])


def test_batches_without_gradient_are_longest_first_and_complete() -> None:
    pairs = [pair(n, n, n) for n in (1, 50, 3, 20, 200)]
    batches = list(length_sorted_batches(pairs, budget=100))
    assert [[len(item.prompt) for item in batch] for batch in batches] == [[200], [50], [20, 3, 1]]
    kept = list(within_budget(pairs, budget=160))
    assert [[len(item.prompt) for item in batch] for batch in kept] == [[1, 50], [3, 20], [200]]
