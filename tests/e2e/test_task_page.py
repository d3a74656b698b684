"""The task page in a real browser: points arrive while one watches, a dead server loses none, nothing is blocked.

The rows are written here as the worker would write them; a whole training is watched in the tests of the road.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from django.conf import settings
from django.test import Client
from django.utils import timezone
from playwright.sync_api import Page, expect

from studio.asgi import application
from tests.browser import OpenPage
from tests.training.monitor_rows import add_events, add_point, add_points, make_task
from training.models import TrainingTask

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.django_db(transaction=True)]

LOSS = "document.getElementById('chart-loss')"
STEPS = f"{LOSS}.data?.[0].x"
NO_SOCKETS = """
window.WebSocket = class extends EventTarget {
  static OPEN = 1;
  constructor() { super(); setTimeout(() => this.dispatchEvent(new CloseEvent("close", { code: 1006 })), 5); }
  close() {}
};
"""


@pytest.fixture(scope="module", autouse=True)
def rows_beside_a_browser() -> Iterator[None]:
    """The browser's driver has an event loop in this thread, in which Django would refuse to touch the database."""
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"
    yield
    del os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"]


def until(page: Page, condition: str, *, seconds: float = 15) -> None:
    """Waits from here: the page's own policy forbids the eval with which Playwright would wait inside it."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never true: {condition}"
        page.wait_for_timeout(50)


class Server:
    """The web process in a thread, on a port that it keeps over a restart."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        config = uvicorn.Config(application, port=self.port, lifespan="off", log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        end = time.monotonic() + 20
        while not self.server.started and time.monotonic() < end:
            time.sleep(0.05)
        assert self.server.started

    def stop(self) -> None:
        self.server.force_exit = self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture
def server(data_dir: Any) -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def sign_in(page: Page, server: Server, user: Any) -> None:
    client = Client()
    client.force_login(user)
    name = settings.SESSION_COOKIE_NAME
    page.context.add_cookies([{"name": name, "value": client.cookies[name].value, "url": server.url}])


def watched(page: Page, server: Server, user: Any, **fields: Any) -> TrainingTask:
    """A running task with 30 steps and two evaluations, opened in the browser."""
    task = make_task(user, **fields)
    add_point(task, 0, {"eval_loss": 0.693, "eval_rewards/accuracies": 0.0, "eval_kl": 0.0}, split="eval")
    add_points(task, 30)
    add_point(task, 30, {"eval_loss": 0.64, "eval_rewards/accuracies": 0.7, "eval_kl": 0.01}, split="eval")
    sign_in(page, server, user)
    page.goto(f"{server.url}{task.get_absolute_url()}")
    until(page, f"{STEPS}?.length === 30")
    return task


def test_points_appear_while_one_watches_each_once(server: Server, page: Page, alice: Any) -> None:
    task = watched(page, server, alice)
    expect(page.locator("#live-pill")).to_have_text("Live")
    for step in range(31, 51):
        add_point(task, step, {"loss": 0.6, "grad_norm": 1.0})
        time.sleep(0.02)
    until(page, f"{STEPS}.at(-1) === 50")
    assert page.evaluate(STEPS) == list(range(1, 51))
    expect(page.locator("[data-state=step]")).to_have_text("50")
    page.reload()
    until(page, f"{STEPS}?.at(-1) === 50")
    assert page.evaluate(STEPS) == list(range(1, 51))


def test_an_evaluation_renews_the_reading_and_an_event_the_history(
    server: Server, page: Page, alice: Any
) -> None:
    task = watched(page, server, alice, total_steps=60)
    expect(page.locator("#task-reading")).to_contain_text("Too early to say")
    add_points(task, 10)
    add_point(task, 40, {"eval_loss": 0.58}, split="eval")
    expect(page.locator("#task-reading")).to_contain_text("Your model is learning well")
    add_events(task, "A checkpoint was saved at step 40.")
    expect(page.locator("#task-history")).to_contain_text("A checkpoint was saved at step 40.")


@pytest.mark.console_errors("WebSocket connection|ERR_CONNECTION|Failed to load resource")
def test_a_dead_server_is_said_and_nothing_written_meanwhile_is_lost(
    server: Server, page: Page, alice: Any
) -> None:
    task = watched(page, server, alice)
    server.stop()
    expect(page.locator("#live-pill")).to_contain_text("Offline since", timeout=15_000)
    add_points(task, 25)
    server.start()
    until(page, f"{STEPS}.at(-1) === 55", seconds=30)
    assert page.evaluate(STEPS) == list(range(1, 56))
    expect(page.locator("#live-pill")).to_have_text("Live")


def test_without_any_socket_the_page_polls(server: Server, page: Page, alice: Any) -> None:
    page.add_init_script(NO_SOCKETS)
    task = watched(page, server, alice)
    add_points(task, 5)
    until(page, f"{STEPS}.at(-1) === 35", seconds=30)
    assert page.evaluate(STEPS) == list(range(1, 36))
    expect(page.locator("#live-pill")).to_have_text("Live")


