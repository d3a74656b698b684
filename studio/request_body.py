"""How much of a request's body is taken, decided while it arrives and before Django keeps a byte of it.

Django's ASGI handler spools the whole body before any view or upload handler runs, so the limit must stand in
front of it. Only the upload page takes large bodies, and only from somebody who is signed in.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from importlib import import_module
from typing import IO, Any

from channels.db import database_sync_to_async
from django.conf import settings
from django.contrib.auth import SESSION_KEY
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler
from django.http import parse_cookie
from django.urls import reverse

from datasets_app.uploads import Refusal, disk_full, disk_has_room, too_large

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

SMALL_BODY = 8 * 1024 * 1024
FORM_OVERHEAD = 64 * 1024  # the multipart frame and the other fields around a file of exactly the limit
IDLE_SECONDS = 60.0
DISK_CHECK_EVERY = 32 * 1024 * 1024
COPIES = 2  # the spooled body, and the file taken out of it


class SpoolingHandler(ASGIHandler):
    """Django's handler, but bodies are spooled on the data disk, whose room is known, and not in /tmp."""

    async def read_body(self, receive: Any) -> IO[bytes]:
        folder = str(settings.FILE_UPLOAD_TEMP_DIR)
        limit = settings.FILE_UPLOAD_MAX_MEMORY_SIZE
        body: IO[bytes] = tempfile.SpooledTemporaryFile(limit, mode="w+b", dir=folder)  # noqa: SIM115
        try:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RequestAborted
                body.write(message.get("body", b""))
                more = message.get("more_body", False)
        except BaseException:
            body.close()
            raise
        body.seek(0)
        return body


class BodyLimit:
    """Wraps the HTTP application."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        body = _Body(scope, receive, send, large=await _may_be_large(scope))
        refusal = body.refusal_of_stated_length()
        if refusal:
            await body.refuse(refusal)
            return
        await self.app(scope, body.receive, body.send)


async def _may_be_large(scope: dict[str, Any]) -> bool:
    if scope["path"] != reverse("datasets:new"):
        return False
    cookies = parse_cookie(dict(scope["headers"]).get(b"cookie", b"").decode("latin-1"))
    return await signed_in(cookies.get(settings.SESSION_COOKIE_NAME, ""))


async def signed_in(session_key: str) -> bool:
    """Is this the session of somebody? That a cookie is there proves nothing: anybody can write one."""
    store = import_module(settings.SESSION_ENGINE).SessionStore(session_key)
    return SESSION_KEY in await database_sync_to_async(store.load)()  # which also minds stale connections


class _Body:
    """One request: counts what arrives, and speaks in the application's place once it was refused."""

    def __init__(self, scope: dict[str, Any], receive: Receive, send: Send, *, large: bool) -> None:
        self._receive, self._send, self._large = receive, send, large
        self._headers = dict(scope["headers"])
        self._limit = settings.UPLOAD_MAX_BYTES + FORM_OVERHEAD if self._large else SMALL_BODY
        self._size = 0
        self._complete = self._refused = False

    def _too_large(self) -> Refusal:
        return too_large() if self._large else Refusal(413, "The request is too large.")

    def refusal_of_stated_length(self) -> Refusal | None:
        """What the header says can only shorten the wait for a refusal; it is never trusted."""
        stated = self._headers.get(b"content-length", b"")
        length = int(stated) if stated.isdigit() and len(stated) < 20 else 0
        if length > self._limit:
            return self._too_large()
        return disk_full() if length > SMALL_BODY and not disk_has_room(COPIES * length) else None

    async def receive(self) -> Message:
        if self._refused:
            return {"type": "http.disconnect"}
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), IDLE_SECONDS)
        except TimeoutError:
            return await self.refuse(Refusal(408, "Nothing arrived for a minute, so the upload was ended."))
        refusal = self._take(message) if message["type"] == "http.request" else None
        return await self.refuse(refusal) if refusal else message

    def _take(self, message: Message) -> Refusal | None:
        before = self._size
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._limit:
            return self._too_large()
        crossed = before // DISK_CHECK_EVERY != self._size // DISK_CHECK_EVERY
        return disk_full() if crossed and not disk_has_room(0) else None

    async def refuse(self, refusal: Refusal) -> Message:
        """Answer in words; the application is told that the client has gone."""
        self._refused = True
        text = refusal.text.encode()
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(text)).encode()),
            (b"connection", b"close"),
        ]
        await self._send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": text})
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self._refused:
            await self._send(message)
