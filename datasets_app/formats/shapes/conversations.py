"""`conversations` of `{"from", "value"}` messages with one `chosen` and one `rejected` (ShareGPT style)."""

from __future__ import annotations

from datasets_app.formats.pair import Message, Pair, Record
from datasets_app.formats.shape import Format

EXAMPLE = """{"conversations": [{"from": "human", "value": "What does 1+1 equal?"}],
 "chosen": {"from": "gpt", "value": "2"},
 "rejected": {"from": "gpt", "value": "I don't know"}}"""


def convert(record: Record) -> Pair | None:
    prompt = record.messages(record.require("conversations"), "conversations")
    system = record.value.get("system")
    if system is not None and system != "":
        lead: Message = {"role": "system", "content": record.text(system, "system")}
        prompt = [lead, *prompt]
    chosen = record.answer(record.require("chosen"), "chosen")
    rejected = record.answer(record.require("rejected"), "rejected")
    return record.pair(prompt, chosen, rejected)


FORMAT = Format(
    key="conversations",
    title="conversations + chosen + rejected",
    required=("conversations", "chosen", "rejected"),
    optional=("system",),
    convert=convert,
    example=EXAMPLE,
)
