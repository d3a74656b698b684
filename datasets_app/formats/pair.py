"""The canonical preference pair, and the reading of one record's texts and messages into it.

Knows JSON values only: no files, no line numbers, no Django. All that is wrong is noted, each as a `Problem`,
so that a line with two bad fields is reported with both.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypedDict

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
MAX_PROBLEMS = 20  # a line: a list of a million numbers is one mistake, not a million
MESSAGE_KEYS = {"role", "content", "from", "value"}
MISSING: Any = object()  # noted already: nothing more is said about it
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Message(TypedDict):
    role: str
    content: str


class Pair(TypedDict):
    """`chosen` and `rejected` do not repeat the prompt; each begins and ends with an assistant message."""

    id: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that keeps a record from being a pair: where, what was there, what should be, what to do."""

    code: str
    field: str
    found: str
    expected: str
    next_step: str


def prompt_key(prompt: list[Message]) -> bytes:
    """The same for prompts that differ in white space only; used to keep a prompt on one side of a split."""
    parts = [[message["role"], " ".join(message["content"].split())] for message in prompt]
    return blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def shorten(text: str, limit: int = 60) -> str:
    """A quotable piece of somebody's text: one line, no control characters, never longer than `limit`."""
    piece = "".join(char if char.isprintable() else " " for char in text[: limit + 1])
    return piece if len(piece) <= limit else piece[: limit - 1] + "…"


