"""What happens before torch is imported: names are let through that torch's side knows, threads are told to wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.engine.losses import LOSSES
from training.engine.preflight import LOSS_TYPES


def test_every_loss_that_is_let_through_exists_and_every_loss_is_let_through() -> None:
    assert set(LOSS_TYPES) == set(LOSSES)


@pytest.mark.parametrize(("given", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77")])
def test_threads_that_wait_give_the_processor_back_unless_the_person_says_otherwise(
    given: dict[str, str], expected: str
) -> None:
    """The setting is read when torch's library of threads is loaded: it must be there before."""
    script = "import os, sys, training.engine.__main__; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=Path(__file__).parents[2],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [expected, "False"]
