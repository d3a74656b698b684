"""Who is answered when: one chat process per web process, one answer at a time, memory given back when idle.

Yields events for the page (plain dicts, sent as JSON lines). Knows nothing of requests, rows or HTML.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import uuid
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from django.conf import settings

from studio.serving.process import ChatEnded, ChatProcess
from training.chat_contract import ChatEvent

logger = logging.getLogger(__name__)
LINE_LIMIT = 8  # people who wait; the next one is told to come back
LOAD_SECONDS = 900.0
SILENT_SECONDS = 300.0  # the longest wait for the next token: a long prompt on a slow machine
SETTLE_SECONDS = 15.0  # for an answer nobody waits for any more
IMPORT_SECONDS, BYTES_PER_SECOND = 4.0, 400e6  # a first guess at the start; then the last one's time is known

PageEvent = dict[str, Any]
Say = Callable[[PageEvent], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    model_path: str
    adapters: dict[str, str]  # side -> folder
    sides: dict[str, list[dict[str, str]]]  # side -> messages
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


class ChatRoom:
    """The chat process of one event loop, and the line of people before it."""

    def __init__(self) -> None:
        self._line: list[asyncio.Event] = []  # the first one is being answered
        self._process: ChatProcess | None = None
        self._model_path = ""
        self._adapters: dict[str, str] | None = None  # None = what is loaded is not known
        self._unfinished = False  # the process still works on something nobody waits for
        self._load_seconds: dict[str, float] = {}
        self._retirement: asyncio.TimerHandle | None = None
        self._farewells: set[asyncio.Task[None]] = set()  # keeps running tasks from being collected

    @property
    def pid(self) -> int | None:
        """Of the living chat process, if there is one."""
        return self._process.pid if self._process and self._process.is_alive else None

    async def answer(self, question: Question) -> AsyncGenerator[PageEvent, None]:
        """Events up to the end. Closing this generator cancels the answer and frees the place in the line.

        The turn runs in its own task, so that a browser which stops reading does not keep the others waiting.
        """
        events: asyncio.Queue[PageEvent | None] = asyncio.Queue()
        turn = asyncio.create_task(self._take_turn(question, events.put_nowait))
        turn.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
        finally:
            turn.cancel()

    async def _take_turn(self, question: Question, say: Say) -> None:
        ticket = asyncio.Event()
        if len(self._line) > LINE_LIMIT:
            say(_error(f"The model is busy: {len(self._line)} prompts are waiting. Try again in a minute."))
            return
        self._line.append(ticket)
        try:
            await self._wait(ticket, say)
            if self._retirement is not None:
                self._retirement.cancel()
            process = await self._loaded_process(question, say)
            await self._converse(process, question, say)
        except ChatEnded as ended:
            say(_error(str(ended)))
        except Exception:
            logger.exception("a turn failed")
            say(_error("The studio could not pass on the prompt. Try again; the reason is in its log."))
        finally:
            self._line.remove(ticket)
            for other in self._line:
                other.set()
            if not self._line:
                loop = asyncio.get_running_loop()
                self._retirement = loop.call_later(settings.CHAT_IDLE_SECONDS, self._retire)

    async def _wait(self, ticket: asyncio.Event, say: Say) -> None:
        while True:
            ticket.clear()
            place = self._line.index(ticket)
            if place == 0:
                return
            say({"type": "queued", "place": place})
            await ticket.wait()

    async def _loaded_process(self, question: Question, say: Say) -> ChatProcess:
        if self._process is not None and self._unfinished:
            await self._settle(self._process)
        stale = self._process is not None and (
            not self._process.is_alive or self._model_path != question.model_path
        )
        if self._process is not None and stale:
            process, self._process = self._process, None
            await process.close()  # the old model's memory is free before the new one's is taken
        if self._process is None:
            self._adapters = None
            say({"type": "loading", "seconds": self._expected_seconds(question.model_path)})
            self._process = await ChatProcess.start()
        if self._adapters != question.adapters:
            await self._load(self._process, question, say)
        return self._process

    async def _load(self, process: ChatProcess, question: Question, say: Say) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._model_path, self._adapters, self._unfinished = question.model_path, None, True
        await process.send({"type": "load", "model_path": question.model_path, "adapters": question.adapters})
        event = await process.receive(LOAD_SECONDS)
        self._unfinished = False
        if event["type"] != "ready":
            text = event["text"] if event["type"] == "error" else "The model could not be loaded. Try again."
            raise ChatEnded(text)
        self._adapters = dict(question.adapters)
        # A process that was there already only took new adapters: that time says nothing of a start.
        self._load_seconds[question.model_path] = max(
            self._load_seconds.get(question.model_path, 0.0), loop.time() - started
        )
        say({"type": "ready", "device": event["device"], "dtype": event["dtype"]})

    async def _converse(self, process: ChatProcess, question: Question, say: Say) -> None:
        name = uuid.uuid4().hex
        self._unfinished = True
        try:
            await process.send(
                {
                    "type": "generate",
                    "id": name,
                    "sides": question.sides,
                    "temperature": question.temperature,
                    "top_p": question.top_p,
                    "max_new_tokens": question.max_new_tokens,
                    "seed": question.seed,
                }
            )
            while not _is_last(event := await process.receive(SILENT_SECONDS)):
                say(dict(event))
            self._unfinished = False
            say(dict(event))
        finally:
            if self._unfinished:
                process.cancel(name)

    async def _settle(self, process: ChatProcess) -> None:
        """Read what is left of a cancelled answer; a process that does not come to its end is replaced."""
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                while not _is_last(await process.receive(SETTLE_SECONDS)):
                    pass
        except (TimeoutError, ChatEnded):
            await process.kill()
            self._process = None
        self._unfinished = False

    def _expected_seconds(self, model_path: str) -> int:
        known = self._load_seconds.get(model_path)
        if known is not None:
            return max(1, round(known))
        with contextlib.suppress(OSError):
            stored = sum(file.stat().st_size for file in Path(model_path).glob("*.safetensors"))
            return max(1, round(IMPORT_SECONDS + stored / BYTES_PER_SECOND))
        return round(IMPORT_SECONDS)

    def _retire(self) -> None:
        """Nobody has asked for a while: end the process, which gives its memory back."""
        process, self._process = self._process, None
        if process is not None:
            farewell = asyncio.ensure_future(process.close())
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)

    async def close(self) -> None:
        """For tests and for an orderly end; a web process that just dies takes its child along anyway."""
        if self._retirement is not None:
            self._retirement.cancel()
        self._retire()
        await asyncio.gather(*self._farewells)


def _is_last(event: ChatEvent) -> bool:
    return event["type"] in {"end", "error", "ready"}


def _error(text: str) -> PageEvent:
    return {"type": "error", "text": text}


_rooms: WeakKeyDictionary[asyncio.AbstractEventLoop, ChatRoom] = WeakKeyDictionary()


def chat_room() -> ChatRoom:
    """The room of the running event loop: a server has one, and pipes belong to the loop that made them."""
    return _rooms.setdefault(asyncio.get_running_loop(), ChatRoom())
