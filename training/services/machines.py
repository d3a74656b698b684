"""Which machine a run would happen on, as the estimates need it: what the GPU worker reported, else this
one."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import psutil

from training.estimates import Machine, cpu_machine, gpu_machine
from training.models import WorkerHost


def training_machine() -> Machine:
    """The GPU with the most memory that a worker has reported, else the machine of the newest worker."""
    hosts = list(WorkerHost.objects.filter(queue="gpu").order_by("-last_seen")[:32])
    gpus = [gpu for host in hosts for gpu in _gpus(host)]
    if gpus:
        best = max(gpus, key=lambda gpu: gpu[1])
        return gpu_machine(name=best[0], memory_bytes=best[1])
    memory = next((host.ram_bytes for host in hosts if host.ram_bytes), 0) or _own_memory()
    return cpu_machine(memory_bytes=memory, cores=_own_cores())


def _gpus(host: WorkerHost) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    entries: Any = host.gpus if isinstance(host.gpus, list) else []
    for entry in entries:
        if (
            isinstance(entry, dict)
            and isinstance(entry.get("memory_bytes"), int)
            and entry["memory_bytes"] > 0
        ):
            found.append((str(entry.get("name", "GPU")), entry["memory_bytes"]))
    return found


@lru_cache(maxsize=1)
def _own_memory() -> int:
    return int(psutil.virtual_memory().total)


@lru_cache(maxsize=1)
def _own_cores() -> int:
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1
