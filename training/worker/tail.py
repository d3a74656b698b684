"""Reads `events.jsonl` while it grows: complete lines only, each with the byte where it begins.

Pure but for the file. The same bytes give the same events however they arrive; a line that is no event is
reported and passed over, and so is one that is longer than any event.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

MAX_LINE = 1024 * 1024
CHUNK = 256 * 1024


class Line(NamedTuple):
    offset: int  # where it begins
    event: dict[str, Any] | None  # None: not an event


class LineBuffer:
    """Turns chunks of bytes into lines. `position` is the end of the last complete line."""

    def __init__(self, position: int = 0) -> None:
        self.position = position
        self._rest = bytearray()

    @property
    def read_from(self) -> int:
        """Where the next chunk must come from."""
        return self.position + len(self._rest)

    def feed(self, chunk: bytes) -> list[Line]:
        self._rest += chunk
        lines: list[Line] = []
        start = 0
        while (end := self._rest.find(b"\n", start)) >= 0:
            lines.append(Line(self.position + start, parse(bytes(self._rest[start:end]))))
            start = end + 1
        del self._rest[:start]
        self.position += start
        return lines


class TailReader:
    """Follows one file from `offset`. The file may not exist yet."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self._buffer = LineBuffer(offset)

    @property
    def offset(self) -> int:
        return self._buffer.position

    def read(self) -> list[Line]:
        """The complete lines of the next chunk; [] when there is nothing new (or only part of a line)."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._buffer.read_from)
                chunk = file.read(CHUNK)
        except FileNotFoundError:
            return []
        return self._buffer.feed(chunk)


def parse(raw: bytes) -> dict[str, Any] | None:
    """One event, or None. Which keys each type needs is what `training.contract` says."""
    if not raw.strip():
        return None
    if len(raw) > MAX_LINE:
        logger.warning("An event of %d bytes was passed over.", len(raw))
        return None
    try:
        event = json.loads(raw)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict) or not _CHECKS.get(str(event.get("type")), _never)(event):
        logger.warning("Passed over a line of events.jsonl that is no event: %r", raw[:200])
        return None
    return event


def _never(_event: dict[str, Any]) -> bool:
    return False


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _phase(event: dict[str, Any]) -> bool:
    return isinstance(event.get("phase"), str) and _count(event.get("done")) and _count(event.get("total"))


def _plan(event: dict[str, Any]) -> bool:
    return _count(event.get("total_steps"))


def _metrics(event: dict[str, Any]) -> bool:
    values = event.get("values")
    return (
        event.get("split") in ("train", "eval")
        and _count(event.get("step"))
        and _number(event.get("time"))
        and isinstance(values, dict)
    )


def _checkpoint(event: dict[str, Any]) -> bool:
    path = event.get("path")
    return (
        _count(event.get("step"))
        and isinstance(path, str)
        and not Path(path).is_absolute()
        and ".." not in Path(path).parts
    )


def _log(event: dict[str, Any]) -> bool:
    return (
        isinstance(event.get("text"), str)
        and _number(event.get("time"))
        and event.get("level") in ("info", "warning", "error")
    )


_CHECKS = {
    "phase": _phase,
    "plan": _plan,
    "metrics": _metrics,
    "checkpoint": _checkpoint,
    "watch": _checkpoint,  # a step and a path in the run directory, too
    "log": _log,
}
