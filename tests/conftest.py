"""Two people, a data directory of one's own, and no way out to the network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client

from tests.browser import browser, open_page, page  # noqa: F401 - fixtures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast part first, so that a mistake is seen early; then what is slow; the browser last."""

    def order(item: pytest.Item) -> int:
        if item.get_closest_marker("e2e"):
            return 2
        return 1 if item.get_closest_marker("slow") else 0

    items.sort(key=order)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """No bytes in a test's name: gzip and zip write the time into theirs, and two workers of pytest-xdist that collect
    in different seconds would then see different tests and refuse to begin."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True, scope="session")
def no_way_out() -> Iterator[None]:
    """A test that reaches for another machine fails at once, also where there is a network."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in {socket.AF_INET, socket.AF_INET6} and not ip_address(address[0]).is_loopback:
            raise AssertionError(f"a test tried to reach {address[0]}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture
def data_dir(tmp_path: Path, settings: Any) -> Path:
    """Point every folder of the studio into this test's own temporary directory."""
    for name, folder in (
        ("DATASETS_DIR", "datasets"),
        ("RUNS_DIR", "runs"),
        ("BASE_MODELS_DIR", "base_models"),
        ("MODELS_DIR", "models"),
        ("LOGS_DIR", "logs"),
        ("FILE_UPLOAD_TEMP_DIR", "uploads"),
    ):
        path = tmp_path / "data" / folder
        path.mkdir(parents=True)
        setattr(settings, name, path)
    settings.DATA_DIR = tmp_path / "data"
    return tmp_path / "data"


@pytest.fixture
def alice(db: None) -> Any:
    """Owns what the test makes."""
    return get_user_model().objects.create_user("alice", password="correct horse battery")


@pytest.fixture
def mallory(db: None) -> Any:
    """Signed in, and a stranger to everything of alice's."""
    return get_user_model().objects.create_user("mallory", password="correct horse battery")


@pytest.fixture
def alice_client(alice: Any) -> Iterator[Client]:
    client = Client()
    client.force_login(alice)
    yield client


@pytest.fixture
def mallory_client(mallory: Any) -> Iterator[Client]:
    client = Client()
    client.force_login(mallory)
    yield client