def test_the_end_is_told_and_a_retry_elsewhere_is_noticed(server: Server, page: Page, alice: Any) -> None:
    task = watched(page, server, alice)
    rows = TrainingTask.objects.filter(pk=task.pk)
    rows.update(
        status="failed",
        ended_at=timezone.now(),
        error="The loss became NaN.",
        next_step="Lower learning_rate.",
    )
    expect(page.get_by_role("heading", name="The loss became NaN.")).to_be_visible()
    expect(page.locator("#live-pill")).to_have_text("Ended", timeout=15_000)
    rows.update(status="running", ended_at=None)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#live-pill")).to_have_text("Live")
    expect(page.locator("#task-status .badge")).to_have_text("Running")


def test_smoothing_and_log_axis_are_kept_and_zoom_survives_new_points(
    server: Server, page: Page, alice: Any
) -> None:
    task = watched(page, server, alice)
    page.locator("#smoothing").fill("0.9")
    page.locator("#log-axis").check()
    until(page, f"{LOSS}.layout.yaxis.type === 'log'")
    page.reload()
    until(page, f"{LOSS}.layout?.yaxis.type === 'log'")
    expect(page.locator("#smoothing-value")).to_have_text("0.90")
    area = page.locator("#chart-loss .nsewdrag").first.bounding_box()
    assert area is not None
    page.mouse.move(area["x"] + 60, area["y"] + 30)
    page.mouse.down()
    page.mouse.move(area["x"] + 160, area["y"] + 120, steps=5)
    page.mouse.up()
    until(page, f"{LOSS}.layout.xaxis.range[0] > 1")
    view = page.evaluate(f"{LOSS}.layout.xaxis.range")
    add_points(task, 3)
    until(page, f"{STEPS}.at(-1) === 33")
    assert page.evaluate(f"{LOSS}.layout.xaxis.range") == view


def test_colours_follow_light_and_dark_while_the_page_is_open(server: Server, page: Page, alice: Any) -> None:
    watched(page, server, alice)
    colour = f"{LOSS}.data[0].line.color"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    until(page, f"{colour} !== '{light}'")


def test_a_chart_can_be_taken_away_as_picture_and_as_numbers(server: Server, page: Page, alice: Any) -> None:
    watched(page, server, alice)
    card = page.locator("[data-chart-card=loss]")
    with page.expect_download() as picture:
        card.get_by_role("button", name="PNG").click()
    assert picture.value.path().read_bytes().startswith(b"\x89PNG")
    with page.expect_download() as numbers:
        card.get_by_role("link", name="CSV").click()
    assert numbers.value.path().read_text().startswith("step,split,time,loss,eval_loss")


def test_stop_explains_first_and_escape_changes_nothing(server: Server, page: Page, alice: Any) -> None:
    task = watched(page, server, alice)
    page.get_by_role("link", name="Stop…").click()
    expect(page.get_by_role("dialog")).to_contain_text("No model appears in My Models")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("link", name="Stop…").click()
    page.get_by_role("button", name="Stop and keep the model").click()
    expect(page.locator("#task-status")).to_contain_text("the model will be kept")
    task.refresh_from_db()
    assert task.desired_state == "stop"


def test_a_page_opened_while_the_task_was_queued_offers_both_ways_to_end_it_later(
    server: Server, page: Page, alice: Any
) -> None:
    task = make_task(alice, status="queued")
    sign_in(page, server, alice)
    page.goto(f"{server.url}{task.get_absolute_url()}")
    expect(page.locator("#live-pill")).to_have_text("Live")
    TrainingTask.objects.filter(pk=task.pk).update(
        status="running", started_at=timezone.now(), total_steps=100
    )
    page.get_by_role("link", name="Stop…").click()
    expect(page.get_by_role("button", name="Cancel the task")).to_be_visible()
    page.get_by_role("button", name="Stop and keep the model").click()
    expect(page.locator("#task-status")).to_contain_text("the model will be kept")


def test_markup_in_names_and_sentences_runs_nowhere(server: Server, page: Page, alice: Any) -> None:
    evil = "<img src=x onerror=window.bitten=1></script><script>window.bitten=1</script>"
    task = watched(page, server, alice, name=evil[:120])
    add_events(task, evil)
    expect(page.locator("#task-history")).to_contain_text("<img src=x")
    assert page.evaluate("window.bitten") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(server: Server, open_page: OpenPage, alice: Any, scheme: str) -> None:
    page = open_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    watched(page, server, alice)
    for chart in page.locator("[data-chart-card]").all():
        chart.scroll_into_view_if_needed()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_elapsed_time_does_not_follow_a_wrong_clock_of_the_browser(
    server: Server, page: Page, alice: Any
) -> None:
    page.add_init_script("const now = Date.now.bind(Date); Date.now = () => now() + 5 * 3600 * 1000;")
    watched(page, server, alice)
    expect(page.locator("[data-elapsed]")).to_have_text(re.compile(r"^\d+ s$"))
    page.wait_for_timeout(1500)  # the page's own clock has ticked since
    expect(page.locator("[data-elapsed]")).to_have_text(re.compile(r"^\d+ s$"))
