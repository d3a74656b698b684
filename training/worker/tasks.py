"""What Celery calls: the envelope of a run, and the hooks for a worker's sweep and orderly end."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from typing import Any

from celery import shared_task, signals

from training.services.queue import no_broker
from training.worker import downloads
from training.worker.engine_process import PR_SET_PDEATHSIG
from training.worker.shutdown import Shutdown, start_draining
from training.worker.supervisor import run_next
from training.worker.sweeper import Sweeper
from training.worker.timing import times

__all__ = ["downloads", "run"]  # importing downloads registers its task

logger = logging.getLogger(__name__)

IDLE_GRACE = 5.0  # a worker with nothing to do that is still there after so long hangs in its broker
WATCH_PARENT_SECONDS = 0.2

_sweeper: Sweeper | None = None


@shared_task(name="training.run", ignore_result=True)
def run(task_id: str) -> None:
    """The id is a hint: what runs is the oldest task that may, so the queue is what the pages say it is."""
    shutdown = Shutdown()
    with shutdown.on_sigterm():
        run_next(shutdown)


@signals.celeryd_after_setup.connect
def start_sweeper(instance: Any, **_: Any) -> None:
    global _sweeper
    queues = set(instance.app.amqp.queues.consume_from)
    _sweeper = Sweeper(queues=queues, slots=instance.concurrency)
    _sweeper.start()


@signals.worker_shutting_down.connect
def drain(**_: Any) -> None:
    """Runs in a signal handler: sets a byte and starts a thread, nothing that waits."""
    start_draining()
    if _sweeper is not None:
        _sweeper.stop()
    threading.Thread(target=_leave_in_time, name="leave-in-time", daemon=True).start()


@signals.worker_shutdown.connect
def sign_off(**_: Any) -> None:
    if _sweeper is not None:
        _sweeper.stop()
        _sweeper.join(timeout=5.0)
        _sweeper.say_goodbye()


@signals.worker_process_init.connect
def end_with_parent(**_: Any) -> None:
    """A pool process must not outlive its worker, and an engine not its supervisor: what is lost, the lease tells.

    On Linux Celery has asked the kernel for that. But the kernel means the thread that forked, and without a
    broker that may be a thread of the pool, which ends early in every orderly shutdown.
    """
    if no_broker() and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)
    threading.Thread(target=_watch_parent, args=(os.getppid(),), name="watch-parent", daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_PARENT_SECONDS)
    os._exit(1)


def _leave_in_time() -> None:
    """Celery's warm shutdown waits for ever, its soft one always for its whole timeout: this is the limit."""
    from celery.worker import state

    deadline = time.monotonic() + times().drain_limit
    idle_since: float | None = None
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if state.active_requests:
            idle_since = None
        elif idle_since is None:
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > IDLE_GRACE:
            break
    logger.warning("The worker did not end by itself in time and is ended.")
    logging.shutdown()
    os._exit(0)
