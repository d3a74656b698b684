"""Downloads under ASGI: whole, in pieces, never all in memory; and the header that keeps sensors off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.testing import ApplicationCommunicator
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory

from studio import streaming
from studio.middleware import PermissionsPolicyMiddleware
from studio.streaming import PIECE_BYTES, in_pieces


class Source:
    """Chunks of 4 kB that know how many were taken."""

    def __init__(self, chunks: int) -> None:
        self.chunks, self.taken = chunks, 0

    def __iter__(self) -> Iterator[bytes]:
        for number in range(self.chunks):
            self.taken += 1
            yield bytes([number % 256]) * 4096


async def test_a_stream_is_read_only_as_far_as_it_is_sent() -> None:
    source, sent = Source(1000), 0
    async for piece in in_pieces(iter(source)):
        sent += len(piece)
        assert source.taken * 4096 - sent < PIECE_BYTES
        assert len(piece) <= PIECE_BYTES + 4096
    assert sent == 1000 * 4096


async def test_an_empty_stream_ends() -> None:
    assert [piece async for piece in in_pieces(iter([]))] == []


async def test_a_large_file_arrives_whole_and_in_pieces_through_the_application(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WhiteNoise sends a static file as a FileResponse: the real chain of middleware, and no view of ours."""
    from studio.asgi import application

    streams: list[Iterator[bytes]] = []
    monkeypatch.setattr(streaming, "in_pieces", lambda chunks: streams.append(chunks) or in_pieces(chunks))
    prefix, folder = settings.STATICFILES_DIRS[1]
    original = (Path(folder) / "plotly.min.js").read_bytes()
    path = f"/static/{prefix}/plotly.min.js"
    scope = {
        "type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "headers": [(b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    browser = ApplicationCommunicator(application, scope)
    await browser.send_input({"type": "http.request", "body": b"", "more_body": False})
    start = await browser.receive_output(timeout=20)
    assert start["status"] == 200
    pieces, more = [], True
    while more:
        message = await browser.receive_output(timeout=20)
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    assert b"".join(pieces) == original
    assert len(streams) == 1, "the file went through the reader that takes a piece at a time"


@pytest.mark.parametrize("given", ["", "camera=(self)"])
def test_the_header_is_set_unless_a_page_knows_better(rf: RequestFactory, given: str) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(headers={"Permissions-Policy": given} if given else None)

    header = PermissionsPolicyMiddleware(view)(rf.get("/"))["Permissions-Policy"]
    assert header == given if given else "camera=()" in header
