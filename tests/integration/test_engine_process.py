"""The engine does not outlive whoever started it: each of the two ways, by itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from django.conf import settings

pytestmark = [pytest.mark.slow]

STARTER = """
import os, sys, time
os.environ["DJANGO_SETTINGS_MODULE"] = "studio.settings_test"
import django
django.setup()
from pathlib import Path
from django.conf import settings
from training.worker import engine_process
settings.ENGINE_COMMAND = [sys.executable, "-c", sys.argv[2]]
if sys.argv[3] == "pipe":
    engine_process._die_with_parent = lambda: None
engine = engine_process.EngineProcess(Path(sys.argv[1]), device="cpu")
print(engine.pid, flush=True)
time.sleep(60)
"""
DEAF = "import time; time.sleep(60)"
LISTENING = "import os; os.read(0, 1); os._exit(75)"


@pytest.mark.parametrize(
    ("engine", "way"),
    [
        pytest.param(
            DEAF,
            "signal",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's"),
        ),
        (LISTENING, "pipe"),
    ],
)
def test_it_dies_with_its_parent(engine: str, way: str, tmp_path: Path) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path), engine, way],
        cwd=settings.BASE_DIR,
        stdout=subprocess.PIPE,
        env={**os.environ, "STUDIO_DATA_DIR": str(tmp_path / "data"), "STUDIO_REDIS_URL": "none"},
    )
    assert starter.stdout is not None
    with starter.stdout:
        pid = int(starter.stdout.readline())
    time.sleep(0.3)
    assert alive(pid), "while its parent lives"
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and alive(pid):
        time.sleep(0.01)
    try:
        assert not alive(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)


RANKS = """
import sys
from training.engine import launch
launch.COMMAND = (sys.executable, "-c", "import time; time.sleep(60)")
launch.launch([], count=2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_ranks_of_several_devices_die_with_the_supervisor(tmp_path: Path) -> None:
    """Killed, so that nobody tells anybody: supervisor, launcher and ranks are a chain."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path), RANKS, "signal"],
        cwd=settings.BASE_DIR,
        stdout=subprocess.PIPE,
        env={**os.environ, "STUDIO_DATA_DIR": str(tmp_path / "data"), "STUDIO_REDIS_URL": "none"},
    )
    assert starter.stdout is not None
    with starter.stdout:
        launcher = psutil.Process(int(starter.stdout.readline()))
    deadline = time.monotonic() + 20
    while len(ranks := launcher.children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    starter.kill()
    starter.wait()
    _, left = psutil.wait_procs([launcher, *ranks], timeout=2)
    for process in left:
        process.kill()
    assert not left


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
