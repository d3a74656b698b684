"""Chat: JSON lines between the web process and `python -m training.engine chat`. Standard library only."""

from __future__ import annotations

from typing import Literal, TypedDict


class ChatLoad(TypedDict):
    """Have this base in memory, with these adapters beside it: {"tuned": folder, "parent": folder}."""

    type: Literal["load"]
    model_path: str
    adapters: dict[str, str]


class ChatGenerate(TypedDict):
    """Answer on every named side. "base" is the bare base; any other name is one of the loaded adapters."""

    type: Literal["generate"]
    id: str
    sides: dict[str, list[dict[str, str]]]  # side -> messages; sides may differ after the first turn
    temperature: float  # 0 = always the likeliest token
    top_p: float
    max_new_tokens: int
    seed: int


class ChatCancel(TypedDict):
    type: Literal["cancel"]
    id: str


class ChatReady(TypedDict):
    type: Literal["ready"]
    device: str
    dtype: str
    seconds: float


class ChatText(TypedDict):
    type: Literal["text"]
    id: str
    side: str
    text: str  # what is new since the last one; never half a character


class ChatDone(TypedDict):
    """One side has finished; the answer as a whole ends with `ChatEnd`."""

    type: Literal["done"]
    id: str
    side: str
    finish_reason: Literal["stop", "length", "cancelled"]
    num_prompt_tokens: int
    num_tokens: int
    seconds: float  # this side's own share of the time


class ChatEnd(TypedDict):
    type: Literal["end"]
    id: str


class ChatError(TypedDict):
    """A sentence for the person. `id` is "" when loading failed."""

    type: Literal["error"]
    id: str
    text: str


ChatRequest = ChatLoad | ChatGenerate | ChatCancel
ChatEvent = ChatReady | ChatText | ChatDone | ChatEnd | ChatError
