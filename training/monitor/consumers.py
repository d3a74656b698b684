"""The socket of a task page: forwards stored rows, in order of `seq`. It takes no commands.

The database is the truth. A tick from the worker only wakes the reader early; without any tick (no broker, a
lost message) it looks every second. So a frame can be late, but never lost or out of order.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from contextlib import suppress
from importlib import import_module
from typing import Any
from urllib.parse import parse_qs

from channels.auth import get_user
from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings
from django.db import Error as DatabaseError

from training.models import TrainingTask
from training.monitor.feed import frame_after, state_of

log = logging.getLogger(__name__)

CLOSE_DONE, CLOSE_TOO_BIG, CLOSE_ERROR = 1000, 1009, 1011
CLOSE_NOT_FOUND, CLOSE_SLOW, CLOSE_TOO_MANY = 4404, 4408, 4429
SOCKETS_PER_USER = 20
MAX_FRAME = 64 * 1024
MAX_FRAMES = 30  # from the client, per FRAMES_SECONDS
FRAMES_SECONDS = 10.0
NO_LAYER = "none"  # no layer is configured under this name
LAST_LOOKS = 3  # after the end of a task: its last event may be written just after its status

open_sockets: Counter[Any] = Counter()  # user id -> sockets of this process


class TaskConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    look_seconds = 1.0
    send_seconds = 10.0
    recheck_seconds = 60.0
    begun = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """A broker that is away fails before anything was received; the socket then lives without a channel."""
        try:
            await super().__call__(scope, receive, send)
        except Exception:
            if self.begun:
                raise
            self.channel_layer_alias = NO_LAYER
            await super().__call__(scope, receive, send)

    async def connect(self) -> None:
        self.begun = True
        self.reader: asyncio.Task[None] | None = None
        self.counted = False
        self.user = self.scope["user"]
        self.task_id = self.scope["url_route"]["kwargs"]["task_id"]
        after = parse_qs(self.scope["query_string"].decode("latin-1")).get("after", ["0"])[0]
        self.last = int(after) if after.isascii() and after.isdigit() and len(after) < 18 else 0
        self.frames: list[float] = []
        self.wake = asyncio.Event()
        if not self.user.is_authenticated or await self.load_task() is None:
            await self.close(CLOSE_NOT_FOUND)
            return
        if open_sockets[self.user.pk] >= SOCKETS_PER_USER:
            await self.close(CLOSE_TOO_MANY)
            return
        open_sockets[self.user.pk] += 1
        self.counted = True
        await self.join()  # before the first look, so that nothing falls between
        await self.accept()
        self.reader = asyncio.create_task(self.read())

    async def join(self) -> None:
        self.group = f"task.{self.task_id}"
        try:
            await self.channel_layer.group_add(self.group, self.channel_name)
        except Exception:  # the layer's client has its own errors; without it the timer does the work
            log.warning("No live channel for task %s; reading every second instead.", self.task_id)

    async def disconnect(self, code: int) -> None:
        if self.reader is not None:
            self.reader.cancel()
        if self.counted:
            self.counted = False
            open_sockets[self.user.pk] -= 1
            if open_sockets[self.user.pk] <= 0:
                del open_sockets[self.user.pk]
            with suppress(Exception):
                await self.channel_layer.group_discard(self.group, self.channel_name)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Nothing a client sends means anything; too much of it ends the socket."""
        if len(text_data or bytes_data or "") > MAX_FRAME:
            await self.close(CLOSE_TOO_BIG)
            return
        now = time.monotonic()
        self.frames = [moment for moment in self.frames if now - moment < FRAMES_SECONDS] + [now]
        if len(self.frames) > MAX_FRAMES:
            await self.close(CLOSE_TOO_MANY)

    async def tick(self, message: dict[str, Any]) -> None:
        self.wake.set()

    # --- the reader ------------------------------------------------------------------------------------
    async def read(self) -> None:
        try:
            await self.close(await self.forward())
        except asyncio.CancelledError:
            raise
        except TimeoutError:
            await self.close(CLOSE_SLOW)
        except Exception:
            log.exception("The socket of task %s ended.", self.task_id)
            await self.close(CLOSE_ERROR)

    async def forward(self) -> int:
        """Send what is new until the task has ended or the person may no longer see it; the closing code."""
        told: dict[str, Any] | None = None
        looks = 0
        checked = time.monotonic()
        while True:
            if time.monotonic() - checked >= self.recheck_seconds:
                checked = time.monotonic()
                if not await self.still_allowed():
                    return CLOSE_NOT_FOUND
            self.wake.clear()
            try:
                found = await self.look(told)
            except DatabaseError:
                log.warning("The database did not answer for task %s; trying again.", self.task_id)
                found = (None, told, False)
            if found is None:
                return CLOSE_NOT_FOUND
            frame, told, more = found
            if frame is not None:
                await asyncio.wait_for(
                    self.send(text_data=json.dumps(frame, allow_nan=False)), self.send_seconds
                )
                self.last = frame["to"]
            if more:
                continue
            if told is not None and told["terminal"]:
                looks += 1
                if looks >= LAST_LOOKS:
                    return CLOSE_DONE
            with suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), self.look_seconds)

    @database_sync_to_async  # type: ignore[untyped-decorator]
    def load_task(self) -> TrainingTask | None:
        return TrainingTask.objects.for_user(self.user).filter(pk=self.task_id).first()

    @database_sync_to_async  # type: ignore[untyped-decorator]
    def look(
        self, told: dict[str, Any] | None
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None, bool] | None:
        """(frame, None when nothing is new; the state last told; whether more rows wait). None: task gone."""
        task = TrainingTask.objects.for_user(self.user).filter(pk=self.task_id).first()
        if task is None:
            return None
        frame = frame_after(task, self.last)
        more = frame["to"] < task.last_seq
        state = state_of(task)
        if state != told:
            frame["state"] = state
        elif frame["to"] == self.last:
            return None, told, False
        return frame, state, more

    async def still_allowed(self) -> bool:
        """The session may have ended, the account been closed, the task been deleted."""
        return await self.fresh_user() and await self.load_task() is not None

    async def fresh_user(self) -> bool:
        key = self.scope["session"].session_key
        store = import_module(settings.SESSION_ENGINE).SessionStore(key)
        user = await get_user({"session": store})
        return bool(user.is_authenticated and user.pk == self.user.pk)
