"""What is asked of a running engine: cancel, stop and keep, interrupt for a shutdown, end when it hangs."""

from __future__ import annotations

import logging
from pathlib import Path

from training.contract import STOP_FILE
from training.models import TrainingTask
from training.worker.endings import Asked
from training.worker.engine_process import EngineProcess
from training.worker.keeper import LeaseKeeper
from training.worker.shutdown import Shutdown
from training.worker.timing import Times

logger = logging.getLogger(__name__)

Desired = TrainingTask.Desired
STACKS_SECONDS = 1.0  # time to write the stacks into the log


class Orders:
    """Asks once, waits as long as it may, then kills. A cancel overrides whatever was asked before."""

    def __init__(
        self,
        engine: EngineProcess,
        keeper: LeaseKeeper,
        shutdown: Shutdown,
        limits: Times,
        run_dir: Path,
    ) -> None:
        self.asked = Asked.NOTHING
        self._engine = engine
        self._keeper = keeper
        self._shutdown = shutdown
        self._limits = limits
        self._stop_file = run_dir / STOP_FILE
        self._deadline = float("inf")

    def follow(self, now: float, *, hangs: bool) -> None:
        if self._keeper.desired == Desired.CANCEL and self.asked is not Asked.CANCEL:
            self._end(Asked.CANCEL, now + self._limits.cancel_grace)
        elif self.asked is Asked.NOTHING:
            self._follow_first(now, hangs=hangs)
        if now > self._deadline and not self._engine.killed:
            self._engine.kill()

    def _follow_first(self, now: float, *, hangs: bool) -> None:
        if self._shutdown.wanted:
            # A frozen engine has no lease to write under, and may not be woken for a checkpoint.
            grace = 0.0 if self._engine.frozen else self._limits.interrupt_grace
            self._end(Asked.INTERRUPT, now + grace)
        elif hangs:
            logger.warning("The engine in %s makes no progress and is ended.", self._stop_file.parent)
            self.asked = Asked.HANG
            self._deadline = now + STACKS_SECONDS
            self._engine.dump_stacks()
        elif self._keeper.desired == Desired.STOP and not self._stop_file.exists():
            self._stop_file.touch()

    def _end(self, asked: Asked, deadline: float) -> None:
        self.asked = asked
        self._deadline = deadline
        self._engine.ask_to_end()
