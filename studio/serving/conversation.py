"""A conversation as the page keeps it: turns with one prompt and two answers. Pure: text in, text out.

The browser holds the turns and sends them back, so they are read here as strictly as any other input.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

MAX_TURNS = 50
MAX_CHARACTERS = 100_000
TUNED = "tuned"


class ConversationError(ValueError):
    """The earlier turns cannot be used. The message is a sentence with what to do."""


@dataclasses.dataclass(frozen=True)
class Turn:
    prompt: str
    reference: str  # what the untuned side answered
    tuned: str


def read_turns(text: str, *, against: str) -> list[Turn]:
    """The earlier turns; none when they were held with another model on the left side."""
    if not text.strip():
        return []
    if len(text) > 6 * MAX_CHARACTERS:  # JSON may spell one character as \uXXXX
        raise ConversationError(_TOO_LONG)
    try:
        data = json.loads(text)
        turns = [_turn(item) for item in data["turns"]]
        held_against = str(data["against"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ConversationError("The earlier turns could not be read. Start a new conversation.") from None
    if len(turns) > MAX_TURNS or sum(map(_length, turns)) > MAX_CHARACTERS:
        raise ConversationError(_TOO_LONG)
    return turns if held_against == against else []


_TOO_LONG = (
    f"The conversation is longer than {MAX_TURNS} turns or {MAX_CHARACTERS:,} characters. "
    "Start a new conversation."
)


def _turn(item: Any) -> Turn:
    values = [item[name] for name in ("prompt", "reference", "tuned")]
    if not all(isinstance(value, str) for value in values):
        raise TypeError
    return Turn(*values)


def _length(turn: Turn) -> int:
    return len(turn.prompt) + len(turn.reference) + len(turn.tuned)


def write_turns(turns: list[Turn], *, against: str) -> str:
    return json.dumps({"against": against, "turns": [dataclasses.asdict(turn) for turn in turns]})


def messages_of(turns: list[Turn], *, system: str, prompt: str, side: str) -> list[dict[str, str]]:
    """What one side reads: its own earlier answers, never the other side's."""
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.tuned if side == TUNED else turn.reference})
    return [*messages, {"role": "user", "content": prompt}]
