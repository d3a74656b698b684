"""Bodies are limited while they arrive, whatever their headers say, and the application never sees the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.conf import settings
from django.contrib.sessions.backends.db import SessionStore

from studio import request_body
from studio.request_body import FORM_OVERHEAD, SMALL_BODY, BodyLimit, SpoolingHandler
from studio.request_body import signed_in as REAL_SIGNED_IN

PIECE = b"x" * 256 * 1024
COOKIE = (b"cookie", f"theme=dark; {settings.SESSION_COOKIE_NAME}=of-alice".encode())
MADE_UP = (b"cookie", f"{settings.SESSION_COOKIE_NAME}=made-up".encode())


class Exchange:
    """One request through the limit to an application that reads all of its body."""

    def __init__(self, pieces: Iterator[bytes], headers: list[tuple[bytes, bytes]], path: str) -> None:
        self.pieces, self.read, self.sent = pieces, 0, 0
        self.answers: list[Any] = []
        self.scope = {"type": "http", "path": path, "headers": headers}
        self.aborted = False

    async def receive(self) -> dict[str, Any]:
        piece = next(self.pieces, None)
        if piece is None:
            return {"type": "http.request", "body": b"", "more_body": False}
        self.sent += len(piece)
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(self, message: Any) -> None:
        self.answers.append(message)

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.aborted = True
                return
            self.read += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})

    @property
    def status(self) -> int:
        return int(self.answers[0]["status"])


def exchange(size: int, *, headers: list[tuple[bytes, bytes]], path: str = "/datasets/new/") -> Exchange:
    pieces = (PIECE[: min(len(PIECE), size - at)] for at in range(0, size, len(PIECE)))
    one = Exchange(iter(pieces), headers, path)
    asyncio.run(BodyLimit(one.application)(one.scope, one.receive, one.send))
    return one


@pytest.fixture(autouse=True)
def limit(settings: Any, data_dir: Any) -> int:
    settings.UPLOAD_MAX_BYTES = 20 * 1024 * 1024
    return 20 * 1024 * 1024 + FORM_OVERHEAD


@pytest.fixture(autouse=True)
def sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    async def signed_in(session_key: str) -> bool:
        return session_key == "of-alice"

    monkeypatch.setattr(request_body, "signed_in", signed_in)


@pytest.mark.parametrize("stated", [b"", b"10", b"-5", b"abc"])
def test_a_body_over_the_limit_ends_with_413_whatever_its_length_claims(limit: int, stated: bytes) -> None:
    headers = [COOKIE, (b"content-length", stated)] if stated else [COOKIE]
    one = exchange(limit + 50 * 1024 * 1024, headers=headers)
    assert one.status == 413 and one.aborted
    assert b"larger than 20 MB" in one.answers[1]["body"]
    assert one.sent <= limit + len(PIECE), "reading stops at the limit"


def test_a_stated_length_over_the_limit_is_refused_before_anything_is_read(limit: int) -> None:
    one = exchange(limit, headers=[COOKIE, (b"content-length", b"99999999999")])
    assert (one.status, one.sent) == (413, 0)


def test_a_body_within_the_limit_arrives_whole(limit: int) -> None:
    one = exchange(limit, headers=[COOKIE])
    assert (one.status, one.read, one.aborted) == (200, limit, False)


@pytest.mark.parametrize(
    ("headers", "path"),
    [
        ([], "/datasets/new/"),
        ([MADE_UP], "/datasets/new/"),
        ([COOKIE], "/datasets/"),
        ([COOKIE], "/tasks/new/"),
    ],
)
def test_only_the_upload_page_of_somebody_signed_in_takes_large_bodies(
    headers: list[tuple[bytes, bytes]], path: str
) -> None:
    assert exchange(SMALL_BODY, headers=headers, path=path).status == 200
    assert exchange(SMALL_BODY + 1, headers=headers, path=path).status == 413


def test_a_disk_without_room_is_507(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "disk_has_room", lambda size: False)
    assert exchange(1024, headers=[COOKIE, (b"content-length", b"1024")]).status == 200
    assert exchange(9 << 20, headers=[COOKIE, (b"content-length", str(9 << 20).encode())]).status == 507


def test_a_disk_that_fills_up_meanwhile_is_507(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "DISK_CHECK_EVERY", 4 * 1024 * 1024)
    monkeypatch.setattr(request_body, "disk_has_room", lambda size: False)
    one = exchange(18 << 20, headers=[COOKIE])
    assert one.status == 507
    assert one.sent <= (4 << 20) + len(PIECE)


def test_a_body_that_stops_arriving_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "IDLE_SECONDS", 0.05)
    one = Exchange(iter([PIECE]), [COOKIE], "/datasets/new/")

    async def silent() -> dict[str, Any]:
        if not one.sent:
            return await Exchange.receive(one)
        await asyncio.sleep(30)
        raise AssertionError

    asyncio.run(BodyLimit(one.application)(one.scope, silent, one.send))
    assert one.status == 408 and one.aborted


def test_bodies_are_spooled_in_the_upload_folder(settings: Any, tmp_path: Any) -> None:
    """A folder that is not there shows where the handler wants to write."""
    settings.FILE_UPLOAD_MAX_MEMORY_SIZE = 1000
    settings.FILE_UPLOAD_TEMP_DIR = tmp_path / "not there"
    one = Exchange(iter([PIECE]), [], "/")
    with pytest.raises(FileNotFoundError, match="not there"):
        asyncio.run(SpoolingHandler().read_body(one.receive))
    settings.FILE_UPLOAD_TEMP_DIR = tmp_path
    again = Exchange(iter([PIECE]), [], "/")
    with asyncio.run(SpoolingHandler().read_body(again.receive)) as body:
        assert body.read() == PIECE


@pytest.mark.django_db(transaction=True)
def test_a_session_counts_when_somebody_is_signed_in_with_it(alice_client: Any) -> None:
    """Not replaced here: the cookie is looked up, and one that anybody could write is worth nothing."""
    nobody = SessionStore()
    nobody["theme"] = "dark"
    nobody.create()
    keys = [alice_client.session.session_key, nobody.session_key, "0" * 32, ""]
    assert [async_to_sync(REAL_SIGNED_IN)(str(key)) for key in keys] == [True, False, False, False]
