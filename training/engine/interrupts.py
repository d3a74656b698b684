"""How a run is asked to end: the stop file, SIGTERM, and the death of the process that started it."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TextIO

from training.contract import STOP_FILE
from training.engine.errors import InterruptedRunError

PARENT_PIPE_VARIABLE = "STUDIO_PARENT_PIPE"

logger = logging.getLogger(__name__)


class Interrupts:
    """Asked at every step and every batch of a long pass; never acts by itself in the middle of one."""

    def __init__(self, run_dir: Path) -> None:
        self._stop_file = run_dir / STOP_FILE
        self.terminated = False

    @property
    def stop_requested(self) -> bool:
        """End at the next step and keep what is there."""
        return self._stop_file.exists()

    def check(self) -> None:
        """For passes before the first step: nothing is lost by leaving at once."""
        if self.terminated:
            raise InterruptedRunError("The run was interrupted before a step was done.", "Start it again.")

    def install(self, log_stream: TextIO) -> None:
        """SIGTERM, Ctrl-C: finish the step. SIGUSR1: all stacks to the log. End of stdin: the parent died."""
        signal.signal(signal.SIGTERM, self.terminate)
        signal.signal(signal.SIGINT, self.terminate)
        faulthandler.register(signal.SIGUSR1, file=log_stream, all_threads=True)
        if os.environ.get(PARENT_PIPE_VARIABLE) == "1":
            threading.Thread(target=_exit_at_end_of_stdin, name="parent-watch", daemon=True).start()

    def terminate(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler: nothing happens in it, the steps ask."""
        self.terminated = True


def _exit_at_end_of_stdin() -> None:
    """The parent holds the other end of the pipe open and writes nothing: end of file means that it died."""
    while os.read(0, 4096):
        pass
    os._exit(1)
