"""The socket of a task page, through the whole ASGI application: who may listen, what comes, when it closes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from channels.db import database_sync_to_async
from channels.layers import get_channel_layer
from django.conf import settings
from django.contrib.auth import get_user_model
from django.test import Client
from django.utils import timezone

from studio.asgi import application
from tests.training.monitor_rows import add_events, add_point, add_points, make_task
from tests.training.websocket import WebsocketCommunicator
from training.models import TrainingTask
from training.monitor import consumers

pytestmark = pytest.mark.django_db(transaction=True)
ORIGIN = (b"origin", b"http://localhost")
UNKNOWN = "00000000-0000-4000-8000-000000000000"


@database_sync_to_async
def signed_in(name: str) -> tuple[Any, bytes]:
    """A person and the cookie header of their session."""
    user = get_user_model().objects.create_user(name, password="correct horse battery")
    client = Client()
    client.force_login(user)
    session = client.cookies[settings.SESSION_COOKIE_NAME].value
    return user, f"{settings.SESSION_COOKIE_NAME}={session}".encode()


@database_sync_to_async
def task_of(user: Any, *, points: int = 3, **fields: Any) -> TrainingTask:
    task = make_task(user, **fields)
    add_points(task, points)
    return task


write_point = database_sync_to_async(add_point)
write_events = database_sync_to_async(add_events)


@database_sync_to_async
def end(task: TrainingTask, status: str = "succeeded") -> None:
    TrainingTask.objects.filter(pk=task.pk).update(status=status, ended_at=timezone.now())


def socket(
    task_id: Any, cookie: bytes = b"", *, query: str = "", origin: tuple[bytes, bytes] | None = ORIGIN
) -> WebsocketCommunicator:
    headers = [(b"host", b"localhost"), (b"cookie", cookie), *([origin] if origin else [])]
    return WebsocketCommunicator(application, f"/ws/tasks/{task_id}/{query}", headers=headers)


@pytest.fixture
async def alice_and_cookie() -> AsyncIterator[tuple[Any, bytes]]:
    yield await signed_in("alice")
    assert not consumers.open_sockets, (
        "every test closes its sockets, and a closed socket is no longer counted"
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look every 50 ms; the last looks come as fast."""
    monkeypatch.setattr(consumers.TaskConsumer, "look_seconds", 0.05)


async def closing(communicator: WebsocketCommunicator, *, within: float = 3.0) -> int:
    """The code with which the server closes; frames before it are read and forgotten."""
    async with asyncio.timeout(within):
        while True:
            message = await communicator.receive_output(within)
            if message["type"] == "websocket.close":
                await communicator.send_input({"type": "websocket.disconnect", "code": message["code"]})
                await communicator.wait()
                return int(message["code"])


# --- who may listen -------------------------------------------------------------------------------------------
async def test_a_stranger_and_an_unknown_task_are_refused_alike(alice_and_cookie: Any) -> None:
    alice, _ = alice_and_cookie
    _, cookie = await signed_in("mallory")
    task = await task_of(alice)
    assert await socket(task.id, cookie).connect() == (False, 4404)
    assert await socket(UNKNOWN, cookie).connect() == (False, 4404)


async def test_someone_who_is_not_signed_in_is_refused(alice_and_cookie: Any) -> None:
    alice, _ = alice_and_cookie
    task = await task_of(alice)
    assert await socket(task.id).connect() == (False, 4404)


@pytest.mark.parametrize("origin", [None, (b"origin", b"https://evil.example"), (b"origin", b"null")])
async def test_a_foreign_or_missing_origin_is_refused(alice_and_cookie: Any, origin: Any) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    accepted, _ = await socket(task.id, cookie, origin=origin).connect()
    assert not accepted


