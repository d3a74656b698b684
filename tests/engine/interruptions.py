"""Interruptions of a run in this process, at a step that its own log tells."""

from __future__ import annotations

from tests.engine.conftest import RunFolder
from training.engine.interrupts import Interrupts


def _has(run: RunFolder, step: int, split: str) -> bool:
    """Another rank may ask before the first has begun to write."""
    return (run.path / "events.jsonl").exists() and step in run.points(split)


class LeaveAt(Interrupts):
    """SIGTERM as the loop sees it, after `step` steps; `split` "eval": when that step's evaluation is done."""

    def __init__(self, run: RunFolder, step: int, *, split: str = "train") -> None:
        super().__init__(run.path)
        self._run, self._step, self._split = run, step, split

    def check(self) -> None:
        self.terminated = _has(self._run, self._step, self._split)
        super().check()


class StopAt(Interrupts):
    """The stop file, seen after `step` steps."""

    def __init__(self, run: RunFolder, step: int) -> None:
        super().__init__(run.path)
        self._run, self._step = run, step

    @property
    def stop_requested(self) -> bool:
        return _has(self._run, self._step, "train")
