"""Alive is not the same as getting on: tells a run that hangs from one whose steps are long. Pure."""

from __future__ import annotations

import statistics
from collections import deque

from training.worker.timing import Times


class ProgressWatch:
    """Told of every event and step with the clock's time; `stalled` says whether it is too quiet for too
    long.
    """

    def __init__(self, times: Times, *, now: float) -> None:
        self._times = times
        self._last = now
        self._last_step: float | None = None
        self._gaps: deque[float] = deque(maxlen=50)

    def event(self, now: float, *, is_step: bool) -> None:
        if is_step:
            # The first step is measured from what was said before it: that the training begins.
            self._gaps.append(now - (self._last if self._last_step is None else self._last_step))
            self._last_step = now
        self._last = now

    def pause(self, now: float) -> None:
        """Frozen time counts for nothing."""
        self._last = now
        self._last_step = None

    @property
    def limit(self) -> float:
        if self._last_step is None and not self._gaps:
            return max(self._times.load_floor, self._times.stall_floor)
        median = statistics.median(self._gaps) if self._gaps else 0.0
        return max(self._times.stall_floor, self._times.stall_factor * median)

    def stalled(self, now: float) -> bool:
        return now - self._last > self.limit
