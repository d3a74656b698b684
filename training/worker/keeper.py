"""Keeps the lease while the rest of the supervisor may be slow: one thread renews, one watches the clock.

The renewing thread talks to the database and may hang there; the watching thread never does. When no renewal
has succeeded for `self_stop` seconds of the monotonic clock it freezes the engine, well before anybody else
may claim the task. The database back and the epoch still ours: the engine goes on. The epoch moved: it is
killed.
"""

from __future__ import annotations

import logging
import threading
import time

from django.db import close_old_connections, connection

from training.models import TrainingTask
from training.states import Fenced
from training.worker.engine_process import EngineProcess
from training.worker.leases import Lease, owned, renew
from training.worker.timing import Times

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1


class LeaseKeeper:
    """`desired` is what the person wanted at the last look; `fenced`: the task is somebody else's."""

    def __init__(self, lease: Lease, times: Times) -> None:
        self.lease = lease
        self.times = times
        self.fenced = threading.Event()
        self.desired: str = TrainingTask.Desired.RUN
        self._renewed = time.monotonic()  # the claim was the first
        self._over = threading.Event()
        self._engine: EngineProcess | None = None
        self._threads = [
            threading.Thread(target=self._renew_loop, name="lease-renew", daemon=True),
            threading.Thread(target=self._watch_loop, name="lease-watch", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=2.0)

    def guard(self, engine: EngineProcess | None) -> None:
        """From now on this engine is frozen and thawed with the lease."""
        self._engine = engine

    def check(self) -> None:
        if self.fenced.is_set():
            raise Fenced(f"Task {self.lease.task_id}: attempt {self.lease.epoch} lost its lease.")

    @property
    def silent_for(self) -> float:
        """Seconds since the last renewal that is known to have succeeded."""
        return time.monotonic() - self._renewed

    def _renew_loop(self) -> None:
        due = time.monotonic() + self.times.renew_every
        try:
            while not self._over.wait(min(self.times.desired_every, self.times.renew_every)):
                try:
                    if time.monotonic() >= due:
                        began = time.monotonic()
                        if not renew(self.lease, self.times):
                            self.fenced.set()
                            return
                        self._renewed = began
                        due = began + self.times.renew_every
                    self._look()
                except Exception as error:  # the database is away: the other thread minds the clock
                    logger.warning("Task %s: the lease could not be renewed: %s", self.lease.task_id, error)
                    close_old_connections()
        finally:
            connection.close()

    def _look(self) -> None:
        desired = (
            TrainingTask.objects.filter(owned(self.lease)).values_list("desired_state", flat=True).first()
        )
        if desired is None:
            self.fenced.set()
        else:
            self.desired = desired

    def _watch_loop(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            engine = self._engine
            if engine is None:
                continue
            if self.fenced.is_set():
                engine.kill()
                return
            if self.silent_for > self.times.self_stop:
                if not engine.frozen:
                    logger.warning(
                        "Task %s: no renewal for %.0f s, the engine is frozen until the database answers.",
                        self.lease.task_id,
                        self.silent_for,
                    )
                engine.freeze()
            else:
                engine.thaw()
