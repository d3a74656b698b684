"""The studio's own system checks, each with what sets it off and what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.checks import CheckMessage

from studio import checks


def ids(found: list[CheckMessage]) -> list[str]:
    return [str(message.id) for message in found]


@pytest.fixture(autouse=True)
def quiet_settings(settings: Any, data_dir: Path) -> None:
    settings.HOST, settings.HTTPS, settings.REDIS_URL = "127.0.0.1", False, ""
    settings.ALLOWED_HOSTS = ["127.0.0.1", "localhost"]


@pytest.mark.parametrize(
    "check", [checks.check_hosts, checks.check_broker, checks.check_database, checks.check_folders]
)
def test_the_defaults_are_fine(check: Callable[..., list[CheckMessage]]) -> None:
    assert check(None) == []


def test_a_star_for_a_host_opens_the_sockets_to_any_site(settings: Any) -> None:
    settings.ALLOWED_HOSTS = ["*"]
    assert ids(checks.check_hosts(None)) == ["studio.E001"]


def test_an_open_address_without_https_is_warned_about(settings: Any) -> None:
    settings.HOST, settings.ALLOWED_HOSTS = "0.0.0.0", ["studio.example.org"]
    assert ids(checks.check_hosts(None)) == ["studio.W002"]
    settings.HTTPS = True
    assert ids(checks.check_hosts(None)) == []


def test_an_open_address_nobody_can_name_is_warned_about(settings: Any) -> None:
    settings.HOST, settings.HTTPS = "0.0.0.0", True
    assert ids(checks.check_hosts(None)) == ["studio.W007"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("none", []),
        ("redis://127.0.0.1:6379/0", []),
        ("redis://localhost:6379/0", []),
        ("unix:///run/valkey.sock", []),
        ("redis://queue.example.org:6379/0", ["studio.W003"]),
        ("redis://:secret@queue.example.org:6379/0", ["studio.W003"]),
        ("rediss://:secret@queue.example.org:6379/0", []),
    ],
)
def test_a_broker_on_another_machine_needs_a_password_and_tls(
    settings: Any, url: str, expected: list[str]
) -> None:
    settings.REDIS_URL = url
    found = checks.check_broker(None)
    assert ids(found) == expected
    assert all("secret" not in str(message) for message in found)


@pytest.mark.parametrize(
    ("kind", "expected"), [("nfs4", ["studio.E004"]), ("ext4", []), ("cifs", ["studio.E004"])]
)
def test_sqlite_on_a_network_filesystem_is_refused(
    settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, expected: list[str]
) -> None:
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=str(tmp_path), fstype=kind),
    ]
    monkeypatch.setattr(checks.psutil, "disk_partitions", lambda all: mounts)
    monkeypatch.setitem(
        settings.DATABASES, "default", {"ENGINE": "x.sqlite3", "NAME": tmp_path / "d/studio.sqlite3"}
    )
    assert ids(checks.check_database(None)) == expected


def test_a_folder_that_cannot_be_written_to_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    assert set(ids(checks.check_folders(None))) == {"studio.E005"}


def test_a_model_root_that_is_not_there_is_warned_about(settings: Any, tmp_path: Path) -> None:
    settings.MODEL_ROOTS = [tmp_path / "gone"]
    assert ids(checks.check_folders(None)) == ["studio.W006"]