async def test_the_twenty_first_socket_of_a_person_is_refused(
    alice_and_cookie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "SOCKETS_PER_USER", 2)
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    first, second = socket(task.id, cookie), socket(task.id, cookie)
    assert (await first.connect())[0]
    assert (await second.connect())[0]
    assert await socket(task.id, cookie).connect() == (False, 4429)
    await first.disconnect()
    third = socket(task.id, cookie)
    assert (await third.connect())[0]
    await second.disconnect()
    await third.disconnect()


# --- what comes -----------------------------------------------------------------------------------------------
async def test_the_backlog_comes_first_then_what_is_new_each_row_once(alice_and_cookie: Any) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    await write_events(task, "Loading model.")
    client = socket(task.id, cookie)
    await client.connect()
    first = await client.receive_json()
    assert (first["from"], first["to"]) == (0, 4)
    assert [point["seq"] for point in first["points"]] == [1, 2, 3]
    assert first["points"][0]["step"] == 1
    assert first["points"][0]["split"] == "train"
    assert first["events"] == [
        {"seq": 4, "time": 1_700_000_000.0, "level": "info", "source": "engine", "text": "Loading model."}
    ]
    assert first["state"]["status"] == "running"
    await write_point(task, 4, {"eval_loss": 0.6, "kl": None}, split="eval")
    second = await client.receive_json()
    assert (second["from"], second["to"]) == (4, 5)
    assert second["points"] == [
        {"seq": 5, "step": 4, "split": "eval", "values": {"eval_loss": 0.6, "kl": None}}
    ]
    await client.disconnect()


async def test_after_skips_what_the_page_has_already(alice_and_cookie: Any) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie, query="?after=2")
    await client.connect()
    frame = await client.receive_json()
    assert [point["seq"] for point in frame["points"]] == [3]
    await client.disconnect()


@pytest.mark.parametrize(
    "query", ["?after=x", "?after=-5", "?after=", "?after=9999999999999999999999", "?before=2"]
)
async def test_a_nonsense_after_means_from_the_start(alice_and_cookie: Any, query: str) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie, query=query)
    await client.connect()
    assert (await client.receive_json())["from"] == 0
    await client.disconnect()


async def test_a_long_backlog_comes_in_chunks_without_holes(alice_and_cookie: Any) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice, points=1201)
    client = socket(task.id, cookie)
    await client.connect()
    frames = [await client.receive_json() for _ in range(3)]
    assert [len(frame["points"]) for frame in frames] == [500, 500, 201]
    assert [point["seq"] for frame in frames for point in frame["points"]] == list(range(1, 1202))
    assert ["state" in frame for frame in frames] == [True, False, False]
    await client.disconnect()


async def test_a_tick_wakes_the_reader_at_once(
    alice_and_cookie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers.TaskConsumer, "look_seconds", 30)
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie)
    await client.connect()
    await client.receive_json()
    seq = await write_point(task, 4, {"loss": 0.5})
    assert await client.silent(0.2)
    layer = get_channel_layer()
    assert layer is not None
    await layer.group_send(f"task.{task.id}", {"type": "tick", "seq": seq})
    assert [point["seq"] for point in (await client.receive_json())["points"]] == [seq]
    await layer.group_send(f"task.{task.id}", {"type": "tick", "seq": seq})  # doubled: nothing is sent twice
    assert await client.silent(0.2)
    await client.disconnect()


async def test_without_ticks_new_rows_come_by_the_timer(
    alice_and_cookie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*arguments: Any) -> None:
        raise ConnectionError("no broker")

    monkeypatch.setattr("channels.layers.InMemoryChannelLayer.group_add", broken)
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie)
    assert (await client.connect())[0]
    await client.receive_json()
    await write_point(task, 4, {"loss": 0.5})
    assert (await client.receive_json())["points"][0]["step"] == 4
    await client.disconnect()


async def test_a_page_opened_while_the_broker_is_away_is_live_by_the_timer(
    alice_and_cookie: Any, settings: Any, tmp_path: Path
) -> None:
    settings.CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [f"unix://{tmp_path}/nobody.sock"]},
        }
    }
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie)
    assert (await client.connect())[0]
    await client.receive_json()
    await write_point(task, 4, {"loss": 0.5})
    assert (await client.receive_json())["points"][0]["step"] == 4
    await client.disconnect()


