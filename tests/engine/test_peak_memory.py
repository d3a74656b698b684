"""The peak that a result reports is the engine's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.live import ROOT

BIG = 1_200 * 2**20


@pytest.mark.slow
def test_the_memory_of_who_started_the_engine_is_not_counted() -> None:
    """`ru_maxrss` of a child starts at its parent's size."""
    ours = bytearray(BIG)
    ours[::4096] = b"x" * len(ours[::4096])
    code = "from training.engine.outputs import resident_peak_bytes; print(resident_peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    del ours
    assert 50 * 2**20 < int(done.stdout) < BIG / 2
