"""Where in a file of lines every n-th line begins, so that the last page opens as fast as the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

MAX_OFFSETS = 1024


class Offsets:
    """Remembers at most `limit` places: when full, every second one is dropped."""

    def __init__(self, limit: int = MAX_OFFSETS) -> None:
        self._limit = limit
        self._stride, self._count, self._position = 1, 0, 0
        self._offsets: list[int] = []

    def add(self, size: int) -> None:
        """The next line has `size` bytes."""
        if self._count % self._stride == 0:
            if len(self._offsets) == self._limit:
                self._offsets = self._offsets[::2]
                self._stride *= 2
            if self._count % self._stride == 0:
                self._offsets.append(self._position)
        self._count += 1
        self._position += size

    def to_json(self) -> dict[str, Any]:
        return {"stride": self._stride, "at": self._offsets}


def read_lines(path: Path, *, start: int, count: int, offsets: Mapping[str, Any]) -> Iterator[bytes]:
    """Lines `start` to `start + count` of the file; fewer at its end, none when it is not there."""
    stride, places = int(offsets.get("stride", 1)), offsets.get("at") or [0]
    nearest = min(start // stride, len(places) - 1)
    try:
        with path.open("rb") as file:
            file.seek(places[nearest])
            skip = start - nearest * stride
            yield from islice(file, skip, skip + count)
    except FileNotFoundError:
        return
