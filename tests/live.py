"""The real studio for tests: `manage.py studio` with its web part, workers and broker, on a free port.

    with live_studio(tmp_path / "data") as studio:
        studio.make_first_account()
        ...

Waiting has a bound, and whatever happens inside the block no process is left after it (asserted).
"""

from __future__ import annotations

import contextlib
import http.cookiejar
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
MARK = "LIVE_STUDIO_MARK"
PASSWORD = "correct horse battery"
READY = re.compile(r"The studio is ready at (http://[^/\s]+)/")
LINK = re.compile(r"http://[^/\s]+(/first-run/[\w-]+/)")


def environment(data_dir: Path, mark: str, extra: Mapping[str, str]) -> dict[str, str]:
    """Nothing of the test run's own settings reaches the studio; everything it gets is written here."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "XDG_RUNTIME_DIR")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    env |= {
        MARK: mark,
        "STUDIO_DATA_DIR": str(data_dir),
        "STUDIO_ENV_FILE": "none",
        "STUDIO_PORT": "0",
        "STUDIO_STARTER_MODEL": "0",
        "STUDIO_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return env | extra


def marked_processes(mark: str, data_dir: Path) -> list[psutil.Process]:
    """Everything the studio started, whoever its parent is now.

    By the mark in its environment, by its command line, or by the folder it stands in: Valkey writes its title
    over its environment, and the engine gets an environment of its own.
    """
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if (
                process.environ().get(MARK) == mark
                or str(data_dir) in " ".join(process.cmdline())
                or process.cwd().startswith(str(data_dir))
            ):
                found.append(process)
    return found


class Person:
    """A person with cookies and no JavaScript."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.cookies = http.cookiejar.CookieJar()
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self.cookies))

    def get(self, path: str, *, timeout: float = 10.0) -> tuple[int, str]:
        return self._open(urllib.request.Request(self.url + path), timeout)

    def post(
        self, path: str, fields: Mapping[str, str | list[str]], *, form_at: str = "", timeout: float = 10.0
    ) -> tuple[int, str]:
        """Reads the page with the form first, for its CSRF token; then sends it and follows the redirect."""
        _, page = self.get(form_at or path, timeout=timeout)
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
        assert token, f"no form at {form_at or path}: {page[:300]}"
        data = urllib.parse.urlencode({"csrfmiddlewaretoken": token[1], **fields}, doseq=True).encode()
        return self._open(urllib.request.Request(self.url + path, data=data), timeout)

    def _open(self, request: urllib.request.Request, timeout: float) -> tuple[int, str]:
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@dataclass
class LiveStudio:
    data_dir: Path
    mark: str
    process: subprocess.Popen[str]
    url: str = ""
    link: str = ""  # path of the first-run link, when there was one
    lines: list[str] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)
    _reader: threading.Thread = field(default_factory=threading.Thread)

    # --- people -------------------------------------------------------------------------------------
    def make_first_account(self, name: str = "alice") -> Person:
        person = Person(self.url)
        _, page = person.post(self.link, {"username": name, "password1": PASSWORD, "password2": PASSWORD})
        assert person.get("/account/")[0] == 200, page
        return person

    def add_person(self, admin: Person, name: str) -> Person:
        fields = {"username": name, "password1": PASSWORD, "password2": PASSWORD}
        status, page = admin.post("/people/", fields)
        assert status == 200 and name in page, page
        return self.sign_in(name)

    def sign_in(self, name: str) -> Person:
        person = Person(self.url)
        person.post("/sign-in/?next=/account/", {"username": name, "password": PASSWORD})
        status, page = person.get("/account/")
        assert status == 200 and "Sign out" in page, page
        return person

    # --- processes ----------------------------------------------------------------------------------
    def processes(self) -> list[psutil.Process]:
        return marked_processes(self.mark, self.data_dir)

    def find(self, *words: str) -> list[psutil.Process]:
        """Processes whose command line has all these words, oldest first."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if all(word in " ".join(process.cmdline()) for word in words):
                    found.append((process.create_time(), process.pid, process))
        return [process for *_, process in sorted(found)]

    def kill(self, *words: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to the oldest process with these words in its command line; its pid."""
        process = self.find(*words)[0]
        process.send_signal(number)
        return process.pid

    def kill_web(self) -> int:
        return self.kill("studio.launch.web")

    def kill_broker(self) -> int:
        return self.kill("-server", ".sock")

    def kill_worker(self, queue: str = "gpu") -> int:
        return self.kill("worker", queue)

    def kill_engine(self) -> int:
        return self.kill("training.engine")

    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_ready(self, seconds: float = 60.0) -> None:
        if not self.ready.wait(seconds) or not self.url:
            raise AssertionError(
                f"the studio did not become ready (exit {self.process.poll()}):\n{self.output()}"
            )

    def stop(self, number: int = signal.SIGTERM, *, seconds: float = 20.0) -> int:
        """Ask it to stop like a terminal would; its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=seconds)
        if self._reader.ident:
            self._reader.join(timeout=5)
        return code

    def assert_nothing_left(self, *, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while left := self.processes():
            if time.monotonic() > deadline:
                told = [f"{process.pid} {' '.join(process.cmdline())[:200]}" for process in left]
                raise AssertionError("still running:\n" + "\n".join(told))
            time.sleep(0.05)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))
                if found := READY.search(line):
                    self.url = found[1]
                if found := LINK.search(line):
                    self.link = found[1]
                if line.startswith("Logs: "):
                    self.ready.set()
        self.ready.set()  # it ended


def start(data_dir: Path, *, wait: bool = True, **extra: str) -> LiveStudio:
    """Start it without promising to end it; prefer `live_studio`."""
    data_dir.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "manage.py", "studio"],
        cwd=ROOT,
        env=environment(data_dir, mark, extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    studio = LiveStudio(data_dir, mark, process)
    studio._reader = threading.Thread(target=studio._read, daemon=True)
    studio._reader.start()
    if wait:
        try:
            studio.wait_ready()
        except AssertionError:
            end(studio)
            raise
    return studio


def end(studio: LiveStudio) -> None:
    """Stop it politely, then by force, then look whether anything was left."""
    if studio.process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            studio.stop()
    try:
        studio.assert_nothing_left()
    finally:
        for process in studio.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextlib.contextmanager
def live_studio(data_dir: Path, **extra: str) -> Iterator[LiveStudio]:
    """The studio, ready; `extra` are further environment variables (DJANGO_SETTINGS_MODULE among them)."""
    studio = start(data_dir, **extra)
    try:
        yield studio
    finally:
        end(studio)
