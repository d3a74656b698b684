"""The foreground process of `manage.py studio`: starts web, workers and broker, keeps them, ends them.

Knows how processes live and die; what they do is theirs. Everything here runs in the main thread, because
the leash that ends a child with its parent is tied to the thread that started it.
"""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from studio.broker import Broker, BrokerUnavailable, describe_exit
from studio.launch.children import Child, Program, rotate, stop_all
from studio.launch.console import Console

TICK_SECONDS = 0.1
READY_WITHIN_SECONDS = 60.0
WEB_TRIES = 4  # before its first answer; later it is started again for ever
CONSUMER_STUCK = 75  # a worker that asks to be started anew (training/worker)
LIMIT_LOGS_EVERY_SECONDS = 10.0


class CannotStart(Exception):
    """A sentence for the person in front of the terminal."""


def lock_data_dir(data_dir: Path) -> IO[str]:
    """One studio per data folder. The kernel frees the lock however this process ends."""
    lock = (data_dir / "studio.lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise CannotStart(
            f"A studio is already running on the data folder {data_dir} ({lock.read().strip() or 'starting'}). "
            "Use that one, stop it first, or set STUDIO_DATA_DIR to another folder for a second studio."
        ) from None
    return lock


def listen(host: str, port: int) -> socket.socket:
    """The listening socket, made here so that a taken port is a sentence and a restart loses no request."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except socket.gaierror:
        raise CannotStart(f"STUDIO_HOST={host!r} is not an address of this machine. Use 127.0.0.1.") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CannotStart(
                f"Port {port} on {host} is taken by another program. Stop that one, or choose another port: "
                f"STUDIO_PORT={port + 1 if port < 65535 else 8000} make run"
            ) from None
        if error.errno == errno.EACCES:
            raise CannotStart(f"Port {port} needs administrator's rights. Set STUDIO_PORT=8000.") from None
        raise CannotStart(f"STUDIO_HOST={host!r} cannot be listened on ({error.strerror}).") from None
    listener.listen(2048)
    listener.set_inheritable(True)
    return listener


def answers(host: str, port: int, *, host_header: str) -> bool:
    """Does the web part answer a request?"""
    connection = http.client.HTTPConnection(host, port, timeout=0.5)
    try:
        connection.request("GET", "/health/", headers={"Host": host_header, "Connection": "close"})
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@dataclass
class Plan:
    """What to run; the command reads it from Django's settings."""

    base_dir: Path
    data_dir: Path
    logs_dir: Path
    host_header: str
    embedded_broker: bool
    queues: tuple[str, ...]
    starter: list[str] | None = None  # a command that prepares the starter model, when it is missing
    on_ready: Callable[[], None] = lambda: None
    on_starter_done: Callable[[bool], None] = lambda ok: None
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))


