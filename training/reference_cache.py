"""Which files of the shared reference cache go, and when: one rule for the engine and the worker's sweep.

Standard library only. The engine reads shards when a run starts and freshens what it used (modification time);
it keeps their values in memory, so a file may go at any later moment, and costs the next run that needs it another
pass, never a wrong number. Files are removed whole; any number of processes may do so at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterator
from pathlib import Path

UNUSED_SECONDS = 30 * 86_400.0  # no run has read it for so long: it goes
GRACE_SECONDS = (
    3600.0  # used so lately that a run may be about to read it again (another process of it, a retry)
)
TEMPORARY_SECONDS = 86_400.0  # a half-written file of a process that died
TEMPORARY, SHARD = ".tmp", ".safetensors"


@dataclasses.dataclass(frozen=True)
class Eviction:
    """What was removed, and what the cache holds now."""

    removed_files: int
    removed_bytes: int
    left_bytes: int


@dataclasses.dataclass(frozen=True)
class _Entry:
    path: Path
    size: int
    used: float  # seconds since the epoch


def evict(
    folder: Path, *, limit_bytes: int, keep: Collection[Path] = (), now: float | None = None
) -> Eviction:
    """Remove what has not been used for a month; then, the least recently used first, what is over the limit.

    `limit_bytes` 0: no limit of size. `keep` and what was used within the hour stay, even over the limit.
    """
    moment, kept = time.time() if now is None else now, {path.resolve() for path in keep}
    entries = sorted(_entries(folder, moment), key=lambda entry: entry.used)
    left, removed = sum(entry.size for entry in entries), []
    for entry in entries:
        unused = moment - entry.used
        over = bool(limit_bytes) and left > limit_bytes and unused > GRACE_SECONDS
        if (unused > UNUSED_SECONDS or over) and entry.path.resolve() not in kept:
            with contextlib.suppress(OSError):
                entry.path.unlink(missing_ok=True)  # somebody else may have been faster
                removed.append(entry)
                left -= entry.size
    return Eviction(len(removed), sum(entry.size for entry in removed), left)


def _entries(folder: Path, moment: float) -> Iterator[_Entry]:
    """The shards below `folder`; leftovers of dead processes are removed on the way."""
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):
            facts = path.stat()
            if path.name.endswith(TEMPORARY):
                if moment - facts.st_mtime > TEMPORARY_SECONDS:
                    path.unlink(missing_ok=True)
            elif path.suffix == SHARD:
                yield _Entry(path, facts.st_size, facts.st_mtime)
