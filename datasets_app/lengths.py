"""How long texts are: characters, estimated tokens, and histograms with fixed edges; no tokenizer."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from datasets_app.formats.pair import Message, Pair

CHARACTERS_PER_TOKEN = 4.0
CHARACTERS_PER_TOKEN_CJK = 1.5
TOKENS_PER_MESSAGE = 5  # a chat template's marks around each message
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")

CHARACTER_EDGES = (50, 100, 200, 400, 800, 1600, 3200, 6400, 12800)
TOKEN_EDGES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PARTS = ("prompt", "chosen", "rejected")


def estimate_tokens(text: str) -> float:
    """A guess good enough to plan with; the engine counts exactly."""
    cjk = 0 if text.isascii() else sum(1 for _ in _CJK.finditer(text))
    return (len(text) - cjk) / CHARACTERS_PER_TOKEN + cjk / CHARACTERS_PER_TOKEN_CJK


def size_of(messages: list[Message]) -> tuple[int, float]:
    """Characters of the texts, and estimated tokens with the marks between messages."""
    characters = sum(len(message["content"]) for message in messages)
    tokens = sum(estimate_tokens(message["content"]) + TOKENS_PER_MESSAGE for message in messages)
    return characters, tokens


@dataclass
class _Lengths:
    """Sums, maxima and histograms of one part of the pairs."""

    characters: int = 0
    tokens: float = 0.0
    max_characters: int = 0
    by_characters: list[int] = field(default_factory=lambda: [0] * (len(CHARACTER_EDGES) + 1))
    by_tokens: list[int] = field(default_factory=lambda: [0] * (len(TOKEN_EDGES) + 1))

    def add(self, characters: int, tokens: float) -> None:
        self.characters += characters
        self.tokens += tokens
        self.max_characters = max(self.max_characters, characters)
        self.by_characters[bisect_right(CHARACTER_EDGES, characters)] += 1
        self.by_tokens[bisect_right(TOKEN_EDGES, tokens)] += 1


class Statistics:
    """Collects over all pairs in constant memory; `to_json()` is `Dataset.stats`."""

    def __init__(self) -> None:
        self.num_pairs = self.num_multi_turn = self.num_system = self.num_chosen_longer = 0
        self.num_same_length = self.length_difference = 0
        self.total_max = 0.0
        self._parts = {name: _Lengths() for name in PARTS}

    def add(self, pair: Pair) -> None:
        sizes = {
            "prompt": size_of(pair["prompt"]),
            "chosen": size_of(pair["chosen"]),
            "rejected": size_of(pair["rejected"]),
        }
        for name, (characters, tokens) in sizes.items():
            self._parts[name].add(characters, tokens)
        chosen, rejected = sizes["chosen"], sizes["rejected"]
        self.num_pairs += 1
        self.num_multi_turn += _is_multi_turn(pair)
        self.num_system += pair["prompt"][0]["role"] == "system"
        self.num_chosen_longer += chosen[0] > rejected[0]
        self.num_same_length += chosen[0] == rejected[0]
        self.length_difference += chosen[0] - rejected[0]
        self.total_max = max(self.total_max, sizes["prompt"][1] + max(chosen[1], rejected[1]))

    def to_json(self, *, num_prompts: int) -> dict[str, Any]:
        count = max(self.num_pairs, 1)
        parts = self._parts
        return {
            "num_prompts": num_prompts,
            "num_multi_turn": self.num_multi_turn,
            "num_system": self.num_system,
            "num_chosen_longer": self.num_chosen_longer,
            "num_same_length": self.num_same_length,
            "mean_length_difference": round(self.length_difference / count, 1),
            "characters": {name: round(parts[name].characters / count, 1) for name in PARTS},
            "max_characters": {name: parts[name].max_characters for name in PARTS},
            "tokens_estimate": {
                **{name: round(parts[name].tokens / count, 1) for name in PARTS},
                "total_max": round(self.total_max),
            },
            "histograms": {
                "characters": {
                    "edges": list(CHARACTER_EDGES),
                    **{name: parts[name].by_characters for name in PARTS},
                },
                "tokens": {"edges": list(TOKEN_EDGES), **{name: parts[name].by_tokens for name in PARTS}},
            },
        }


def _is_multi_turn(pair: Pair) -> bool:
    asked = sum(message["role"] == "user" for message in pair["prompt"])
    return asked > 1 or len(pair["chosen"]) > 1 or len(pair["rejected"]) > 1
