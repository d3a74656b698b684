"""Interruptions of a run in this process, at a step that its own log tells."""

from __future__ import annotations

from tests.engine.conftest import RunFolder
from training.engine.interrupts import Interrupts


class LeaveAt(Interrupts):
    """SIGTERM as the loop sees it, after `step` steps; `split` "eval": when that step's evaluation is done."""

    def __init__(self, run: RunFolder, step: int, *, split: str = "train") -> None:
        super().__init__(run.path)
        self._run, self._step, self._split = run, step, split

    def check(self) -> None:
        self.terminated = self._step in self._run.points(self._split)
        super().check()


class StopAt(Interrupts):
    """The stop file, seen after `step` steps."""

    def __init__(self, run: RunFolder, step: int) -> None:
        super().__init__(run.path)
        self._run, self._step = run, step

    @property
    def stop_requested(self) -> bool:
        return self._step in self._run.points("train")
