"""What this machine has: memory and GPUs, without torch (a CUDA context would break forked children)."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path
from typing import TypedDict

import psutil

logger = logging.getLogger(__name__)


class Gpu(TypedDict):
    uuid: str
    name: str
    memory_bytes: int


def ram_bytes() -> int:
    """The machine's memory, or the container's limit when that is less."""
    total = int(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return total


def gpus() -> list[Gpu]:
    """The GPUs that `nvidia-smi` names and `CUDA_VISIBLE_DEVICES` allows; none when there is no driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except FileNotFoundError:
        return []
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("nvidia-smi did not answer (%s): this worker goes on without GPUs.", error)
        return []
    return visible(parse(done.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse(text: str) -> list[Gpu]:
    found: list[Gpu] = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3 and fields[2].isdigit():
            found.append({"uuid": fields[0], "name": fields[1], "memory_bytes": int(fields[2]) * 1024 * 1024})
    return found


def visible(found: list[Gpu], allowed: str | None) -> list[Gpu]:
    """`CUDA_VISIBLE_DEVICES` names indices or uuids (or their beginnings); unset means all."""
    if allowed is None:
        return found
    chosen: list[Gpu] = []
    for name in (part.strip() for part in allowed.split(",")):
        if name.isdigit() and int(name) < len(found):
            chosen.append(found[int(name)])
        elif name.startswith("GPU-"):
            chosen.extend(gpu for gpu in found if gpu["uuid"].startswith(name))
    return chosen


def oom_kills() -> int:
    """How many processes of this control group the kernel has killed for memory; -1 when it does not say."""
    try:
        group = next(
            line.split("::", 1)[1]
            for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
            if line.startswith("0::")
        )
        events = Path("/sys/fs/cgroup") / group.lstrip("/") / "memory.events"
        counts = dict(line.split() for line in events.read_text(encoding="ascii").splitlines())
        return int(counts["oom_kill"])
    except (OSError, StopIteration, KeyError, ValueError):
        return -1
