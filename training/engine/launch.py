"""One engine on several devices of this machine: a process a rank, which live, end and die together.

Standard library only: the launcher itself never imports torch. `torchrun` may start the ranks instead; this
launcher keeps what the contract promises and torchrun does not: the engine's exit code, one process group,
and no rank that outlives its parent. Knows nothing of training.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from training.contract import ConfigError, RunConfig
from training.engine.interrupts import PARENT_PIPE_VARIABLE

RENDEZVOUS_VARIABLE = "STUDIO_RENDEZVOUS"  # a file through which the ranks of one launcher find each other
GRACE_SECONDS = 20.0  # for the others to say how they end, when one rank has ended badly
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1
COMMAND = (sys.executable, "-m", "training.engine")


def world_size() -> int:
    """How many ranks this process was started as one of."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def ranks_to_start(run_dir: Path) -> int:
    """1: this process is the engine. A configuration that cannot be read is the engine's to refuse."""
    if "WORLD_SIZE" in os.environ:
        return 1
    try:
        return RunConfig.load(run_dir).num_devices
    except ConfigError:
        return 1


def die_with_parent() -> None:
    """In a rank that torchrun started: the kernel ends it with torchrun (Linux)."""
    if world_size() > 1 and PARENT_PIPE_VARIABLE not in os.environ and sys.platform.startswith("linux"):
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def launch(arguments: Sequence[str], *, count: int) -> int:
    """Run `python -m training.engine ARGUMENTS` as `count` ranks. The exit code of the first that ended badly.

    A rank ended by a signal ends this process by the same one, for its parent to see.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = Ranks(arguments, count=count, rendezvous=Path(folder) / "store")
        try:
            code = ranks.wait()
        finally:
            ranks.kill()
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank has written its own
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)  # SIGKILL has none
        os.kill(os.getpid(), -code)
    return code


class Ranks:
    """The processes. All in this process's group, so that a signal to the group reaches them too."""

    def __init__(self, arguments: Sequence[str], *, count: int, rendezvous: Path) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a question to the engine; inherited until it listens
        self._rendezvous = rendezvous
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        for index in range(count):
            self._processes.append(
                subprocess.Popen(
                    [*COMMAND, *arguments],
                    stdin=subprocess.PIPE,  # held open, never written: its end tells the rank that this is gone
                    env=_environment(index, count, rendezvous),
                    preexec_fn=_killed_with_this_process(),
                )
            )
        if os.environ.get(PARENT_PIPE_VARIABLE) == "1":
            threading.Thread(target=self._end_with_stdin, name="parent-watch", daemon=True).start()

    def wait(self) -> int:
        """Until all have ended; when one ends badly, the others get a grace to follow."""
        first, deadline = 0, float("inf")
        while True:
            codes = [process.poll() for process in self._processes]
            bad = [code for code in codes if code]
            if bad and not first:
                first, deadline = bad[0], time.monotonic() + GRACE_SECONDS
            if None not in codes:
                return first
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _end_with_stdin(self) -> None:
        while os.read(0, 4096):
            pass
        self.kill()
        shutil.rmtree(self._rendezvous.parent, ignore_errors=True)
        os._exit(1)


def _environment(index: int, count: int, rendezvous: Path) -> dict[str, str]:
    env = dict(os.environ) | {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        RENDEZVOUS_VARIABLE: str(rendezvous),
        PARENT_PIPE_VARIABLE: "1",
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # The ranks of one machine speak over its loopback; a host's own name may not resolve.
    env.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    return env


def _killed_with_this_process() -> Callable[[], None] | None:
    """Runs in the child between fork and exec, so everything it needs is looked up here."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return child
