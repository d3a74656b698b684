"""`chosen_messages` and `rejected_messages`: two whole conversations that share their beginning."""

from __future__ import annotations

from datasets_app.formats.pair import Pair, Record
from datasets_app.formats.shape import Format

EXAMPLE = """{"chosen_messages": [{"role": "user", "content": "What does 1+1 equal?"},
                     {"role": "assistant", "content": "2"}],
 "rejected_messages": [{"role": "user", "content": "What does 1+1 equal?"},
                       {"role": "assistant", "content": "I don't know"}]}"""


def convert(record: Record) -> Pair | None:
    chosen = record.messages(record.require("chosen_messages"), "chosen_messages")
    rejected = record.messages(record.require("rejected_messages"), "rejected_messages")
    return record.pair([], chosen, rejected)


FORMAT = Format(
    key="chosen_messages",
    title="chosen_messages + rejected_messages",
    required=("chosen_messages", "rejected_messages"),
    convert=convert,
    example=EXAMPLE,
)
