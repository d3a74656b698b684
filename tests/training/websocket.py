"""A websocket client without a network, over an ASGI application (channels.testing itself wants daphne)."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from asgiref.testing import ApplicationCommunicator


class WebsocketCommunicator(ApplicationCommunicator):
    def __init__(self, application: Any, address: str, headers: list[tuple[bytes, bytes]]) -> None:
        parts = urlsplit(address)
        scope = {
            "type": "websocket",
            "path": parts.path,
            "query_string": parts.query.encode(),
            "headers": headers,
            "subprotocols": [],
        }
        super().__init__(application, scope)

    async def connect(self) -> tuple[bool, int | None]:
        """(accepted, the closing code when it was not)."""
        await self.send_input({"type": "websocket.connect"})
        answer = await self.receive_output(3)
        if answer["type"] == "websocket.close":
            return False, answer.get("code", 1000)
        assert answer["type"] == "websocket.accept"
        return True, None

    async def receive_json(self) -> Any:
        """The next frame; a NaN in it would be a failure in a browser, so it is one here."""
        answer = await self.receive_output(3)
        assert answer["type"] == "websocket.send", answer

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} in a frame")

        return json.loads(answer["text"], parse_constant=refuse)

    async def send_text(self, text: str) -> None:
        await self.send_input({"type": "websocket.receive", "text": text})

    async def send_bytes(self, data: bytes) -> None:
        await self.send_input({"type": "websocket.receive", "bytes": data})

    async def silent(self, seconds: float) -> bool:
        return bool(await self.receive_nothing(seconds))

    async def disconnect(self, code: int = 1000) -> None:
        await self.send_input({"type": "websocket.disconnect", "code": code})
        await self.wait(3)
