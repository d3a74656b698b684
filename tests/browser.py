"""A real browser for tests, strict about what pages do.

`page` is a fresh browser window; `open_page(**context_options)` opens more (another person, a phone, dark
colours). At the end of every test: no violation of the Content-Security-Policy, no script error, no console
error, no request to any host but the studio's. `@pytest.mark.console_errors("pattern")` excuses expected ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.needs import find_chromium, need

OpenPage = Callable[..., Page]
LOCAL = {"127.0.0.1", "localhost", "::1", None}
REPORT_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) => {
  const place = `${event.sourceFile}:${event.lineNumber}`;
  console.error(`CSP violation: ${event.violatedDirective} blocked ${event.blockedURI} at ${place}`);
});
"""
# A refused form answers 4xx on purpose, and the browser notes it on its console. A page that is left while it polls
# aborts that request, and htmx notes it twice (a request that failed has a note of its own beside htmx:afterRequest).
ALWAYS_FINE = re.compile(
    r"^Failed to load resource: the server responded with a status of 4\d\d|^htmx:(sendAbort|afterRequest),"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium per test module. Not per session: its event loop would be in the way of later tests."""
    with sync_playwright() as playwright:
        path = find_chromium(playwright.chromium.executable_path)
        need(
            path,
            "No Chromium: install chromium with the system's packages, or run `playwright install chromium`.",
        )
        arguments = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        if os.geteuid() == 0:
            arguments.append("--no-sandbox")  # Chromium refuses to run as root with it
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[OpenPage]:
    problems: list[str] = []
    contexts: list[Any] = []

    def note_request(address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme in {"http", "https", "ws", "wss"} and parts.hostname not in LOCAL:
            problems.append(f"request to another host: {address}")

    def open_one(**options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.add_init_script(REPORT_VIOLATIONS)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(f"script error: {error.stack or error}"))
        page.on("request", lambda sent: note_request(sent.url))
        page.on("websocket", lambda opened: note_request(opened.url))
        return page

    yield open_one
    for context in contexts:
        context.close()
    excused = [mark.args[0] for mark in request.node.iter_markers("console_errors")]
    left = [
        problem
        for problem in problems
        if not ALWAYS_FINE.match(problem) and not any(re.search(pattern, problem) for pattern in excused)
    ]
    assert not left, "the browser complained:\n" + "\n".join(left)


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    return open_page(viewport={"width": 1280, "height": 900})
