"""Settings as a fresh process reads them from its environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def read(data_dir: Path, *names: str, **extra: str) -> dict[str, Any]:
    code = f"import json; from studio import settings as s; print(json.dumps([getattr(s, n, None) for n in {names!r}]))"
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= {"STUDIO_DATA_DIR": str(data_dir), "STUDIO_ENV_FILE": "none"} | extra
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(names, json.loads(done.stdout), strict=True))


def test_the_version_is_the_newest_of_the_changelog(tmp_path: Path) -> None:
    newest = (ROOT / "CHANGELOG.md").read_text().split("## ")[1].split()[0]
    assert read(tmp_path, "VERSION") == {"VERSION": newest}


def test_the_secret_key_is_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    first = read(tmp_path, "SECRET_KEY")
    assert first == read(tmp_path, "SECRET_KEY") and len(first["SECRET_KEY"]) > 60
    assert (tmp_path / "secret_key").stat().st_mode & 0o777 == 0o600
    assert read(tmp_path, "SECRET_KEY", STUDIO_SECRET_KEY="given")["SECRET_KEY"] == "given"


def test_https_makes_cookies_secure_and_believes_a_local_proxy(tmp_path: Path) -> None:
    names = ("SESSION_COOKIE_SECURE", "CSRF_COOKIE_SECURE", "SECURE_SSL_REDIRECT", "TRUSTED_PROXIES")
    assert list(read(tmp_path, *names).values()) == [False, False, None, []]
    secure = read(tmp_path, *names, STUDIO_HTTPS="1")
    assert list(secure.values()) == [True, True, True, ["127.0.0.1", "::1"]]


def test_two_ports_have_two_cookies(tmp_path: Path) -> None:
    """A browser sends a host's cookies to all its ports: two studios would sign each other's people out."""
    names = ("SESSION_COOKIE_NAME", "CSRF_COOKIE_NAME")
    one, other = read(tmp_path, *names), read(tmp_path, *names, STUDIO_PORT="8001")
    assert not set(one.values()) & set(other.values())


@pytest.mark.parametrize(
    ("extra", "broker", "layer"),
    [
        ({}, "memory://", "channels.layers.InMemoryChannelLayer"),
        ({"STUDIO_BROKER_SOCKET": "/run/b.sock"}, "redis+socket:///run/b.sock", "channels_redis.pubsub"),
        ({"STUDIO_REDIS_URL": "redis://h/0"}, "redis://h/0", "channels_redis.pubsub"),
        (
            {"STUDIO_REDIS_URL": "redis://h/0", "STUDIO_BROKER_SOCKET": "/b"},
            "redis://h/0",
            "channels_redis.pubsub",
        ),
        ({"STUDIO_REDIS_URL": "none", "STUDIO_BROKER_SOCKET": "/b"}, "memory://", "channels.layers.InMemory"),
    ],
)
def test_the_broker_follows_from_two_settings(
    tmp_path: Path, extra: dict[str, str], broker: str, layer: str
) -> None:
    found = read(tmp_path, "CELERY_BROKER_URL", "CHANNEL_LAYERS", **extra)
    assert found["CELERY_BROKER_URL"] == broker
    assert found["CHANNEL_LAYERS"]["default"]["BACKEND"].startswith(layer)


def test_sqlite_waits_for_its_turn_and_postgresql_is_one_variable_away(tmp_path: Path) -> None:
    sqlite = read(tmp_path, "DATABASES")["DATABASES"]["default"]
    assert sqlite["OPTIONS"]["transaction_mode"] == "IMMEDIATE" and "WAL" in sqlite["OPTIONS"]["init_command"]
    other = read(tmp_path, "DATABASES", DATABASE_URL="postgres://u:p@h:5433/d")["DATABASES"]["default"]
    assert other["ENGINE"].endswith("postgresql") and (other["HOST"], other["PORT"]) == ("h", 5433)


def test_the_host_it_listens_on_is_a_host_it_answers_to(tmp_path: Path) -> None:
    assert "10.1.2.3" in read(tmp_path, "ALLOWED_HOSTS", STUDIO_HOST="10.1.2.3")["ALLOWED_HOSTS"]
    assert "0.0.0.0" not in read(tmp_path, "ALLOWED_HOSTS", STUDIO_HOST="0.0.0.0")["ALLOWED_HOSTS"]