async def test_the_state_comes_when_it_changes_and_only_then(alice_and_cookie: Any) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie)
    await client.connect()
    await client.receive_json()
    assert await client.silent(0.3)
    await database_sync_to_async(TrainingTask.objects.filter(pk=task.pk).update)(
        phase="evaluating", phase_done=3, phase_total=20, phase_unit="pairs"
    )
    frame = await client.receive_json()
    assert frame["state"]["phase_text"] == "Evaluating 3/20 pairs"
    assert frame["points"] == []
    await client.disconnect()


# --- when it closes -------------------------------------------------------------------------------------------
async def test_the_end_of_the_task_is_told_and_closes_the_socket(alice_and_cookie: Any) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie)
    await client.connect()
    await client.receive_json()
    await end(task)
    frame = await client.receive_json()
    assert (frame["state"]["status"], frame["state"]["terminal"]) == ("succeeded", True)
    await write_events(task, "The model is in My Models.")  # written just after the status
    assert (await client.receive_json())["events"][0]["text"] == "The model is in My Models."
    assert await closing(client) == 1000


async def test_a_deleted_task_closes_the_socket(alice_and_cookie: Any) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie)
    await client.connect()
    await client.receive_json()
    await database_sync_to_async(task.delete)()
    assert await closing(client) == 4404


async def test_signing_out_closes_the_socket_at_the_next_check(
    alice_and_cookie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers.TaskConsumer, "recheck_seconds", 0.1)
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie)
    await client.connect()
    await client.receive_json()
    assert await client.silent(0.4)  # several checks while signed in: nothing happens
    key = cookie.decode().partition("=")[2]

    @database_sync_to_async
    def sign_out() -> None:
        from django.contrib.sessions.models import Session

        Session.objects.filter(pk=key).delete()

    await sign_out()
    assert await closing(client) == 4404


async def test_a_changed_password_closes_the_socket_at_the_next_check(
    alice_and_cookie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers.TaskConsumer, "recheck_seconds", 0.1)
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie)
    await client.connect()
    alice.set_password("another horse battery")
    await database_sync_to_async(alice.save)()
    assert await closing(client) == 4404


async def test_a_client_that_does_not_read_is_let_go(
    alice_and_cookie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    send = consumers.TaskConsumer.send

    async def stalled(self: Any, *arguments: Any, **named: Any) -> None:
        await asyncio.sleep(30)
        await send(self, *arguments, **named)

    monkeypatch.setattr(consumers.TaskConsumer, "send", stalled)
    monkeypatch.setattr(consumers.TaskConsumer, "send_seconds", 0.1)
    client = socket(task.id, cookie)
    await client.connect()
    assert await closing(client) == 4408


@pytest.mark.parametrize("text", ["{", '{"after": 0}', "cancel", "\u0000", "[" * 10_000])
async def test_what_a_client_says_means_nothing(alice_and_cookie: Any, text: str) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie)
    await client.connect()
    await client.receive_json()
    await client.send_text(text)
    await client.send_bytes(b"\xff\x00")
    assert await client.silent(0.2)
    await write_point(task, 4, {"loss": 0.5})
    assert (await client.receive_json())["points"][0]["step"] == 4
    await client.disconnect()


async def test_a_huge_frame_closes_the_socket(alice_and_cookie: Any) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie)
    await client.connect()
    await client.send_text("x" * (64 * 1024 + 1))
    assert await closing(client) == 1009


async def test_a_flood_of_frames_closes_the_socket(alice_and_cookie: Any) -> None:
    alice, cookie = alice_and_cookie
    task = await task_of(alice)
    client = socket(task.id, cookie)
    await client.connect()
    for _ in range(consumers.MAX_FRAMES + 1):
        await client.send_text("hello")
    assert await closing(client) == 4429
