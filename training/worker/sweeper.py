"""The thread in a worker's main process that sweeps, says that this machine is there, and ends a stuck
worker.

A fork copies only the thread that forks, and everything that is open: a child made while this one is inside
SQLite would inherit its locks for ever. So forks wait until a sweep is over, and no connection outlives one.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Collection

from django.db import connections
from django.db.models.functions import Now

from training.models import WorkerHost
from training.services.queue import no_broker
from training.worker import machine, neighbours, probe
from training.worker.sweep import clean_up, sweep, work_is_left
from training.worker.timing import Times, times

logger = logging.getLogger(__name__)

STUCK_EXIT_CODE = 75  # to whoever keeps this process: start me again
CLEAN_UP_SECONDS = 900.0

_fork_gate = threading.RLock()
os.register_at_fork(
    before=_fork_gate.acquire, after_in_parent=_fork_gate.release, after_in_child=_fork_gate.release
)


class Sweeper(threading.Thread):
    def __init__(self, *, queues: Collection[str], slots: int) -> None:
        super().__init__(name="sweeper", daemon=True)
        self.queues = sorted(queues)
        self.slots = slots
        self.limits: Times = times()
        self.who = machine.identity()
        self._over = threading.Event()
        self._gpus: list[probe.Gpu] = []
        self._probed = self._cleaned = float("-inf")
        self._work_since: float | None = None

    def stop(self) -> None:
        self._over.set()

    def run(self) -> None:
        every = self.limits.sweep_every
        if no_broker():  # this thread is then how work is found
            every = min(every, self.limits.own_ring_after)
        while True:
            with _fork_gate:
                try:
                    self._probe_if_due()
                    self._once()
                except Exception:
                    logger.exception("A sweep failed; the next one comes in %.0f s", every)
                finally:
                    connections.close_all()
            if self._over.wait(every * random.uniform(0.8, 1.2)):  # noqa: S311 - jitter
                return

    def _once(self) -> None:
        self._say_present()
        gpu = "gpu" in self.queues
        sweep(who=self.who, limits=self.limits, serves_gpu=gpu)
        neighbours.sweep_neighbours(queues=self.queues)
        now = time.monotonic()
        if now - self._cleaned > CLEAN_UP_SECONDS:
            self._cleaned = now
            clean_up()
        if gpu:
            self._watch_consumer(now)

    def _probe_if_due(self) -> None:
        """Inside the gate: a pool process forked meanwhile would hold the pipe to nvidia-smi open for ever.

        GPUs that were there once stay listed: when `nvidia-smi` does not answer for a moment, a run that needs one
        must not be given the CPU instead.
        """
        now = time.monotonic()
        if "gpu" in self.queues and now - self._probed > self.limits.probe_every:
            self._probed = now
            self._gpus = probe.gpus() or self._gpus

    def _say_present(self) -> None:
        for queue in self.queues:
            WorkerHost.objects.update_or_create(
                host=self.who.host,
                queue=queue,
                defaults={
                    "boot_id": self.who.boot_id,
                    "pid": self.who.pid,
                    "last_seen": Now(),
                    "slots": self.slots,
                    "ram_bytes": probe.ram_bytes(),
                    "gpus": self._gpus if queue == "gpu" else [],
                },
            )

    def say_goodbye(self) -> None:
        """After an orderly end the pages need not wait to learn that this worker is gone."""
        try:
            WorkerHost.objects.filter(host=self.who.host, queue__in=self.queues, pid=self.who.pid).delete()
        except Exception as error:
            logger.warning("Could not sign off: %s", error)
        finally:
            connections.close_all()

    def _watch_consumer(self, now: float) -> None:
        if not work_is_left(self.who):
            self._work_since = None
        elif self._work_since is None:
            self._work_since = now
        elif now - self._work_since > self.limits.stuck_after and not self._over.is_set():
            self._end_stuck_worker()

    def _end_stuck_worker(self) -> None:
        from celery.worker import state

        if state.active_requests:
            logger.error("This worker's consumer is stuck; it is ended when the running task has ended.")
            return
        logger.error(
            "Work waited %.0f s and this worker's consumer did not bring it: starting anew (exit code %d).",
            self.limits.stuck_after,
            STUCK_EXIT_CODE,
        )
        logging.shutdown()
        os._exit(STUCK_EXIT_CODE)
