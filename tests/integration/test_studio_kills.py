"""SIGKILL to the parts of a running studio while a person watches a run; the page is never reloaded.

The engine is the stub, everything else is real, with its real time limits. Kills of single workers in all
their variants are in test_kills.py. The seed is printed; `KILL_SEED=…` replays it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import Page, expect

from tests import errands, live
from tests.browser import OpenPage
from tests.e2e import walk
from tests.live import LiveStudio
from tests.needs import need_broker
from tests.training.model_folders import make_model_folder

EXPECTED = "WebSocket connection|ERR_CONNECTION|ERR_EMPTY|ERR_SOCKET|ERR_INCOMPLETE|htmx:|status of 50"
pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.kill, pytest.mark.console_errors(EXPECTED)]

STEPS = 120
STEP_SECONDS = 0.06  # a page on a busy machine is a second or two behind
FIRST, LAST = 3, 60  # the steps between which a part is killed


def start(folder: Path) -> LiveStudio:
    with socket.socket() as probe:  # one port over a restart: an open page finds its studio again
        probe.bind(("127.0.0.1", 0))
        port = (folder / "port").read_text() if (folder / "port").exists() else str(probe.getsockname()[1])
    (folder / "port").write_text(port)
    return live.start(
        folder / "data",
        DJANGO_SETTINGS_MODULE="tests.integration.settings_worker",
        STUDIO_PORT=port,
        STUDIO_MODEL_ROOTS=str(folder / "models"),
        STUB_STEPS=str(STEPS),
        STUB_STEP_SECONDS=str(STEP_SECONDS),
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder that outlives its studios."""
    need_broker()
    folder = tmp_path_factory.mktemp("kills")
    make_model_folder(folder / "models" / "tiny")
    yield folder
    leftovers = [process for process in psutil.process_iter() if str(folder) in command(process)]
    for process in leftovers:
        process.kill()
    assert not leftovers, "a studio left something behind"


def command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture
def studio(home: Path) -> Iterator[LiveStudio]:
    studio = start(home)
    if studio.link:
        studio.make_first_account("alice")
    yield studio
    print(studio.output())
    live.end(studio)


@pytest.fixture
def dice() -> random.Random:
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 1_000_000)
    print(f"KILL_SEED={seed}")
    return random.Random(seed)


def kill_tree(studio: LiveStudio, *words: str) -> list[int]:
    """SIGKILL to a process and all below it, the top first so that nothing is reported to it."""
    top = studio.find(*words)[0]
    family = [top, *top.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return [process.pid for process in family]


def watch_until(page: Page, step: int) -> None:
    walk.until(page, f"({walk.TRAIN_STEPS}.at(-1) ?? 0) >= {step}", seconds=60)


def begin(studio: LiveStudio, open_page: OpenPage) -> tuple[Page, str]:
    """A run, and a person who watches it."""
    task = errands.create_task(studio.sign_in("alice"), "tiny")
    page = open_page(viewport={"width": 1280, "height": 900})
    walk.sign_in(page, studio.url, "alice", to=task)
    page.evaluate("window.neverReloaded = true")
    return page, task


# --- what must be true afterwards -----------------------------------------------------------------------
def said_by_engines(studio: LiveStudio, task: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(split, step) -> its values in every attempt, from the engines' own files."""
    said: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for path in sorted(
        (studio.data_dir / "runs" / task.strip("/").removeprefix("tasks/")).glob("e*/events.jsonl")
    ):
        for line in path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError):  # a line that was cut off by the kill
                event = json.loads(line)
                if event["type"] == "metrics":
                    said.setdefault((event["split"], event["step"]), []).append(event["values"])
    return said


def stored(studio: LiveStudio, task: str) -> list[tuple[int, str, int, dict[str, Any]]]:
    """The rows as the database has them: seq, split, step, values."""
    key = task.strip("/").removeprefix("tasks/").replace("-", "")
    uri = f"file:{studio.data_dir / 'studio.sqlite3'}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=10)) as database:
        rows = database.execute(
            'SELECT seq, split, step, "values" FROM training_metricpoint WHERE task_id = ? ORDER BY seq',
            [key],
        ).fetchall()
    return [(seq, split, step, json.loads(values)) for seq, split, step, values in rows]


def assert_true_end(studio: LiveStudio, page: Page, task: str) -> None:
    """Succeeded; each point that an engine said is stored once, with its value; the open page has them all."""
    walk.wait_for_end(page, "Succeeded", seconds=90)
    walk.wait_for_steps(page, STEPS)
    assert walk.steps_drawn(page) == list(range(1, STEPS + 1))
    assert page.evaluate("window.neverReloaded"), "the page caught up by itself"
    expect(page.locator("#live-pill")).to_have_text("Ended", timeout=20_000)

    rows, said = stored(studio, task), said_by_engines(studio, task)
    places = [(split, step) for _, split, step, _ in rows]
    assert len(places) == len(set(places)) and set(places) == set(said), (
        "every point, none twice, none invented"
    )
    assert {("train", step) for step in range(1, STEPS + 1)} | {("eval", 0), ("eval", STEPS)} == set(places)
    for _, split, step, values in rows:
        assert values in said[split, step], f"{split} {step}: {values} was never said"
    person = studio.sign_in("alice")
    points, state = errands.every_point(person, task)
    assert [row["seq"] for row in points] == [row[0] for row in rows] and state["step"] == STEPS
    models = person.get("/models/")[1]
    assert models.count(f'href="{task}"') == 1, "one model came out of it"
    assert_no_process_of(studio, task)


def assert_no_process_of(studio: LiveStudio, task: str) -> None:
    end = time.monotonic() + 5
    while left := studio.find(task.strip("/").removeprefix("tasks/")):
        assert time.monotonic() < end, [command(process) for process in left]
        time.sleep(0.1)


# --- the kills ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("victim", ["web", "broker", "worker", "engine"])
def test_a_part_is_killed_while_a_person_watches(
    victim: str, studio: LiveStudio, open_page: OpenPage, dice: random.Random
) -> None:
    page, task = begin(studio, open_page)
    watch_until(page, dice.randrange(FIRST, LAST))
    killed = {
        "web": lambda: [studio.kill_web()],
        "broker": lambda: [studio.kill_broker()],
        "worker": lambda: kill_tree(studio, "celery", "--queues gpu"),
        "engine": lambda: [studio.kill("stub_engine")],
    }[victim]()
    seen = walk.steps_drawn(page)
    assert seen and seen[-1] < STEPS, "it was still running"
    assert_true_end(studio, page, task)
    living = {process.pid for process in studio.processes()}
    assert not living & set(killed)
    attempts = len(list((studio.data_dir / "runs" / task.split("/")[2]).glob("e*")))
    assert attempts == (1 if victim in {"web", "broker"} else 2), "only a lost engine needs another attempt"


def test_everything_is_killed_at_once_and_started_again(
    home: Path, studio: LiveStudio, open_page: OpenPage, dice: random.Random
) -> None:
    page, task = begin(studio, open_page)
    watch_until(page, dice.randrange(FIRST, LAST))
    for process in [psutil.Process(studio.process.pid), *studio.processes()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    studio.process.wait(timeout=5)
    studio.assert_nothing_left()
    expect(page.locator("#live-pill")).to_have_text(re.compile("Offline|Catching"), timeout=20_000)
    again = start(home)
    try:
        assert_true_end(again, page, task)
        assert again.stop() == 0
        again.assert_nothing_left()
    finally:
        live.end(again)
