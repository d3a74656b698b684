"""`messages` whose last message is the preferred answer, and `rejected_response` as text."""

from __future__ import annotations

from datasets_app.formats.pair import Pair, Record
from datasets_app.formats.shape import Format

EXAMPLE = """{"messages": [
   {"role": "system", "content": "You are a helpful and harmless assistant"},
   {"role": "user", "content": "Tell me about tomorrow's weather"},
   {"role": "assistant", "content": "Tomorrow will be sunny"}],
 "rejected_response": "I don't know"}"""


def convert(record: Record) -> Pair | None:
    messages = record.messages(record.require("messages"), "messages")
    rejected = record.text(record.require("rejected_response"), "rejected_response")
    if not record.problems and messages[-1]["role"] != "assistant":
        record.refuse(
            "answer_not_by_assistant",
            f"messages[{len(messages) - 1}].role",
            f"{messages[-1]['role']} as the last role",
            "the assistant's preferred answer as the last message",
            "End `messages` with the preferred answer; check whether the roles are swapped.",
        )
    if record.problems:
        return None
    return record.pair(messages[:-1], messages[-1:], [{"role": "assistant", "content": rejected}])


FORMAT = Format(
    key="messages",
    title="messages + rejected_response",
    required=("messages", "rejected_response"),
    convert=convert,
    example=EXAMPLE,
)
