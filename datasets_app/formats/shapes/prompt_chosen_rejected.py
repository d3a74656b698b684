"""`prompt`, `chosen`, `rejected`: texts or message lists; lists may repeat the prompt, or carry it alone."""

from __future__ import annotations

from typing import Any

from datasets_app.formats.pair import Message, Pair, Record, shorten
from datasets_app.formats.shape import Format

EXAMPLE = """{"prompt": "What is the capital of France?",
 "chosen": "The capital of France is Paris.",
 "rejected": "France's capital is London."}"""


def convert(record: Record) -> Pair | None:
    prompt = _prompt(record)
    chosen = _side(record, "chosen")
    rejected = _side(record, "rejected")
    if record.problems:
        return None
    if prompt is None:
        return record.pair([], chosen, rejected)
    return record.pair(*_without_repeated_prompt(record, prompt, chosen, rejected))


def _prompt(record: Record) -> list[Message] | None:
    """None: there is no key `prompt`, and both sides are lists that begin with it."""
    given = record.value.get("prompt")
    lists = all(isinstance(record.value.get(side), list) for side in ("chosen", "rejected"))
    if "prompt" not in record.value and lists and "system" not in record.value:
        return None
    given = record.require("prompt")
    system = record.value.get("system")
    lead: list[Message] = []
    if system is not None and system != "":
        lead = [{"role": "system", "content": record.text(system, "system")}]
    if isinstance(given, list):
        return [*lead, *record.messages(given, "prompt")]
    return [*lead, {"role": "user", "content": record.text(given, "prompt")}]


def _side(record: Record, key: str) -> list[Message]:
    given: Any = record.require(key)
    if isinstance(given, dict):
        return record.answer(given, key)
    if isinstance(given, list):
        return record.messages(given, key)
    return [{"role": "assistant", "content": record.text(given, key)}]


def _without_repeated_prompt(
    record: Record, prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """A side that is a whole conversation must begin with the prompt's own messages."""
    if isinstance(record.value["prompt"], str) and "system" not in record.value:
        prompt = _with_leading_system(prompt, chosen, rejected)
    sides = []
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        size = len(prompt)
        if messages[:size] == prompt:
            messages = messages[size:]
        elif messages[0]["role"] != "assistant":
            record.refuse(
                "differing_prompts",
                key,
                f"a conversation that begins with “{shorten(messages[0]['content'])}”",
                "the messages of `prompt`, repeated word for word, or only the answer",
                "Make it repeat the prompt exactly, or leave the prompt out of it.",
            )
        if not messages:
            record.refuse(
                "empty_answer",
                key,
                "the prompt and nothing after it",
                "an answer",
                "Add the assistant's answer.",
            )
        sides.append(messages)
    return prompt, sides[0], sides[1]


def _with_leading_system(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> list[Message]:
    """A prompt given as text, repeated in both lists behind the same system message: that belongs to it."""
    lead = chosen[:1]
    has_system = bool(lead) and lead[0]["role"] == "system" and rejected[:1] == lead
    return [*lead, *prompt] if has_system and chosen[1:2] == prompt == rejected[1:2] else prompt


FORMAT = Format(
    key="prompt",
    title="prompt + chosen + rejected",
    required=("chosen", "rejected"),
    optional=("prompt", "system"),
    excluded=("conversations",),
    convert=convert,
    example=EXAMPLE,
)
