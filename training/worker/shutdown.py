"""Whether this process should bring its work to an orderly end.

Two ways to learn it: the worker's main process drains (one shared byte, no lock that a killed child could hold),
or this process got SIGTERM.
"""

from __future__ import annotations

import mmap
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_DRAINING = mmap.mmap(-1, 1)  # anonymous and shared: made before the pool forks, seen by all its processes


def start_draining() -> None:
    """Called in the worker's main process when it is asked to end."""
    _DRAINING[0] = 1


def draining() -> bool:
    return bool(_DRAINING[0])


class Shutdown:
    """`wanted` turns true once and stays."""

    def __init__(self) -> None:
        self._asked = False

    @property
    def wanted(self) -> bool:
        return self._asked or draining()

    def ask(self, *_: Any) -> None:
        self._asked = True

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """SIGTERM asks, instead of ending this process in the middle of a transaction."""
        before = signal.signal(signal.SIGTERM, self.ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
