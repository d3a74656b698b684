"""A file on disk as a download: streamed in pieces, also under ASGI, always as an attachment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from django.http import Http404, StreamingHttpResponse
from django.utils.http import content_disposition_header

CHUNK = 256 * 1024


def file_download(path: Path, *, filename: str) -> StreamingHttpResponse:
    """404 when the file is not there. (Django's FileResponse reads the whole file into memory under ASGI.)"""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise Http404("This file is not there.") from None
    size = path.stat().st_size
    response = StreamingHttpResponse(_pieces(file), content_type="application/octet-stream")
    response["Content-Length"] = str(size)
    response["Content-Disposition"] = content_disposition_header(True, filename) or "attachment"
    response["X-Content-Type-Options"] = "nosniff"
    return response


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    try:
        while piece := await asyncio.to_thread(file.read, CHUNK):
            yield piece
    finally:
        file.close()
