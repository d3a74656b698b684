"""What Django's own system checks cannot know about this studio. Run at every start and by `check --deploy`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register

NETWORK_FILESYSTEMS = {
    "nfs",
    "nfs3",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "afpfs",
    "9p",
    "fuse.sshfs",
    "ceph",
    "glusterfs",
}


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that holds this path, by the longest mount point above it."""
    best, kind = 0, ""
    for partition in psutil.disk_partitions(all=True):
        mount = Path(partition.mountpoint)
        if (path == mount or mount in path.parents) and len(mount.parts) > best:
            best, kind = len(mount.parts), partition.fstype
    return kind


@register(Tags.security)
def check_hosts(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    problems: list[CheckMessage] = []
    if "*" in settings.ALLOWED_HOSTS:
        problems.append(
            Error(
                "STUDIO_ALLOWED_HOSTS is '*': then any site could open the studio's websockets in a visitor's name.",
                hint="List the names people type into the browser, separated by commas.",
                id="studio.E001",
            )
        )
    if not is_loopback(settings.HOST) and not settings.HTTPS:
        problems.append(
            Warning(
                f"STUDIO_HOST={settings.HOST} is reachable from other machines without HTTPS: passwords would "
                "travel in the clear.",
                hint="Put a proxy with HTTPS in front and set STUDIO_HTTPS=1, or use STUDIO_HOST=127.0.0.1.",
                id="studio.W002",
            )
        )
    if not is_loopback(settings.HOST) and all(is_loopback(host) for host in settings.ALLOWED_HOSTS):
        problems.append(
            Warning(
                f"STUDIO_HOST={settings.HOST} is open to other machines, but every name they could use is refused.",
                hint="Set STUDIO_ALLOWED_HOSTS to the names or addresses people will type into the browser.",
                id="studio.W007",
            )
        )
    return problems


@register(Tags.security)
def check_broker(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    parts = urlsplit(settings.REDIS_URL)
    if parts.scheme not in {"redis", "rediss"} or is_loopback(parts.hostname or "localhost"):
        return []
    if parts.password and parts.scheme == "rediss":
        return []
    lacking = "a password" if not parts.password else "TLS"
    return [
        Warning(
            f"STUDIO_REDIS_URL names another machine ({parts.hostname}) without {lacking}: whoever reaches it can "
            "start and stop work in this studio.",
            hint="Use rediss://:password@host:6379/0, or a network that nobody else is on.",
            id="studio.W003",
        )
    ]


@register(Tags.database)
def check_database(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    if not settings.DATABASES["default"]["ENGINE"].endswith("sqlite3"):
        return []
    name = str(settings.DATABASES["default"]["NAME"])
    kind = "" if name.startswith(("file:", ":")) else filesystem_of(Path(name).resolve())
    if kind not in NETWORK_FILESYSTEMS:
        return []
    return [
        Error(
            f"The SQLite database {name} lies on a network filesystem ({kind}), where its locks do not hold.",
            hint="Set STUDIO_DATA_DIR to a local disk, or DATABASE_URL to a PostgreSQL server.",
            id="studio.E004",
        )
    ]


@register()
def check_folders(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    problems: list[CheckMessage] = []
    for name in ("DATA_DIR", "DATASETS_DIR", "RUNS_DIR", "BASE_MODELS_DIR", "MODELS_DIR", "LOGS_DIR"):
        folder = Path(getattr(settings, name))
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            problems.append(
                Error(
                    f"The folder {folder} cannot be written to.",
                    hint="Give this user the right to write there, or set STUDIO_DATA_DIR to another folder.",
                    id="studio.E005",
                )
            )
    for root in settings.MODEL_ROOTS:
        if not Path(root).is_dir():
            problems.append(
                Warning(
                    f"STUDIO_MODEL_ROOTS names {root}, which is not a folder.",
                    hint="Correct the path, or leave it out.",
                    id="studio.W006",
                )
            )
    return problems
