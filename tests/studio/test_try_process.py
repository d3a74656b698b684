"""The chat process as the web process keeps it: line, cancel, crash, idleness, switching, its death."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from studio.serving import turns
from studio.serving.turns import ChatRoom, Question

STUB = [sys.executable, str(Path(__file__).resolve().parents[1] / "stub_chat.py")]


@pytest.fixture
async def room(data_dir: Path, settings: Any) -> AsyncIterator[ChatRoom]:
    settings.CHAT_COMMAND = STUB
    room = ChatRoom()
    yield room
    await room.close()


def question(
    prompt: str = "hello", *, model_path: str = "/models/a", adapter: str = "/adapters/a"
) -> Question:
    messages = [{"role": "user", "content": prompt}]
    return Question(
        model_path=model_path,
        adapters={"tuned": adapter},
        sides={"base": messages, "tuned": messages},
        temperature=0.0,
        top_p=1.0,
        max_new_tokens=10,
        seed=0,
    )


async def events_of(room: ChatRoom, asked: Question) -> list[dict[str, Any]]:
    return [event async for event in room.answer(asked)]


async def until_gone(pid: int) -> None:
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


async def first_text(events: Any) -> None:
    async for event in events:
        if event["type"] == "text":
            return


async def test_a_second_question_waits_its_turn_and_is_told_its_place(room: ChatRoom) -> None:
    first, second, third = await asyncio.gather(*(events_of(room, question()) for _ in range(3)))
    assert [event["type"] for event in first].count("queued") == 0
    assert second[0] == {"type": "queued", "place": 1}
    assert [event["place"] for event in third if event["type"] == "queued"] == [2, 1]
    assert all(events[-1]["type"] == "end" for events in (first, second, third))


async def test_one_question_too_many_is_told_that_the_model_is_busy(
    room: ChatRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LINE_LIMIT", 1)
    answers = await asyncio.gather(*(events_of(room, question()) for _ in range(3)))
    assert [events[-1]["type"] for events in answers] == ["end", "end", "error"]
    assert "busy" in answers[2][-1]["text"]


async def test_who_leaves_frees_the_place_and_the_answer_is_cancelled(room: ChatRoom) -> None:
    async with aclosing(room.answer(question("slow"))) as events:
        await first_text(events)
        pid = room.pid
        waiting = asyncio.create_task(events_of(room, question()))
        await asyncio.sleep(0.05)
    later = await asyncio.wait_for(waiting, 3)  # "slow" would take ten seconds
    assert later[-1]["type"] == "end"
    assert all(
        "text" not in event or ".9 " not in event["text"] for event in later
    )  # nothing of the old answer
    assert room.pid == pid


async def test_who_leaves_while_waiting_is_forgotten(room: ChatRoom) -> None:
    running = asyncio.create_task(events_of(room, question()))
    await asyncio.sleep(0.02)
    async with aclosing(room.answer(question())) as events:
        async for event in events:
            assert event["type"] == "queued"
            break
    assert (await running)[-1]["type"] == "end"
    assert (await events_of(room, question()))[-1]["type"] == "end"


async def test_a_process_that_does_not_stop_for_a_cancel_is_replaced(
    room: ChatRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "SETTLE_SECONDS", 0.2)
    async with aclosing(room.answer(question("silent"))) as events:
        await first_text(events)
    old = room.pid
    assert old
    assert (await events_of(room, question()))[-1]["type"] == "end"
    assert room.pid != old
    await until_gone(old)


async def test_a_process_that_dies_in_an_answer_gives_a_sentence_and_the_next_question_works(
    room: ChatRoom,
) -> None:
    events = await events_of(room, question("crash"))
    assert [event["type"] for event in events].count("text") > 2
    assert events[-1]["type"] == "error"
    assert "Send the prompt again" in events[-1]["text"]
    assert (await events_of(room, question()))[-1]["type"] == "end"


async def test_a_process_killed_between_two_questions_is_started_anew(room: ChatRoom) -> None:
    await events_of(room, question())
    assert room.pid
    os.kill(room.pid, signal.SIGKILL)
    await asyncio.sleep(0.1)
    assert (await events_of(room, question()))[-1]["type"] == "end"


async def test_an_idle_process_ends_and_gives_its_memory_back(room: ChatRoom, settings: Any) -> None:
    settings.CHAT_IDLE_SECONDS = 0.1
    await events_of(room, question())
    pid = room.pid
    assert pid
    await until_gone(pid)
    assert room.pid is None
    assert (await events_of(room, question()))[0]["type"] == "loading"


async def test_a_question_resets_the_idle_time(room: ChatRoom, settings: Any) -> None:
    settings.CHAT_IDLE_SECONDS = 0.6
    await events_of(room, question())
    pid = room.pid
    for _ in range(4):
        await asyncio.sleep(0.25)
        await events_of(room, question())
    assert room.pid == pid


async def test_another_base_replaces_the_process_and_another_adapter_does_not(room: ChatRoom) -> None:
    await events_of(room, question())
    pid = room.pid
    assert pid
    events = await events_of(room, question(adapter="/adapters/b"))
    assert events[0]["type"] == "ready"
    assert room.pid == pid
    await events_of(room, question(model_path="/models/b"))
    assert room.pid != pid
    await until_gone(pid)


async def test_a_model_that_cannot_be_loaded_gives_its_sentence(room: ChatRoom) -> None:
    events = await events_of(room, question(model_path="/models/broken"))
    assert events[-1] == {"type": "error", "text": "The stub cannot load this."}
    assert (await events_of(room, question()))[-1]["type"] == "end"


async def test_a_command_that_cannot_start_gives_a_sentence(room: ChatRoom, settings: Any) -> None:
    settings.CHAT_COMMAND = ["/nonexistent/python"]
    events = await events_of(room, question())
    assert "could not be started" in events[-1]["text"]


async def test_a_command_that_ends_at_once_gives_a_sentence(room: ChatRoom, settings: Any) -> None:
    settings.CHAT_COMMAND = [sys.executable, "-c", "raise SystemExit(3)"]
    events = await events_of(room, question())
    assert "ended unexpectedly" in events[-1]["text"]


async def test_the_process_gets_no_secret_of_the_web_process(
    room: ChatRoom, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_SECRET_KEY", "secret-of-the-web")
    monkeypatch.setenv("DATABASE_URL", "postgres://user:password@db/studio")
    await events_of(room, question())
    assert room.pid
    environment = psutil.Process(room.pid).environ()
    assert "STUDIO_SECRET_KEY" not in environment and "DATABASE_URL" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"


async def test_a_reader_that_stops_does_not_keep_the_others_waiting(room: ChatRoom) -> None:
    stalled = room.answer(question())
    await anext(stalled)  # and never again
    assert (await asyncio.wait_for(events_of(room, question()), 5))[-1]["type"] == "end"
    await stalled.aclose()
