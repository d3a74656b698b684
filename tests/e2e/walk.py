"""What a person does in the studio, as functions on a browser page; and what a socket told that page.

With `ROAD_PICTURES=folder` in the environment every page passed is photographed, to be looked at.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, WebSocket, expect

from tests.live import PASSWORD

expect.set_options(timeout=20_000)  # the whole studio and a training share this machine with the browser
LOSS = "document.getElementById('chart-loss')"
TRAIN_STEPS = f"({LOSS}.data?.[0].x ?? [])"
LONG = 60_000  # ms: a process that imports torch on a busy machine
TASK_PATH = re.compile(r"/tasks/[0-9a-f-]{36}/$")
ENDED = re.compile("Succeeded|Stopped, model kept|Failed|Cancelled")


REPEATED_IDS = """
[...document.querySelectorAll("[id]")].map((each) => each.id).filter((id, at, all) => all.indexOf(id) !== at)
"""


def look(page: Page, name: str) -> None:
    """What must be true of every page a person sees; a picture of it when they are wanted."""
    width, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= window, f"{page.url} is {width} px wide in a window of {window}"
    assert page.evaluate(REPEATED_IDS) == [], (
        f"{page.url} has an id twice: a label would lead to the wrong field"
    )
    assert page.get_by_role("heading", level=1).count() == 1, page.url
    picture(page, name)


def picture(page: Page, name: str, *, whole: bool = True) -> None:
    if folder := os.environ.get("ROAD_PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for chart in page.locator("[data-chart-card]").all():  # they are drawn when they are seen
            chart.scroll_into_view_if_needed()
            page.wait_for_timeout(400)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)


def until(page: Page, condition: str, *, seconds: float = 20) -> None:
    """Waits from here: the page's own policy forbids the eval with which Playwright would wait inside it."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never true: {condition}"
        page.wait_for_timeout(50)


class Socket:
    """Every frame the page's sockets received. Begin before the page is opened."""

    def __init__(self, page: Page) -> None:
        self.frames: list[tuple[float, dict[str, Any]]] = []
        page.on("websocket", self._opened)

    def _opened(self, socket: WebSocket) -> None:
        socket.on("framereceived", self._received)

    def _received(self, payload: str | bytes) -> None:
        self.frames.append((time.monotonic(), json.loads(payload)))

    def train_steps(self) -> list[int]:
        """As they came, doubles included."""
        return [row["step"] for _, frame in self.frames for row in frame["points"] if row["split"] == "train"]

    def moments_while_running(self) -> list[float]:
        """When frames with training points came, before the first frame that said the task had ended."""
        moments: list[float] = []
        for moment, frame in self.frames:
            if frame.get("state") and frame["state"]["terminal"]:
                break
            if any(row["split"] == "train" for row in frame["points"]):
                moments.append(moment)
        return moments


# --- people -----------------------------------------------------------------------------------------
def make_account(page: Page, address: str, name: str) -> None:
    page.goto(address)
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_label("Password again").fill(PASSWORD)
    look(page, "first-run")
    page.get_by_role("button", name="Make the account").click()
    expect(page.get_by_role("heading", name="Fine-tuning tasks")).to_be_visible()


def sign_in(page: Page, url: str, name: str, *, to: str = "/tasks/") -> None:
    page.goto(f"{url}/sign-in/?next={to}")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(url + to)


# --- the four steps -----------------------------------------------------------------------------------
def start_draft(page: Page, url: str) -> None:
    page.goto(f"{url}/tasks/")
    page.get_by_role("button", name=re.compile("^New task$")).click()
    expect(page.get_by_role("heading", name="Choose Base Model", level=1)).to_be_visible()


def add_folder(page: Page, folder: str) -> None:
    """Step 1, from a folder on the server."""
    page.get_by_label("Folder", exact=True).fill(folder)
    page.get_by_role("button", name="Add the folder").click()
    expect(page.get_by_role("radio", name=beginning(folder))).to_be_checked()


def choose(page: Page, name: str) -> None:
    """Tick a model or a dataset by the beginning of its name."""
    page.get_by_role("radio", name=beginning(name)).check()


def choose_dataset(page: Page, name: str) -> None:
    """Tick it and wait for what is known of it; a dataset of a new account may still be validated."""
    choose(page, name)
    expect(page.locator("#dataset-status")).to_contain_text("different prompts", timeout=LONG)


def beginning(name: str) -> re.Pattern[str]:
    """Playwright writes it between slashes, so those inside need a backslash."""
    return re.compile("^" + re.escape(name).replace("/", r"\/"))


def go_on(page: Page, heading: str) -> None:
    page.get_by_role("button", name="Continue", exact=True).click()
    expect(page.get_by_role("heading", name=heading, level=1)).to_be_visible()


def hold_out(page: Page, percent: int, *, every: int = 0) -> None:
    page.get_by_label("Share", exact=True).fill(str(percent))
    page.get_by_label("Evaluate every … steps").fill(str(every))


def fill_settings(page: Page, *, name: str, model_name: str, **values: object) -> None:
    """Step 3; `values` by the labels on screen."""
    page.get_by_label("Custom Model Name").fill(model_name)
    page.get_by_label("Task Display Name").fill(name)
    if not page.locator("details[open] >> text=Advanced Parameters").count():
        page.get_by_text("Advanced Parameters").click()
    for label, value in values.items():
        page.get_by_label(label, exact=True).fill(str(value))


def create(page: Page) -> str:
    """Step 4; the path of the task's page."""
    page.get_by_role("button", name="Create Task").click()
    page.wait_for_url(TASK_PATH)
    return page.url[page.url.index("/tasks/") :]


# --- the task page ------------------------------------------------------------------------------------
def steps_drawn(page: Page) -> list[int]:
    steps: list[int] = page.evaluate(TRAIN_STEPS)
    return steps


def steps_drawn_whole(page: Page) -> list[int]:
    """The steps on the chart once it has as many as the status card counts."""
    wait_for_steps(page, int(page.locator("[data-state=step]").inner_text().replace(",", "")))
    return steps_drawn(page)


def wait_for_steps(page: Page, number: int, *, seconds: float = 60) -> None:
    until(page, f"({LOSS}?.data?.[0].x.length ?? 0) >= {number}", seconds=seconds)


def wait_for_end(page: Page, label: str, *, seconds: float = 60) -> None:
    badge = page.locator("#task-status .badge").first
    expect(badge).to_have_text(ENDED, timeout=seconds * 1000)
    expect(badge).to_have_text(label)


def total_steps(page: Page) -> int:
    return int(page.locator("[data-state=total_steps]").inner_text().replace(",", ""))


# --- Try it --------------------------------------------------------------------------------------------
def ask_both(page: Page, prompt: str) -> tuple[str, str, int]:
    """(base's answer, tuned's answer, how many different lengths were seen while they were written)."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Send to both").click()
    seen: set[int] = set()
    answers = page.locator(".turn").last.locator(".answer-text")
    notes = page.locator(".turn").last.locator("[data-note]")
    end = time.monotonic() + 90
    while not all("tokens/s" in note for note in notes.all_inner_texts()) or notes.count() < 2:
        assert time.monotonic() < end, page.locator("#status").inner_text()
        seen.add(sum(len(text) for text in answers.all_inner_texts()))
        page.wait_for_timeout(20)
    base, tuned = answers.all_inner_texts()
    return base, tuned, len(seen - {0})
