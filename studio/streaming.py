"""Files leave a megabyte at a time. Django alone, under ASGI, reads a whole file into memory before it sends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, cast

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.http.response import HttpResponseBase, StreamingHttpResponse

PIECE_BYTES = 1024 * 1024


def _next_piece(chunks: Iterator[bytes]) -> bytes:
    """A file's chunks are 4 kB; a thread's turn is worth more."""
    piece = bytearray()
    for chunk in chunks:
        piece += chunk
        if len(piece) >= PIECE_BYTES:
            break
    return bytes(piece)


async def in_pieces(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    while piece := await sync_to_async(_next_piece, thread_sensitive=False)(chunks):
        yield piece


class PiecewiseHandler(ASGIHandler):
    """Not a middleware: behind WhiteNoise's, which is synchronous, it would stand in a synchronous chain."""

    async def send_response(
        self, response: HttpResponseBase, send: Callable[[Mapping[str, Any]], Awaitable[None]]
    ) -> None:
        if isinstance(response, StreamingHttpResponse) and not response.is_async:
            chunks = cast(Iterator[bytes], response.streaming_content)
            response.streaming_content = in_pieces(iter(chunks))
        await super().send_response(response, send)
