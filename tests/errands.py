"""What tests must have done before they begin, done over plain HTTP: a person without a browser creates a task."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from typing import Any

from tests.live import Person

STEP = re.compile(r"/tasks/([0-9a-f-]{36})/setup/")
ENDED = {"succeeded", "stopped", "failed", "cancelled"}
QUICK = {
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "1",
    "learning_rate": "1e-2",
    "lora_r": "4",
    "max_length": "256",
}


def create_task(person: Person, folder: str, *, name: str = "errand", **parameters: str) -> str:
    """From a model folder below the first allowed root and the example dataset; the task's path."""
    _, page = person.post("/tasks/new/", {}, form_at="/tasks/")
    task = f"/tasks/{found(STEP, page)}/"
    step = f"{task}setup/"
    person.post(f"{step}model/folder/", {"root": "0", "relative": folder}, form_at=f"{step}model/")
    dataset = _example(person, step)
    data = {"dataset": dataset, "evaluation": "split", "validation_percent": "10", "eval_steps": "0"}
    person.post(f"{step}data/", data)
    _, page = person.get(f"{step}settings/")
    values: dict[str, str | list[str]] = {**fields(page), **QUICK, **parameters}
    values |= {"name": name, "model_name": f"{name}-v1"}
    _, page = person.post(f"{step}settings/", values)
    assert "Review and create the task" in page, page
    _, page = person.post(f"{step}review/", {})
    assert 'id="task-status"' in page, page
    return task


def found(pattern: re.Pattern[str], page: str) -> str:
    match = pattern.search(page)
    assert match, f"no {pattern.pattern} in {page[:2000]}"
    return match[1]


class _Fields(HTMLParser):
    """Text fields and ticked boxes of a page, as a browser without JavaScript would send them."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        kind = given.get("type")
        sent = kind == "text" or (kind == "checkbox" and "checked" in given)
        if tag == "input" and sent and "disabled" not in given:
            self.values.setdefault(given.get("name") or "", []).append(given.get("value") or "")


def fields(page: str) -> dict[str, list[str]]:
    parser = _Fields()
    parser.feed(page)
    return parser.values


def _example(person: Person, step: str, *, seconds: float = 30) -> str:
    """The id of the example dataset, once a worker has validated it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        _, page = person.get(f"{step}data/")
        for block in page.split('<label class="choice-row">')[1:]:
            if "Example:" in block and ">Ready<" in block:
                return found(re.compile(r'name="dataset" value="([^"]+)"'), block)
        time.sleep(0.2)
    raise AssertionError(f"the example dataset was not ready in {seconds:.0f} s")


def frame(person: Person, task: str, *, after: int = 0) -> dict[str, Any]:
    """The next rows after `after`, and the task's state."""
    answer: dict[str, Any] = json.loads(person.get(f"{task}points/?after={after}")[1])
    return answer


def every_point(person: Person, task: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All stored points in the order of `seq`, and the state."""
    points: list[dict[str, Any]] = []
    after = 0
    while True:
        page = frame(person, task, after=after)
        points += page["points"]
        after = page["to"]
        if not page["more"]:
            return points, page["state"]


def wait_for_end(person: Person, task: str, *, seconds: float = 60) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while True:
        state: dict[str, Any] = frame(person, task, after=10**9)["state"]
        if state["status"] in ENDED:
            return state
        assert time.monotonic() < end, f"not ended in {seconds:.0f} s: {state}"
        time.sleep(0.2)
