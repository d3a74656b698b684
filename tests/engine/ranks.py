"""Several ranks of one run as forked processes: torch is imported already, so that they start at once."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.engine.conftest import RunFolder
from training.engine import session
from training.engine.events import open_events
from training.engine.interrupts import Interrupts
from training.engine.launch import RENDEZVOUS_VARIABLE

LIMIT = 60.0


def train_on(
    run: RunFolder, size: int, *, as_rank: Callable[[int], Interrupts | None] = lambda rank: None
) -> list[int]:
    """Exit code of each rank. `as_rank(rank)` runs in the rank before it trains, and may bend it."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:

        def body(rank: int) -> None:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                RENDEZVOUS_VARIABLE: str(Path(folder) / "store"),
            }  # fmt: skip
            interrupts = as_rank(rank) or Interrupts(run.path)
            with open_events(run.path, rank=rank) as events:
                os._exit(session.run(run.path, events=events, interrupts=interrupts))

        ranks = [context.Process(target=body, args=(rank,)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(LIMIT)
        stuck = [process for process in ranks if process.is_alive()]
        for process in stuck:
            process.kill()
        assert not stuck, f"{len(stuck)} ranks did not end"
    return [int(process.exitcode or 0) for process in ranks]
