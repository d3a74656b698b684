"""Two shapes of preference pairs to measure with: long answers, and long prompts with short answers.

The words are those of the example data, in a random order; only lengths matter here. They are drawn from
log-normal distributions with the means that were measured on public data: answers that explain (LLaMA-Factory's
English DPO demo) and answers of a dialogue (Anthropic's harmless pairs).
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parent.parent / "datasets_app" / "example" / "short_and_direct.jsonl"
SPREAD = 0.5  # sigma of the log of a length


@dataclasses.dataclass(frozen=True)
class Shape:
    """Mean tokens of each part, and how many pairs a step of the benchmark takes."""

    name: str
    prompt: int
    chosen: int
    rejected: int
    batch_size: int


SHAPES = (Shape("long answers", 158, 213, 217, 2), Shape("short answers", 133, 39, 52, 4))


def pairs_of(shape: Shape, count: int, tokenizer: Any, *, max_length: int, seed: int) -> list[dict[str, Any]]:
    """Canonical pairs that fit into `max_length` tokens with their template, so that nobody cuts them."""
    draw = random.Random(f"{shape.name} {seed}")
    words = _words()
    room = max_length - 48  # what a template adds

    def length(mean: int, most: int) -> int:
        return min(most, max(4, round(draw.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD))))

    def text(wanted: int) -> str:
        start = draw.randrange(len(words))
        drawn = " ".join(words[(start + i) % len(words)] for i in range(wanted))
        return str(tokenizer.decode(tokenizer(drawn, add_special_tokens=False)["input_ids"][:wanted]))

    rows = []
    for number in range(count):
        prompt = length(shape.prompt, room // 2)
        chosen, rejected = (length(mean, room - prompt) for mean in (shape.chosen, shape.rejected))
        rows.append(
            {
                "id": f"{shape.name} {number}",
                "prompt": [{"role": "user", "content": text(prompt)}],
                "chosen": [{"role": "assistant", "content": text(chosen)}],
                "rejected": [{"role": "assistant", "content": text(rejected)}],
            }
        )
    return rows


def _words() -> list[str]:
    rows = [json.loads(line) for line in EXAMPLE.read_text(encoding="utf-8").splitlines()]
    texts = [
        message["content"]
        for row in rows
        for side in ("prompt", "chosen", "rejected")
        for message in row[side]
    ]
    words = " ".join(texts).split()
    random.Random(0).shuffle(words)
    return words
