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


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"prompt": []}', '{"prompt": "x", "chosen": [], "rejected": []}']
)
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(tiny_pairs(1)[0]) + "\n" + line + "\n")
    with pytest.raises(RefusedError, match=r"Line 2 of pairs\.jsonl"):
        read_pairs(path)


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
