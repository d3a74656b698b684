"""How far a run is, in words and numbers: phases, pace, time left. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from training.contract import PHASES

BETWEEN_STEPS = {"evaluating", "watching"}
LONG_PAUSE = 10  # a step that took this many times the usual is a pause (evaluation, a restart), cut to that


def duration_words(seconds: float | None) -> str:
    """`45 s`, `3 min 20 s`, `1 h 04 min`, `2 d 3 h`; empty for None."""
    if seconds is None or seconds < 0:
        return ""
    total = round(seconds)
    minutes, second = divmod(total, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hours} h {minute:02d} min"
    return f"{minutes} min {second:02d} s" if minutes else f"{second} s"


def phase_words(phase: str, done: int, total: int, unit: str) -> str:
    """`Reference pass 40/180 pairs`."""
    name = PHASES.get(phase, phase.replace("_", " ").capitalize())
    return f"{name} {done}/{total} {unit}".strip() if total and phase != "training" else name


def percent(done: int, total: int) -> int:
    return min(100, done * 100 // total) if total else 0


def seconds_per_step(points: Sequence[tuple[int, float]]) -> float | None:
    """From (step, unix time) of recent steps, oldest first. Pauses count; one long pause does not rule."""
    spans = [
        (later_time - time) / (later - step)
        for (step, time), (later, later_time) in pairwise(points)
        if later > step and later_time > time
    ]
    if not spans:
        return None
    usual = median(spans)
    return sum(min(span, LONG_PAUSE * usual) for span in spans) / len(spans)


@dataclass(frozen=True)
class PhaseMark:
    """One phase of the run for the row of phases on the page."""

    key: str
    label: str
    state: str  # done | now | ahead


def phase_marks(phase: str, *, finished: bool) -> list[PhaseMark]:
    """Evaluations come between training steps, so what belongs to them counts as training here."""
    shown = [key for key in PHASES if key not in BETWEEN_STEPS]
    current = "training" if phase in BETWEEN_STEPS else phase
    position = len(shown) if finished else (shown.index(current) if current in shown else -1)
    return [
        PhaseMark(key, PHASES[key], "done" if index < position else "now" if index == position else "ahead")
        for index, key in enumerate(shown)
    ]
