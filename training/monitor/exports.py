"""Metrics as CSV and the end of a log as text. Pure apart from reading the one file it is given."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LOG_TAIL_BYTES = 64 * 1024
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def safe_cell(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula gets a quote in front; numbers stay numbers."""
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return "'" + value
    return value


def points_csv(points: Iterable[Mapping[str, Any]], *, keys: Sequence[str] = ()) -> str:
    """One line a point: step, split, time and every metric (or those of `keys`); an absent value is empty."""
    rows = list(points)
    columns = list(keys) or sorted({key for row in rows for key in row["values"]}, key=_by_split)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(["step", "split", "time", *(safe_cell(key) for key in columns)])
    for row in rows:
        if any(key in row["values"] for key in columns):
            values = (row["values"].get(key) for key in columns)
            writer.writerow([row["step"], safe_cell(row["split"]), row["time"], *map(safe_cell, values)])
    return out.getvalue()


def _by_split(key: str) -> tuple[bool, str]:
    return key.startswith("eval_"), key


def log_tail(path: Path, *, limit: int = LOG_TAIL_BYTES) -> str:
    """The last `limit` bytes from a line's start; empty when there is no log yet."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - limit))
            data = file.read()
    except OSError:
        return ""
    if size > limit:
        data = data[data.find(b"\n") + 1 :]
    return data.decode("utf-8", errors="replace")
