"""Try it in a real browser with the real chat process: both answer, Stop stops, a killed process costs one answer.

The model is tiny and its adapter is made here; what they say has no meaning.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from django.conf import settings
from django.test import Client
from django.urls import reverse
from playwright.sync_api import Page, expect

from studio.asgi import application
from tests.studio.made_models import make_base, make_model
from tests.tiny import build_tiny_model
from training.models import TrainedModel

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.django_db(transaction=True)]
LOADING = 60_000  # ms; torch on a busy machine


@pytest.fixture(scope="module", autouse=True)
def rows_beside_a_browser() -> Iterator[None]:
    """The browser's driver has an event loop in this thread, in which Django would refuse the database."""
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"
    yield
    del os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, adapter) with an adapter that clearly changes what is said."""
    from tests.engine.test_chat import make_adapter

    base = build_tiny_model(tmp_path_factory.mktemp("base"))
    return base, make_adapter(base, tmp_path_factory.mktemp("adapter"), spread=0.3)


@pytest.fixture
def model(alice: Any, data_dir: Path, weights: tuple[Path, Path]) -> TrainedModel:
    base, adapter = weights
    model = make_model(alice, base=make_base(base), name="Tiny <b>tuned</b>")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(adapter / name, model.folder / name)
    return model


@pytest.fixture
def address(data_dir: Path) -> Iterator[str]:
    """The web process in a thread, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(application, port=port, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.force_exit = server.should_exit = True
    thread.join(10)


@pytest.fixture
def try_page(page: Page, address: str, alice: Any, model: TrainedModel) -> Page:
    client = Client()
    client.force_login(alice)
    name = settings.SESSION_COOKIE_NAME
    page.context.add_cookies([{"name": name, "value": client.cookies[name].value, "url": address}])
    page.goto(address + reverse("serving:try", args=[model.pk]))
    page.fill("#id_temperature", "1")
    page.fill("#id_max_new_tokens", "40")
    return page


def ask(page: Page, prompt: str) -> None:
    page.fill("#id_prompt", prompt)
    page.click("#send")


def chat_processes() -> list[psutil.Process]:
    """The living ones; a zombie has no command line left."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.cmdline()[-2:] == ["training.engine", "chat"]:
                found.append(child)
    return found


def test_both_answer_a_conversation_goes_on_and_it_may_be_stopped(try_page: Page) -> None:
    page = try_page
    ask(page, "Hello <script>alert(1)</script>")
    expect(page.locator("#status")).to_contain_text("Loading the model")
    expect(page.locator(".answer-foot").first).to_contain_text("tokens/s", timeout=LOADING)
    answers = page.locator(".answer-text")
    base, tuned = answers.nth(0).text_content(), answers.nth(1).text_content()
    assert base and tuned and base != tuned
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".turn .bubble")).to_contain_text("<script>alert(1)</script>")

    ask(page, "More")
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator("#send")).to_be_enabled(timeout=LOADING)
    assert '"prompt":"More"' in page.input_value("#id_history")

    page.fill("#id_max_new_tokens", "2048")
    page.fill("#id_temperature", "2")
    ask(page, "Go on for ever")
    expect(page.locator(".turn").nth(2).locator(".answer-text").first).not_to_be_empty(timeout=LOADING)
    page.click("#stop")
    expect(page.locator(".turn").nth(2)).to_contain_text("stopped")
    expect(page.locator("#send")).to_be_enabled()
    page.fill("#id_max_new_tokens", "5")
    ask(page, "And now")  # would wait behind 2048 tokens if Stop had only hidden them
    expect(page.locator(".turn").nth(3).locator(".answer-foot").first).to_contain_text(
        "tokens", timeout=10_000
    )

    page.click("#restart")
    expect(page.locator(".turn")).to_have_count(0)
    assert page.input_value("#id_history") == ""


def test_a_killed_chat_process_costs_one_answer_and_no_text(try_page: Page) -> None:
    page = try_page
    page.fill("#id_max_new_tokens", "2048")
    page.fill("#id_temperature", "2")
    ask(page, "Tell me a long story")
    expect(page.locator(".answer-text").first).not_to_be_empty(timeout=LOADING)
    (process,) = chat_processes()
    process.send_signal(signal.SIGKILL)
    expect(page.locator("#problem")).to_contain_text("Send the prompt again")
    assert page.input_value("#id_prompt") == "Tell me a long story"
    page.fill("#id_max_new_tokens", "10")
    page.click("#send")
    expect(page.locator(".turn").last.locator(".answer-foot").last).to_contain_text(
        "tokens/s", timeout=LOADING
    )
    expect(page.locator("#problem")).to_be_hidden()


def test_what_cannot_be_asked_is_said_and_the_prompt_stays(try_page: Page) -> None:
    page = try_page
    page.fill("#id_top_p", "7")
    ask(page, "Hello")
    expect(page.locator("#problem")).to_have_text("Top-p must be a number from 0.01 to 1.")
    assert page.input_value("#id_prompt") == "Hello"
    expect(page.locator(".turn")).to_have_count(0)
    assert chat_processes() == []
