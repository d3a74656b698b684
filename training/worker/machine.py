"""Who this process is, in a way that survives reboots and reused process ids. Knows no Django models."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import psutil
from django.conf import settings


@dataclasses.dataclass(frozen=True)
class Identity:
    """A pid alone may belong to a stranger after a restart; with its start time and the boot it may not."""

    host: str
    boot_id: str
    pid: int
    pid_created: float

    @property
    def owner(self) -> str:
        return f"{self.host}:{self.boot_id[:8]}:{self.pid}:{self.pid_created:.2f}"


@functools.cache
def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return str(int(psutil.boot_time()))


def identity() -> Identity:
    process = psutil.Process()
    return Identity(settings.WORKER_NAME, boot_id(), process.pid, process.create_time())


def process_alive(pid: int, created: float) -> bool:
    """The very process that had this pid at that time; a zombie is not alive."""
    if pid <= 0:
        return False
    try:
        process = psutil.Process(pid)
        # Start times come from the kernel's tick count: two readings of one process differ by less.
        same = abs(process.create_time() - created) < 0.5
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def kill_group_of(pid: int, created: float) -> bool:
    """End an engine that outlived its supervisor, with everything it started. False: it is gone already."""
    if not process_alive(pid, created):
        return False
    try:
        if os.getpgid(pid) == pid:  # engines lead their own group
            os.killpg(pid, 9)
        else:
            os.kill(pid, 9)
    except ProcessLookupError:
        return False
    return True
