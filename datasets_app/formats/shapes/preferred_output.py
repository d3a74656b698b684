"""`input.messages` with `preferred_output` and `non_preferred_output`, one assistant message each."""

from __future__ import annotations

from datasets_app.formats.pair import Pair, Record, describe
from datasets_app.formats.shape import Format

EXAMPLE = """{"input": {"messages": [
   {"role": "user", "content": "What is the capital of France?"}]},
 "preferred_output": [{"role": "assistant", "content": "Paris."}],
 "non_preferred_output": [{"role": "assistant", "content": "London."}]}"""


def convert(record: Record) -> Pair | None:
    given = record.require("input")
    prompt = []
    if isinstance(given, dict) and "messages" in given:
        record.unknown.update(f"input.{key}" for key in given if key != "messages")
        prompt = record.messages(given["messages"], "input.messages")
    elif "input" in record.value:
        record.refuse(
            "no_messages",
            "input",
            describe(given),
            "an object with the key `messages`",
            "Put the conversation into `input.messages`.",
        )
    chosen = record.answer(record.require("preferred_output"), "preferred_output")
    rejected = record.answer(record.require("non_preferred_output"), "non_preferred_output")
    return record.pair(prompt, chosen, rejected)


FORMAT = Format(
    key="preferred_output",
    title="input.messages + preferred_output + non_preferred_output",
    required=("input", "preferred_output", "non_preferred_output"),
    convert=convert,
    example=EXAMPLE,
)
