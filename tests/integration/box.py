"""A studio without its pages: an own data directory and SQLite file, a real Valkey, real Celery workers.

The test's own process talks to the same database, so that services are called as the pages call them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from django.conf import settings
from django.db import connections

from studio.broker import find_server
from training.models import TrainingTask

ROOT = Path(__file__).resolve().parent.parent.parent
TIMES = {
    "lease_ttl": 3.0,
    "renew_every": 0.5,
    "self_stop": 2.0,
    "watch_every": 0.1,
    "desired_every": 0.2,
    "cancel_grace": 1.0,
    "interrupt_grace": 5.0,
    "sweep_every": 0.5,
    "ring_after": 1.0,
    "own_ring_after": 0.3,
    "drain_limit": 10.0,
}
TERMINAL = {"succeeded", "stopped", "failed", "cancelled"}


class Box:
    def __init__(self, template: Path, *, broker: bool = True) -> None:
        # Short: a unix socket's path may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="box-", dir="/tmp"))
        self.data = self.folder / "data"
        self.data.mkdir()
        shutil.copyfile(template, self.data / "studio.sqlite3")
        self.socket = self.folder / "b.sock"
        self.trail = self.folder / "trail"
        self.has_broker = broker
        self.broker: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        if broker:
            self.start_broker()

    # --- broker ---------------------------------------------------------------------------------------
    def start_broker(self) -> None:
        binary = find_server()
        assert binary is not None
        flags = f"--port 0 --unixsocket {self.socket} --unixsocketperm 700 --appendonly yes --save "
        with (self.folder / "broker.log").open("ab") as log:
            self.broker = subprocess.Popen(
                [str(binary), *flags.split(), "", "--dir", str(self.folder)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.socket))
                return
            time.sleep(0.02)
        raise AssertionError("the broker did not start")

    def kill_broker(self) -> None:
        assert self.broker is not None
        self.broker.kill()
        self.broker.wait()

    # --- workers --------------------------------------------------------------------------------------
    def environment(self, **extra: str) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("STUDIO_")}
        env |= {
            "DJANGO_SETTINGS_MODULE": "tests.integration.settings_worker",
            "STUDIO_DATA_DIR": str(self.data),
            "STUDIO_WORKER_NAME": "here",
            "TEST_WORKER_TIMES": json.dumps(TIMES),
            "STUB_TRAIL": str(self.trail),
            "OMP_NUM_THREADS": "1",
        }
        if self.has_broker:
            env["STUDIO_BROKER_SOCKET"] = str(self.socket)
        else:
            env["STUDIO_REDIS_URL"] = "none"
        return env | extra

    def start_worker(self, queue: str = "gpu", **extra: str) -> subprocess.Popen[bytes]:
        with (self.folder / "worker.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "manage.py", "worker", "--queue", queue],
                cwd=ROOT,
                env=self.environment(**extra),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.workers.append(worker)
        return worker

    def log(self) -> str:
        path = self.folder / "worker.log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else ""

    def tree(self, worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """The worker's pool and the engines below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(worker.pid).children(recursive=True)
        return []

    def engines(self) -> list[psutil.Process]:
        """Every living engine that works below this box's folder, whoever its parent is."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if command and command[-1].startswith(str(self.data)) and process.status() != "zombie":
                    found.append(process)
        return found

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started for this box, by a variable in its environment or its command."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("STUDIO_DATA_DIR") == str(self.data)
                if ours and process.status() != "zombie":
                    found.append(process)
        return found + self.engines()

    def kill_worker(self, worker: subprocess.Popen[bytes], *, pool_too: bool = False) -> None:
        """SIGKILL to the worker's main process, or to its pool as well."""
        children = self.tree(worker)
        worker.kill()
        if pool_too:
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        worker.wait()

    # --- what happens -----------------------------------------------------------------------------------
    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"{what} did not happen in {seconds:.0f} s\n{self.log()}")

    def wait_status(self, task: TrainingTask, *statuses: str, seconds: float = 30.0) -> TrainingTask:
        def there() -> bool:
            task.refresh_from_db()
            return task.status in statuses

        self.wait(there, f"status {'/'.join(statuses)}", seconds)
        return task

    def wait_step(self, task: TrainingTask, step: int, seconds: float = 20.0) -> None:
        def there() -> bool:
            task.refresh_from_db()
            return task.step >= step or task.status in TERMINAL

        self.wait(there, f"step {step}", seconds)

    def close(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.broker is not None:
            self.kill_broker()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def own_database(path: Path) -> Iterator[None]:
    """`default` is this file, in this thread and in those it starts, until the end."""
    before = connections["default"]
    given = {**before.settings_dict, "NAME": str(path)}
    own = type(before)(given, "default")
    connections["default"] = own
    new_threads, connections.settings["default"] = connections.settings["default"], given
    try:
        yield
    finally:
        own.close()
        connections["default"] = before
        connections.settings["default"] = new_threads


def point_settings(data: Path, test_settings: Any) -> None:
    for name, folder in (
        ("DATASETS_DIR", "datasets"),
        ("RUNS_DIR", "runs"),
        ("BASE_MODELS_DIR", "base_models"),
        ("MODELS_DIR", "models"),
        ("LOGS_DIR", "logs"),
    ):
        (data / folder).mkdir(exist_ok=True)
        setattr(test_settings, name, data / folder)
    test_settings.DATA_DIR = data


def checkpointed(source: Path, target: Path) -> None:
    """A consistent copy of a SQLite file that is in WAL mode."""
    with sqlite3.connect(source) as old, sqlite3.connect(target) as new:
        old.backup(new)


__all__ = ["TERMINAL", "TIMES", "Box", "checkpointed", "own_database", "point_settings", "settings"]
