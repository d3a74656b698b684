"""SHA-256 of large files: each read once in a process, and begun beside what else a start has to do.

Knows no torch: a run begins to hash its base model while libraries are imported.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path

# A thread that hashes has to ask for the interpreter after each read, and waits 5 ms for it while others compute.
READ_BYTES = 16 * 2**20


class _Hash:
    """Of one state of one file. Whoever asks first computes it; the others wait for that."""

    def __init__(self, path: Path, size: int, mtime_ns: int) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._value = ""

    def value(self) -> str:
        with self._lock:
            self._value = self._value or _sha256(self._path)
            return self._value


_hash_of = functools.lru_cache(maxsize=256)(_Hash)
_looking_up = threading.Lock()  # the cache alone would make two of one, where two ask at once


def known_sha256(path: Path) -> str:
    """A run asks for the hash of its base more than once; gigabytes are read once."""
    facts = path.stat()
    with _looking_up:
        known = _hash_of(path, facts.st_size, facts.st_mtime_ns)
    return known.value()


def begin_hashing(paths: Iterable[Path]) -> None:
    """In a thread that ends with the process. A file that cannot be read is left to who asks for its hash."""

    def hash_all(paths: list[Path]) -> None:
        for path in paths:
            try:
                known_sha256(path)
            except OSError:
                continue

    threading.Thread(target=hash_all, args=(list(paths),), name="hashes", daemon=True).start()


def _sha256(path: Path) -> str:
    total, buffer = hashlib.sha256(), bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total.update(memoryview(buffer)[:count])
    return total.hexdigest()