class Supervisor:
    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan, self.console = plan, console
        # Plain flags: an Event's lock may be held by the very thread that a signal interrupts.
        self.stopping, self.hurry = False, False
        self.broker: Broker | None = None
        self.web: Child | None = None
        self.workers: list[Child] = []
        self.starter: Child | None = None
        self.ready = False
        self._next_log_check = 0.0

    # --- life ---------------------------------------------------------------------------------------
    def run(self, listener: socket.socket) -> int:
        """Until asked to stop. 0 after an orderly end, 1 when the web part cannot start."""
        code = 1
        try:
            self._start_broker()
            self._start_web(listener)
            if self._wait_until_ready(listener):
                self._start_workers()
                self.plan.on_ready()
                code = self._keep()
            elif self.stopping:
                code = 0
        finally:
            self._stop()
        return code

    def handle_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has its way
                signal.signal(number, self._asked_to_stop)

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        self.hurry = self.stopping
        self.stopping = True

    # --- starting -----------------------------------------------------------------------------------
    def _program(self, name: str, command: list[str], **options: object) -> Program:
        env = self.plan.env | {"PYTHONUNBUFFERED": "1"}
        log = self.plan.logs_dir / f"{name}.log"
        rotate(log)
        return Program(name, [sys.executable, *command], log, env, cwd=self.plan.base_dir, **options)  # type: ignore[arg-type]

    def _start_broker(self) -> None:
        if not self.plan.embedded_broker:
            return
        try:
            broker = Broker(data_dir=self.plan.data_dir, log=self.plan.logs_dir / "broker.log")
            broker.start()
        except BrokerUnavailable as problem:
            self.console.say(
                f"{problem}\nGoing on without a broker: workers look into the database for work."
            )
            self.plan.env["STUDIO_REDIS_URL"] = "none"
            return
        self.broker = broker
        self.plan.env["STUDIO_BROKER_SOCKET"] = str(broker.socket)

    def _start_web(self, listener: socket.socket) -> None:
        number = listener.fileno()
        command = ["-m", "studio.launch.web", str(number)]
        self.web = Child(self._program("web", command, pass_fds=(number,), stop_seconds=4.0))
        self.web.start()

    def _wait_until_ready(self, listener: socket.socket) -> bool:
        assert self.web is not None  # noqa: S101 - started just before
        host, port = listener.getsockname()[:2]
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
        deadline = time.monotonic() + READY_WITHIN_SECONDS
        while not self.stopping:
            if answers(local, port, host_header=self.plan.host_header):
                return True
            code = self.web.reap()
            if (code is not None and self.web.failures >= WEB_TRIES) or time.monotonic() > deadline:
                self.console.say(f"The web part does not start. Its log {self.web.program.log} ends:")
                self.console.say(self.web.log_tail())
                return False
            if self.web.due():
                self.web.start()
            time.sleep(0.02)
        return False

    def _start_workers(self) -> None:
        for queue in self.plan.queues:
            command = ["manage.py", "worker", "--queue", queue]
            program = self._program(
                f"worker-{queue}",
                command,
                stop_seconds=50.0,  # it ends by itself within 45 s: a training step and its checkpoint
                quick_exit_codes=frozenset({CONSUMER_STUCK}),
            )
            self.workers.append(Child(program))
            self.workers[-1].start()
        if self.plan.starter is not None:
            self.starter = Child(self._program("starter", self.plan.starter, stop_seconds=1.0))
            self.starter.start()

    # --- keeping ------------------------------------------------------------------------------------
    def _keep(self) -> int:
        self.ready = True
        while not self.stopping:
            if self.broker is not None and (sentence := self.broker.keep()):
                self.console.say(sentence)
            for child in self._kept():
                self._keep_one(child)
            self._watch_starter()
            self._look_after_logs()
            time.sleep(TICK_SECONDS)
        return 0

    def _kept(self) -> list[Child]:
        return [child for child in (self.web, *self.workers) if child is not None]

    def _keep_one(self, child: Child) -> None:
        code = child.reap()
        if code is not None and code not in child.program.quick_exit_codes:
            wait = max(0.0, child.next_start - time.monotonic())
            self.console.say(
                f"{child.name} ended unexpectedly ({describe_exit(code)}); starting it again in {wait:.1f} s. "
                f"Its log: {child.program.log}"
            )
        if child.due():
            child.start()

    def _watch_starter(self) -> None:
        if self.starter is not None and (code := self.starter.reap()) is not None:
            starter, self.starter = self.starter, None
            if code != 0:
                self.console.say(
                    f"The starter model could not be prepared. Its log {starter.program.log} ends:"
                )
                self.console.say(starter.log_tail(4))
            self.plan.on_starter_done(code == 0)

    def _look_after_logs(self) -> None:
        children = self._kept() + ([self.broker.child] if self.broker else [])
        for child in children:
            # The broker warns about the machine's kernel settings at every start: only for who asked.
            if self.console.verbose or child in self._kept():
                self.console.relay(child)
        if time.monotonic() >= self._next_log_check:
            self._next_log_check = time.monotonic() + LIMIT_LOGS_EVERY_SECONDS
            for child in children:
                child.limit_log()

    # --- ending -------------------------------------------------------------------------------------
    def _stop(self) -> None:
        """Web first, so that nothing new comes in; then workers; the broker when nobody needs it any more."""
        if self.ready:
            self.console.say(
                "\nStopping: a running training saves a checkpoint first. Ctrl-C again does not wait."
            )
        kept = self._kept() + ([self.starter] if self.starter else [])
        killed = stop_all(kept, lambda: self.hurry)
        if self.broker is not None:
            killed += stop_all([self.broker.child], lambda: self.hurry)
            self.broker.stop()
        if killed and not self.hurry:
            self.console.say(f"Ended by force, because they did not stop in time: {', '.join(killed)}.")
        if self.ready:
            self.console.say("The studio has stopped. Everything is kept in the data folder.")
