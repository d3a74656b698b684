"""`manage.py studio` for real: it starts, it ends, nothing is left, and it says what is wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import live

pytestmark = pytest.mark.slow


def run_to_end(data_dir: Path, **extra: str) -> tuple[int, str]:
    """For starts that are to be refused."""
    done = subprocess.run(
        [sys.executable, "manage.py", "studio"],
        cwd=live.ROOT,
        env=live.environment(data_dir, "refused", extra),
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.returncode, done.stdout + done.stderr


def wait_for(condition: object, *, seconds: float = 10.0) -> float:
    """Seconds until it was true."""
    begun = time.monotonic()
    while not condition():  # type: ignore[operator]
        assert time.monotonic() - begun < seconds, "did not happen in time"
        time.sleep(0.05)
    return time.monotonic() - begun


def page_answers(studio: live.LiveStudio) -> bool:
    try:
        return live.Person(studio.url).get("/sign-in/", timeout=5)[0] == 200
    except OSError:
        return False


def test_a_first_start_leads_to_an_account_and_a_second_start_is_quick(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with live.live_studio(data_dir) as studio:
        assert studio.link, studio.output()
        alice = studio.make_first_account()
        assert alice.get("/account/")[0] == 200
        assert live.Person(studio.url).get(studio.link)[0] == 410, "the link must work once"
        bob = studio.add_person(alice, "bob")
        assert bob.get("/people/")[0] == 403
        assert (data_dir / "logs/audit.log").read_text().count("account made") == 2
    begun = time.monotonic()
    with live.live_studio(data_dir) as studio:
        seconds = time.monotonic() - begun
        assert not studio.link, "somebody has an account: no link may be printed"
        assert studio.sign_in("bob").get("/account/")[0] == 200
        assert seconds < 5, f"the second start took {seconds:.1f} s"


@pytest.mark.kill
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_ends_everything_in_a_few_seconds(tmp_path: Path, number: signal.Signals) -> None:
    studio = live.start(tmp_path / "data")
    try:
        wait_for(lambda: len(studio.find("worker")) >= 2)
        begun = time.monotonic()
        assert studio.stop(number) == 0
        assert time.monotonic() - begun < 8
        studio.assert_nothing_left(seconds=1)
    finally:
        live.end(studio)


@pytest.mark.kill
def test_sigkill_leaves_nothing_and_the_next_start_works(tmp_path: Path) -> None:
    studio = live.start(tmp_path / "data")
    try:
        wait_for(lambda: len(studio.find("worker")) >= 2)
        assert len(studio.processes()) >= 4
        studio.stop(signal.SIGKILL)
        studio.assert_nothing_left(seconds=3)
    finally:
        live.end(studio)
    with live.live_studio(tmp_path / "data") as again:
        assert page_answers(again)


@pytest.mark.kill
def test_children_that_die_are_started_again(tmp_path: Path) -> None:
    with live.live_studio(tmp_path / "data") as studio:
        wait_for(lambda: len(studio.find("worker")) >= 2)
        web = studio.kill_web()
        assert page_answers(studio), "requests wait in the socket's queue while the web part restarts"
        assert studio.find("studio.launch.web")[0].pid != web
        broker = studio.kill_broker()
        wait_for(lambda: studio.find("-server", ".sock") and studio.find("-server", ".sock")[0].pid != broker)
        worker = studio.kill_worker("default")
        wait_for(lambda: [p for p in studio.find("worker", "default") if p.pid != worker])
        wait_for(
            lambda: all(f"{name} ended" in studio.output() for name in ("web", "broker", "worker-default"))
        )


def test_a_second_studio_on_the_same_data_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with live.live_studio(tmp_path / "data") as studio:
        code, output = run_to_end(tmp_path / "data")
        assert code == 1
        assert "already running" in output and studio.url in output and "Traceback" not in output
        assert page_answers(studio)
        assert len(studio.find("-server", ".sock")) == 1


def test_a_taken_port_is_a_sentence_that_names_the_setting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = run_to_end(tmp_path / "data", STUDIO_PORT=str(port))
    assert code == 1
    assert f"Port {port} on 127.0.0.1 is taken" in output and "STUDIO_PORT=" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"STUDIO_PORT": "eighty"}, "STUDIO_PORT='eighty' is not a whole number"),
        ({"STUDIO_PROT": "8000"}, "Unknown setting STUDIO_PROT"),
        ({"STUDIO_HTTPS": "perhaps"}, "is not a yes or a no"),
        ({"STUDIO_HOST": "no.such.host.invalid"}, "is not an address of this machine"),
        ({"STUDIO_DATA_DIR": "/proc/none"}, "cannot be made"),
        ({"DATABASE_URL": "nonsense"}, "DATABASE_URL"),
        ({"STUDIO_LOG_LEVEL": "LOUD"}, "is not one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_setting_is_a_sentence_at_start(tmp_path: Path, extra: dict[str, str], words: str) -> None:
    code, output = run_to_end(tmp_path / "data", **extra)
    assert code == 1
    assert words in output
    assert "Traceback" not in output


def test_without_a_broker_it_starts_as_well(tmp_path: Path) -> None:
    with live.live_studio(tmp_path / "data", STUDIO_REDIS_URL="none") as studio:
        assert page_answers(studio)
        assert not studio.find("-server", ".sock")


def test_static_files_are_compressed_and_cached_for_ever(tmp_path: Path) -> None:
    import urllib.request

    with live.live_studio(tmp_path / "data") as studio:
        _, page = live.Person(studio.url).get("/sign-in/")
        path = page.split('rel="stylesheet" href="')[1].split('"')[0]
        request = urllib.request.Request(studio.url + path, headers={"Accept-Encoding": "gzip"})
        with urllib.request.urlopen(request) as response:
            assert "immutable" in response.headers["Cache-Control"]
            assert response.headers["Content-Encoding"] == "gzip"


@pytest.mark.kill
def test_with_parent_it_ends_when_the_starter_is_killed(tmp_path: Path) -> None:
    """`make run` uses this: a killed make must not leave a studio behind."""
    mark = "parent" + os.urandom(8).hex()
    env = live.environment(tmp_path / "data", mark, {})
    (tmp_path / "data").mkdir()
    program = (
        "import subprocess, sys; subprocess.run([sys.executable, 'manage.py', 'studio', '--with-parent'])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=live.ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    studio = live.LiveStudio(tmp_path / "data", mark, parent)  # type: ignore[arg-type]
    try:
        wait_for(lambda: len(studio.find("worker")) >= 2, seconds=30)
        parent.kill()
        parent.wait()
        studio.assert_nothing_left(seconds=12)
    finally:
        live.end(studio)