def describe(value: Any) -> str:
    """What was found, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the value {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value:.12g}"
    if isinstance(value, str):
        return f"the text “{shorten(value)}”" if value.strip() else "empty text"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    keys = ", ".join(shorten(str(key), 24) for key in list(value)[:8])
    return f"an object with the keys {keys}" if value else "an empty object"


class Record:
    """One JSON object on its way to a pair."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value
        self.problems: list[Problem] = []
        self.unknown: set[str] = set()

    def refuse(self, code: str, field: str, found: str, expected: str, next_step: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(code, field, found, expected, next_step))

    def require(self, key: str) -> Any:
        """The value of a key that must be there; `MISSING`, and noted, when it is not."""
        if key not in self.value:
            self.refuse(
                "missing_key",
                key,
                "no such key",
                f"the key `{key}`",
                f"Add `{key}` to this record, or remove the record.",
            )
        return self.value.get(key, MISSING)

    def text(self, value: Any, field: str) -> str:
        """A string, or a list of text parts joined; anything else is noted and gives ""."""
        if value is MISSING:
            return ""
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            return self._text_of_parts(value, field)
        if not isinstance(value, str):
            self.refuse("not_text", field, describe(value), "text", "Write the text in quotes.")
            return ""
        if LONE_SURROGATE.search(value):
            self.refuse(
                "broken_character",
                field,
                "half of a surrogate pair, such as \\ud83d alone",
                "whole characters",
                "Export the file again as UTF-8; the text was cut in the middle of a character.",
            )
            return ""
        return value

    def _text_of_parts(self, parts: list[dict[str, Any]], field: str) -> str:
        texts = []
        for index, part in enumerate(parts):
            if part.get("type", "text") != "text":
                self.refuse(
                    "not_text",
                    f"{field}[{index}]",
                    f"a part of type {describe(part.get('type'))}",
                    "a part of type “text”",
                    "Only text can be trained on here: remove the other parts, or the record.",
                )
                continue
            texts.append(self.text(part.get("text", part.get("value")), f"{field}[{index}].text"))
        return "".join(texts)

    def message(self, value: Any, field: str) -> Message | None:
        """`{"role", "content"}`, or `{"from", "value"}` as some tools write it."""
        if not isinstance(value, dict):
            self.refuse(
                "not_a_message",
                field,
                describe(value),
                "a message such as {“role”: “user”, “content”: “…”}",
                "Write every message as an object with `role` and `content`.",
            )
            return None
        self.unknown.update(f"{field.split('[')[0]}[].{key}" for key in value if key not in MESSAGE_KEYS)
        name, content = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
        role = value.get(name)
        if not isinstance(role, str) or role not in ALIASES:
            found = describe(role) if name in value else "no role"
            self.refuse(
                "unknown_role",
                f"{field}.{name}",
                found,
                f"one of {', '.join(ROLES)}",
                "Correct the role of this message.",
            )
        if value.get(content) is None and ("tool_calls" in value or "function_call" in value):
            self.refuse(
                "tool_call",
                field,
                "a tool call without text",
                "a message with text in `content`",
                "Write the call as text, the way the model should say it, or remove the record.",
            )
            return None
        text = self.text(value.get(content), f"{field}.{content}")
        return {"role": ALIASES.get(role, "user") if isinstance(role, str) else "user", "content": text}

    def messages(self, value: Any, field: str) -> list[Message]:
        """A list of messages with at least one in it."""
        if value is MISSING:
            return []
        if not isinstance(value, list) or not value:
            self.refuse(
                "not_messages",
                field,
                describe(value),
                "a list of messages",
                "Write a list with at least one message, each with `role` and `content`.",
            )
            return []
        read = []
        for index, item in enumerate(value):
            message = self.message(item, f"{field}[{index}]")
            if message is not None:
                read.append(message)
            if len(self.problems) >= MAX_PROBLEMS:
                break
        return read

    def answer(self, value: Any, field: str) -> list[Message]:
        """One assistant message: an object, or a list of exactly one."""
        if value is MISSING:
            return []
        if isinstance(value, list) and len(value) != 1:
            self.refuse(
                "not_one_answer",
                field,
                describe(value),
                "exactly one assistant message",
                "Keep the one message that answers the prompt.",
            )
            return []
        message = self.message(value[0] if isinstance(value, list) else value, field)
        if message is None:
            return []
        if message["role"] != "assistant":
            self._refuse_role(field, message["role"])
        return [message]

    def _refuse_role(self, field: str, role: str) -> None:
        self.refuse(
            "answer_not_by_assistant",
            field,
            f"a message of the {role}",
            "a message of the assistant",
            "Check whether the roles are swapped; the answer being rated is always the assistant's.",
        )

    def pair(self, prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Pair | None:
        """The canonical pair; None when anything was wrong.

        What both sides begin with belongs to the prompt: it cancels out of the loss, and so trajectories
        that part only at their second turn are compared from where they part.
        """
        if self.problems:
            return None
        while len(chosen) > 1 and len(rejected) > 1 and chosen[0] == rejected[0]:
            prompt, chosen, rejected = [*prompt, chosen[0]], chosen[1:], rejected[1:]
        sides = {"chosen": chosen, "rejected": rejected}
        for side, messages in sides.items():
            if messages[-1]["role"] != "assistant":
                self._refuse_role(side, messages[-1]["role"])
        if not self.problems:
            self._check_prompts(sides)
        if not self.problems and not any(message["content"].strip() for message in prompt):
            self.refuse("empty_prompt", "prompt", "no text", "a prompt", "Write what the answers reply to.")
        self._check_answers(chosen, rejected)
        if self.problems:
            return None
        return {"id": "", "prompt": prompt, "chosen": chosen, "rejected": rejected}

    def _check_prompts(self, sides: dict[str, list[Message]]) -> None:
        for side, messages in sides.items():
            if messages[0]["role"] != "assistant":
                self.refuse(
                    "differing_prompts",
                    side,
                    f"“{shorten(messages[0]['content'])}” by the {messages[0]['role']}, on this side only",
                    "the same prompt on both sides, then an answer of the assistant",
                    "Make both sides answer the same messages, word for word.",
                )

    def _check_answers(self, chosen: list[Message], rejected: list[Message]) -> None:
        for side, messages in (("chosen", chosen), ("rejected", rejected)):
            if not all(m["content"].strip() for m in messages if m["role"] == "assistant"):
                self.refuse(
                    "empty_answer", side, "empty text", "an answer", "Write the answer, or remove the record."
                )
        if chosen == rejected and not self.problems:
            self.refuse(
                "identical_answers",
                "rejected",
                "the same text as the chosen answer",
                "two different answers",
                "Remove the record, or write a worse answer: a pair without a difference teaches nothing.",
            )
