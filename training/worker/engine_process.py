"""The engine as a process: started in its own group, frozen, ended, and never left behind.

It dies with its parent in two ways: the kernel sends it SIGKILL when this thread's process ends (Linux), and
it ends itself when its stdin closes (everywhere). Knows no Django models.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
from django.conf import settings

from training.contract import LOG_FILE

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
# What the engine needs of this process's environment: never its secrets (database, broker, keys).
PASSED_ON = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "XDG_CACHE_HOME", "HF_HOME",
    "SSL_CERT_FILE",
)  # fmt: skip
PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "PYTORCH_", "TORCH_", "TRITON_", "CUBLAS_")


def environment(device: str) -> dict[str, str]:
    env = {
        name: value
        for name, value in os.environ.items()
        if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    env |= {
        "STUDIO_PARENT_PIPE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",  # a training never waits for a network
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device,
    }
    return env | settings.ENGINE_ENV


def _die_with_parent() -> Callable[[], None] | None:
    """Runs in the child between fork and exec, so everything it needs is looked up here."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(75)

    return child


class EngineProcess:
    """All signals go to the whole group, and only while its leader is not yet reaped: a reused id is never
    hit.
    """

    def __init__(self, run_dir: Path, *, device: str) -> None:
        self.log_path = run_dir / LOG_FILE
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*settings.ENGINE_COMMAND, str(run_dir)],
                stdin=subprocess.PIPE,  # held open, never written: its end tells the engine that this is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=settings.BASE_DIR,
                env=environment(device),
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        self._lock = threading.Lock()
        self._ended = False
        self.exit_code: int | None = None
        self.frozen = False
        self.killed = False  # by this supervisor
        try:
            self.created = psutil.Process(self.pid).create_time()
        except psutil.NoSuchProcess:
            self.created = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    def _signal(self, number: int) -> None:
        with self._lock:
            if not self._ended:
                try:
                    os.killpg(self.pid, number)
                except ProcessLookupError:
                    pass
                except PermissionError:  # macOS, when only zombies are left in the group
                    pass

    def ask_to_end(self) -> None:
        self._signal(signal.SIGTERM)

    def dump_stacks(self) -> None:
        self._signal(signal.SIGUSR1)

    def kill(self) -> None:
        self.killed = True
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        if not self.frozen:
            self.frozen = True
            self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self.frozen:
            self.frozen = False
            self._signal(signal.SIGCONT)

    def has_ended(self) -> bool:
        """Once it has, whatever it started is ended too, while the dead leader still keeps the group's id."""
        if self._ended:
            return True
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            return False
        self._signal(signal.SIGKILL)
        with self._lock:
            self._ended = True
            self.exit_code = self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        return True

    def end_now(self) -> None:
        """Kill and reap."""
        self.kill()
        while not self.has_ended():
            self._wait_a_moment()

    def _wait_a_moment(self) -> None:
        threading.Event().wait(0.02)


def log_tail(path: Path, *, lines: int = 50, limit: int = 16_384) -> str:
    """The last lines of engine.log as text; control characters other than tab and newline are dropped."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - limit))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    clean = "".join(char for char in text if char in "\n\t" or char.isprintable())
    return "\n".join(clean.splitlines()[-lines:])
