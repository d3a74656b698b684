"""Runs one command that must not outlive the process that asked for it.

`python leash.py PARENT_PID SIGNAL_NUMBER COMMAND…`; standard library only, started as a file with `-I -S`
so that it costs a few milliseconds. On Linux it asks the kernel for a signal at the parent's death and
becomes the command; elsewhere it stays, looks at its parent twice a second, and ends the command's group.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1


def become(parent: int, death_signal: int, command: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it died before the line above
        raise SystemExit(1)
    os.execvp(command[0], command)  # noqa: S606


def watch(parent: int, death_signal: int, command: list[str]) -> int:
    child = subprocess.Popen(command, close_fds=False)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while child.poll() is None:
        if os.getppid() != parent:
            os.killpg(0, death_signal)
        time.sleep(0.5)
    return child.returncode


def main() -> None:
    parent, death_signal, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if sys.platform == "linux":
        become(parent, death_signal, command)
    sys.exit(watch(parent, death_signal, command))


if __name__ == "__main__":
    main()
