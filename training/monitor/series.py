"""Stored points -> one series per metric key, thinned for the screen. Pure; knows neither rows nor Plotly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Series = list[tuple[int, float | None]]  # (step, value) by step; None = the engine had no finite number
Curves = dict[str, Series]

POINT_LIMIT = 2000  # of one series on a page; the CSV always holds every point


def finite(value: Any) -> float | None:
    """A number that JSON may carry, else None (a NaN in a frame would break the page's parser)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def curves_from(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Curves:
    """`rows` are (step, values); a series exists only for a key that some row has."""
    curves: Curves = {}
    for step, values in rows:
        for key, value in values.items():
            curves.setdefault(key, []).append((step, finite(value)))
    for series in curves.values():
        series.sort(key=lambda point: point[0])
    return curves


def thin(series: Series, limit: int = POINT_LIMIT) -> Series:
    """At most `limit` points: both ends, and of every stretch its lowest, its highest and a gap if any.

    Averages or every n-th point would hide the spike that a person looks for.
    """
    if len(series) <= limit or limit < 5:
        return series
    inner = len(series) - 2
    buckets = max(1, (limit - 2) // 3)
    kept = [series[0]]
    for index in range(buckets):
        start, end = 1 + index * inner // buckets, 1 + (index + 1) * inner // buckets
        kept.extend(series[position] for position in _landmarks(series, start, end))
    kept.append(series[-1])
    return kept


def _landmarks(series: Series, start: int, end: int) -> list[int]:
    lowest = highest = gap = None
    for position in range(start, end):
        value = series[position][1]
        if value is None:
            gap = position if gap is None else gap
            continue
        if lowest is None or value < (series[lowest][1] or 0.0):
            lowest = position
        if highest is None or value > (series[highest][1] or 0.0):
            highest = position
    return sorted({position for position in (lowest, highest, gap) if position is not None})


def numbers(series: Series) -> list[tuple[int, float]]:
    """The series without its gaps."""
    return [(step, value) for step, value in series if value is not None]


def smoothed(series: Series, weight: float) -> list[tuple[int, float]]:
    """Exponential moving average with the start's bias removed; the same formula as in the browser."""
    result: list[tuple[int, float]] = []
    average, share = 0.0, 0.0
    for step, value in numbers(series):
        average = weight * average + (1 - weight) * value
        share = weight * share + (1 - weight)
        result.append((step, average / share))
    return result


def sparkline(series: Series, *, width: int = 120, height: int = 32, margin: int = 3) -> str:
    """The `points` of an SVG polyline; empty with fewer than two numbers."""
    points = numbers(series)
    if len(points) < 2:
        return ""
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    across, up = max(1, steps[-1] - steps[0]), (high - low) or 1.0
    return " ".join(
        f"{margin + (step - steps[0]) / across * (width - 2 * margin):.1f},"
        f"{height - margin - (value - low) / up * (height - 2 * margin):.1f}"
        for step, value in points
    )


def latest(curves: Mapping[str, Sequence[tuple[int, float | None]]], key: str) -> float | None:
    """The newest number of a key."""
    for _, value in reversed(curves.get(key, [])):
        if value is not None:
            return value
    return None
