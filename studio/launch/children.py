"""A process that the studio starts, watches and ends: its log file, its restarts, its way out.

Knows nothing of Django, of what the program does, or of the others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LEASH = Path(__file__).with_name("leash.py")
BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
GOOD_LIFE_SECONDS = 30.0  # a program that lived so long starts again without the earlier waits
LOG_MAX_BYTES = 20 * 1024 * 1024
LOGS_KEPT = 3


def rotate(log: Path) -> None:
    """web.log -> web.log.1 -> web.log.2 …; the oldest goes."""
    for number in range(LOGS_KEPT, 0, -1):
        source = log if number == 1 else log.with_name(f"{log.name}.{number - 1}")
        if source.exists() and source.stat().st_size:
            source.replace(log.with_name(f"{log.name}.{number}"))


@dataclass(frozen=True)
class Program:
    """What to start, and how to end it."""

    name: str
    command: Sequence[str]
    log: Path
    env: dict[str, str]
    cwd: Path | None = None
    pass_fds: tuple[int, ...] = ()
    stop_seconds: float = 5.0
    death_signal: signal.Signals = signal.SIGKILL  # what the kernel sends it when the studio itself is killed
    quick_exit_codes: frozenset[int] = frozenset()  # asks to be started again, and is no mishap


@dataclass
class Child:
    """The running (or about to be restarted) process of a program."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0  # in a row
    next_start: float = 0.0
    last_exit: int | None = None
    read_to: int = 0  # how far the console has read the log
    partial: bytes = field(default=b"", repr=False)

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it in a session of its own. Must be called from the main thread: the leash is tied to it."""
        program = self.program
        program.log.parent.mkdir(parents=True, exist_ok=True)
        leash = [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), str(int(program.death_signal))]
        with program.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*leash, *program.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=program.env,
                cwd=program.cwd,
                pass_fds=program.pass_fds,
                start_new_session=True,
            )
        self.started_at = time.monotonic()

    def reap(self) -> int | None:
        """The exit code, once, when the process has just ended; plans the next start."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        self.kill_group()  # what it left behind in its session must not meet its successor
        self.process, self.last_exit = None, code
        if code in self.program.quick_exit_codes or time.monotonic() - self.started_at > GOOD_LIFE_SECONDS:
            self.failures = 0
        wait = BACKOFF_SECONDS[min(self.failures, len(BACKOFF_SECONDS) - 1)]
        self.failures += 1
        self.next_start = time.monotonic() + wait
        return code

    def due(self) -> bool:
        return self.process is None and time.monotonic() >= self.next_start

    def ask_to_stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def kill_group(self) -> None:
        """End whatever is left in the program's session."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def limit_log(self) -> None:
        """Keep a long run's log bounded: copy it aside and empty it (the program writes in append mode)."""
        log = self.program.log
        if log.exists() and log.stat().st_size > LOG_MAX_BYTES:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)
            self.read_to, self.partial = 0, b""

    def new_lines(self, at_most: int = 65_536) -> list[str]:
        """Whole lines the program wrote since the last call; of a flood, its end."""
        log = self.program.log
        try:
            size = log.stat().st_size
        except FileNotFoundError:
            return []
        if size <= self.read_to:
            return []
        start = max(self.read_to, size - at_most)
        with log.open("rb") as file:
            file.seek(start)
            data = (self.partial if start == self.read_to else b"") + file.read(size - start)
        self.read_to = size
        *lines, self.partial = data.split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]

    def log_tail(self, lines: int = 12) -> str:
        try:
            with self.program.log.open("rb") as file:
                file.seek(max(0, self.program.log.stat().st_size - 8192))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.rstrip().splitlines()[-lines:])


def stop_all(children: Sequence[Child], hurry: Callable[[], bool]) -> list[str]:
    """Ask each to stop, in order, wait for all, kill what is left. Returns the names that had to be killed.

    `hurry` becomes true at a second Ctrl-C, and ends the wait.
    """
    for child in children:
        child.ask_to_stop()
    begun = time.monotonic()
    while not hurry() and any(
        child.alive and time.monotonic() - begun < child.program.stop_seconds for child in children
    ):
        time.sleep(0.02)
    stubborn = [child.name for child in children if child.alive]
    for child in children:
        child.kill_group()
        if child.process is not None:
            child.process.wait()
            child.process = None
    return stubborn
