"""Try it: who may ask, what may be asked, what a browser with and without JavaScript gets."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import uvicorn
from asgiref.sync import sync_to_async
from django.conf import settings
from django.test import AsyncClient, Client
from django.urls import reverse

from studio.asgi import application
from studio.serving.conversation import ConversationError, Turn, messages_of, read_turns, write_turns
from studio.serving.turns import Question, chat_room
from tests.studio.made_models import make_base, make_model
from training.models import TrainedModel

STUB = [sys.executable, str(Path(__file__).resolve().parents[1] / "stub_chat.py")]
ASK = {
    "prompt": "Hello",
    "system": "",
    "temperature": "0.7",
    "top_p": "0.9",
    "max_new_tokens": "50",
    "seed": "1",
}


@pytest.fixture
def model(alice: Any, data_dir: Path, settings: Any, tmp_path: Path) -> TrainedModel:
    settings.CHAT_COMMAND = STUB
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    return make_model(alice, base=make_base(base))


def at(name: str, model: TrainedModel) -> str:
    return reverse(f"serving:{name}", args=[model.pk])


async def asker(user: Any) -> AsyncClient:
    client = AsyncClient()
    await client.aforce_login(user)
    return client


async def lines(response: Any) -> list[dict[str, Any]]:
    body = b"".join([part async for part in response.streaming_content])
    return [json.loads(line) for line in body.splitlines()]


# --- who ----------------------------------------------------------------------------------------------------
@pytest.mark.django_db
@pytest.mark.parametrize("name", ["try", "stream"])
def test_a_stranger_gets_404_and_an_anonymous_visitor_the_sign_in(
    name: str, model: TrainedModel, mallory_client: Client, client: Client
) -> None:
    assert mallory_client.post(at(name, model), ASK).status_code == 404
    assert client.post(at(name, model), ASK).headers["Location"].startswith(reverse("accounts:sign-in"))
    assert mallory_client.get(at("try", model)).status_code == 404


@pytest.mark.django_db
def test_a_wrong_method_is_405(model: TrainedModel, alice_client: Client) -> None:
    assert alice_client.get(at("stream", model)).status_code == 405
    assert alice_client.put(at("try", model)).status_code == 405


@pytest.mark.django_db
def test_a_post_without_the_token_is_403(model: TrainedModel, alice: Any) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    assert client.post(at("stream", model), ASK).status_code == 403


# --- what ---------------------------------------------------------------------------------------------------
@pytest.mark.django_db
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": ""}, "Write a prompt first"),
        ({"prompt": " \n "}, "Write a prompt first"),
        ({"prompt": "x" * 20_001}, "20,000 characters"),
        ({"system": "x" * 8_001}, "8,000 characters"),
        ({"temperature": "-1"}, "from 0 to 2"),
        ({"temperature": "nan"}, "from 0 to 2"),
        ({"temperature": "hot"}, "from 0 to 2"),
        ({"top_p": "0"}, "from 0.01 to 1"),
        ({"max_new_tokens": "0"}, "from 1 to 2048"),
        ({"max_new_tokens": "9" * 30}, "from 1 to 2048"),
        ({"seed": "-3"}, "Seed must be"),
        ({"seed": ""}, "Seed must be"),
        ({"against": "parent"}, "Compare with the base"),
        ({"against": "../../etc"}, "Compare with the base"),
        ({"history": "{"}, "Start a new conversation"),
        ({"history": "[" * 100_000}, "Start a new conversation"),
    ],
)
def test_what_cannot_be_asked_is_422_with_a_sentence(
    change: dict[str, str], sentence: str, model: TrainedModel, alice_client: Client
) -> None:
    streamed = alice_client.post(at("stream", model), ASK | change)
    assert streamed.status_code == 422
    assert sentence in streamed.json()["text"]
    page = alice_client.post(at("try", model), ASK | change)
    assert page.status_code == 422
    assert sentence in page.content.decode()


@pytest.mark.django_db
def test_a_model_whose_base_is_gone_says_so_on_the_page_and_in_the_stream(
    model: TrainedModel, alice_client: Client
) -> None:
    assert model.base_model
    model.base_model.status = "absent"
    model.base_model.save()
    assert "not on this machine" in alice_client.get(at("try", model)).content.decode()
    response = alice_client.post(at("stream", model), ASK)
    assert response.status_code == 409
    assert "not on this machine" in response.json()["text"]


# --- answers ------------------------------------------------------------------------------------------------
@pytest.mark.django_db(transaction=True)
async def test_the_stream_says_that_it_loads_then_both_answers_then_the_end(
    model: TrainedModel, alice: Any
) -> None:
    client = await asker(alice)
    response = await client.post(at("stream", model), ASK)
    assert response.headers["Content-Type"] == "application/x-ndjson"
    events = await lines(response)
    assert [event["type"] for event in events[:2]] == ["loading", "ready"]
    assert events[0]["seconds"] >= 1
    texts = {event["side"] for event in events if event["type"] == "text"}
    assert texts == {"base", "tuned"}
    assert [event["type"] for event in events[-3:]] == ["done", "done", "end"]
    again = await lines(await client.post(at("stream", model), ASK))
    assert again[0]["type"] == "text"  # it is loaded already
    await chat_room().close()


@pytest.mark.django_db(transaction=True)
async def test_without_javascript_the_page_comes_with_both_answers_and_keeps_the_conversation(
    model: TrainedModel, alice: Any
) -> None:
    client = await asker(alice)
    page = await client.post(at("try", model), ASK)
    assert page.status_code == 200
    text = page.content.decode()
    assert "base1.4" in text and "tuned1.4" in text
    history = page.context["form"]["history"].value()
    second = await client.post(at("try", model), ASK | {"prompt": "More", "history": history})
    assert [turn.prompt for turn in second.context["turns"]] == ["Hello", "More"]
    assert "tuned3.4" in second.content.decode()  # it read three messages: two prompts and its own answer
    await chat_room().close()


@pytest.mark.django_db(transaction=True)
async def test_the_left_side_may_be_the_model_this_one_was_trained_from(
    model: TrainedModel, alice: Any
) -> None:
    child = await sync_to_async(make_model)(alice, name="Child", base=model.base_model, parent=model)
    client = await asker(alice)
    events = await lines(await client.post(at("stream", child), ASK | {"against": "parent"}))
    assert {event["side"] for event in events if event["type"] == "text"} == {"parent", "tuned"}
    page = (await client.get(at("try", child))).content.decode()
    assert "The bare base" in page and "The model it was trained from" in page
    await chat_room().close()


@pytest.mark.django_db(transaction=True)
async def test_what_a_model_says_is_shown_as_text(model: TrainedModel, alice: Any) -> None:
    client = await asker(alice)
    evil = [Turn("<b>p</b>", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>")]
    page = await client.post(
        at("try", model), ASK | {"history": write_turns(evil, against="base"), "seed": "x"}
    )
    text = page.content.decode()
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert(1)" not in text and "<img src=x" not in text


# --- the conversation --------------------------------------------------------------------------------------
def test_each_side_reads_its_own_earlier_answers() -> None:
    turns = [Turn("first", "from base", "from tuned")]
    for side, own in (("base", "from base"), ("parent", "from base"), ("tuned", "from tuned")):
        messages = messages_of(turns, system="Be brief.", prompt="second", side=side)
        assert [message["content"] for message in messages] == ["Be brief.", "first", own, "second"]
        assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages_of([], system=" ", prompt="only", side="tuned") == [{"role": "user", "content": "only"}]


def test_turns_survive_the_way_through_the_page_and_not_a_change_of_sides() -> None:
    turns = [Turn("p\u2028", 'r"</script>', "t🌊")]
    text = write_turns(turns, against="base")
    assert read_turns(text, against="base") == turns
    assert read_turns(text, against="parent") == []
    assert read_turns("", against="base") == []


@pytest.mark.parametrize(
    "text",
    ["null", "[]", '{"turns": 3, "against": "base"}', '{"turns": [{"prompt": 1}], "against": "base"}', "{}"],
)
def test_turns_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConversationError):
        read_turns(text, against="base")


def test_a_conversation_may_not_grow_without_end() -> None:
    with pytest.raises(ConversationError, match="50 turns"):
        read_turns(write_turns([Turn("p", "", "")] * 51, against="base"), against="base")
    with pytest.raises(ConversationError, match="characters"):
        read_turns(write_turns([Turn("p" * 100_001, "", "")], against="base"), against="base")


# --- through a real server ---------------------------------------------------------------------------------
@pytest.mark.django_db(transaction=True)
async def test_a_browser_that_goes_away_stops_the_answer(model: TrainedModel, alice: Any) -> None:
    client = await asker(alice)
    secret = "a" * 32
    session = client.cookies[settings.SESSION_COOKIE_NAME].value
    cookies = f"{settings.SESSION_COOKIE_NAME}={session}; {settings.CSRF_COOKIE_NAME}={secret}"
    body = urlencode(ASK | {"prompt": "slow", "csrfmiddlewaretoken": secret}).encode()
    head = (
        f"POST {at('stream', model)} HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookies}\r\n"
        f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    server = uvicorn.Server(uvicorn.Config(application, port=0, lifespan="off", log_level="error"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
    writer.write(head.encode() + body)
    await asyncio.wait_for(reader.readuntil(b"tuned1.3"), 10)
    writer.close()
    started = time.monotonic()
    later = Question(
        model_path=model.base_model.path if model.base_model else "",
        adapters={"tuned": str(model.folder)},
        sides={"tuned": [{"role": "user", "content": "Hello"}]},
        temperature=0, top_p=1, max_new_tokens=1, seed=0,
    )  # fmt: skip
    events = [event async for event in chat_room().answer(later)]
    assert events[-1]["type"] == "end"
    assert time.monotonic() - started < 4  # "slow" goes on for ten seconds
    await chat_room().close()
    server.should_exit = True
    await serving
