"""Every time limit of the worker, in seconds. `settings.WORKER_TIMES` overrides single ones (tests do)."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

from django.conf import settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    lease_ttl: float = 30.0
    renew_every: float = 5.0
    self_stop: float = 20.0  # no renewal for so long: the engine is frozen, before anybody else may claim
    watch_every: float = 0.25  # look at the engine and its events; so at most 4 transactions a second
    desired_every: float = 1.0  # read what the person wants
    cancel_grace: float = 3.0  # from SIGTERM to SIGKILL
    interrupt_grace: float = 40.0  # the same when a checkpoint is wanted
    stall_floor: float = 600.0  # no step for max(this, stall_factor * median step): the run hangs
    stall_factor: float = 10.0
    load_floor: float = 1800.0  # the same before the first step: a large model may load that long
    sweep_every: float = 5.0
    ring_after: float = 15.0
    own_ring_after: float = 1.5  # without a broker
    host_silent: float = 20.0
    stuck_after: float = 60.0
    drain_limit: float = 45.0  # a worker that shuts down is gone by then
    probe_every: float = 60.0

    @property
    def ttl(self) -> timedelta:
        return timedelta(seconds=self.lease_ttl)


def times() -> Times:
    return Times(**settings.WORKER_TIMES)
