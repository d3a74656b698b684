"""Who gets which task on which device, and that it is one: the claim of a run."""

from __future__ import annotations

import multiprocessing
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db.models.functions import Now
from django.utils import timezone

from tests.training.making import make_base_model, make_dataset, make_task
from training.contract import ExitCode
from training.models import BaseModel, Run, TrainingTask, WorkerHost
from training.worker.leases import Lease, can_start_one, claim_next, free_slots, renew
from training.worker.machine import Identity
from training.worker.prepare import memory_retries
from training.worker.timing import Times

ME = Identity("here", "boot", os.getpid(), 1.0)
TIMES = Times()


@pytest.fixture(autouse=True)
def _own_data(data_dir: Path) -> None: ...


def machine(*, slots: int = 1, gpus: int = 0) -> WorkerHost:
    cards = [{"uuid": f"GPU-{n}", "name": "Card", "memory_bytes": 1} for n in range(gpus)]
    return WorkerHost.objects.create(
        host="here", queue="gpu", boot_id="boot", pid=1, last_seen=timezone.now(), slots=slots, gpus=cards
    )


def test_the_oldest_task_that_may_run_is_taken(alice: Any) -> None:
    now = timezone.now()
    base = make_base_model()
    BaseModel.objects.filter(pk=base.pk).update(status="downloading")
    make_task(alice, queued_at=now - timedelta(hours=3), base_model=base)
    make_task(alice, queued_at=now - timedelta(hours=4), status="failed")
    oldest = make_task(alice, queued_at=now - timedelta(hours=2))
    make_task(alice, queued_at=now - timedelta(hours=1))
    lease = claim_next(who=ME, times=TIMES)
    assert lease == Lease(oldest.pk, 1, ME.owner)
    oldest.refresh_from_db()
    assert (oldest.status, oldest.attempts, oldest.phase) == ("running", 1, "starting")
    assert oldest.started_at is not None and oldest.lease_until is not None
    run = oldest.runs.get()
    assert (run.epoch, run.host, run.device, run.pid) == (1, "here", "cpu", ME.pid)


def test_nothing_to_do_is_no_lease(alice: Any) -> None:
    make_task(alice, status="draft")
    make_task(alice, desired_state="cancel")
    assert claim_next(who=ME, times=TIMES) is None


def test_a_machine_takes_no_more_than_its_slots(alice: Any) -> None:
    host = machine(slots=2)
    for _ in range(3):
        make_task(alice)
    assert [claim_next(who=ME, times=TIMES) is not None for _ in range(3)] == [True, True, False]
    assert free_slots(host) == 0
    TrainingTask.objects.filter(status="running").update(lease_until=Now() - timedelta(seconds=1))
    assert free_slots(host) == 2, "a run whose lease has run out holds no slot"


def test_each_run_gets_the_gpu_that_is_used_least(alice: Any) -> None:
    machine(slots=4, gpus=2)
    for _ in range(4):
        make_task(alice)
        claim_next(who=ME, times=TIMES)
    devices = list(Run.objects.order_by("id").values_list("device", flat=True))
    assert devices[:2] == ["GPU-0", "GPU-1"] and sorted(devices[2:]) == ["GPU-0", "GPU-1"]


def test_a_task_for_two_gpus_gets_two_and_waits_until_both_are_free(alice: Any) -> None:
    """And nobody behind it takes the one that is free: it would never see both."""
    host = machine(slots=2, gpus=2)
    small = make_task(alice)
    claim_next(who=ME, times=TIMES)
    large, behind = make_task(alice, num_devices=2), make_task(alice)
    assert claim_next(who=ME, times=TIMES) is None
    assert not can_start_one(host), "a free GPU is no sign of a stuck worker while the queue waits for two"
    assert free_slots(host) == 1
    Run.objects.filter(task=small).update(ended=Now())
    assert can_start_one(host)
    lease = claim_next(who=ME, times=TIMES)
    assert lease is not None and lease.task_id == large.pk
    assert large.runs.get().device == "GPU-0,GPU-1"
    assert large.runs.get().devices == ["GPU-0", "GPU-1"]
    assert free_slots(host) == 0 and claim_next(who=ME, times=TIMES) is None
    Run.objects.filter(task=large).update(ended=Now())
    lease = claim_next(who=ME, times=TIMES)
    assert lease is not None and lease.task_id == behind.pk


def test_two_gpus_that_are_free_go_to_whoever_is_next_while_a_third_works(alice: Any) -> None:
    machine(slots=3, gpus=3)
    for wanted in (1, 2, 1):
        make_task(alice, num_devices=wanted)
        claim_next(who=ME, times=TIMES)
    assert list(Run.objects.order_by("id").values_list("device", flat=True)) == ["GPU-0", "GPU-1,GPU-2"]


def test_a_machine_passes_over_what_only_a_larger_one_can_run(alice: Any) -> None:
    machine(slots=2, gpus=2)
    make_task(alice, num_devices=4, queued_at=timezone.now() - timedelta(hours=1))
    small = make_task(alice)
    lease = claim_next(who=ME, times=TIMES)
    assert lease is not None and lease.task_id == small.pk


def test_a_machine_without_gpus_has_one_device(alice: Any) -> None:
    machine(slots=3)
    make_task(alice, num_devices=2)
    assert claim_next(who=ME, times=TIMES) is None
    for _ in range(4):
        make_task(alice)
        claim_next(who=ME, times=TIMES)
    assert [run.device for run in Run.objects.all()] == ["cpu"] * 3


def test_a_gpu_is_free_again_when_its_run_has_ended(alice: Any) -> None:
    machine(slots=2, gpus=2)
    first = make_task(alice)
    claim_next(who=ME, times=TIMES)
    make_task(alice)
    claim_next(who=ME, times=TIMES)
    Run.objects.filter(task=first).update(ended=Now())
    third = make_task(alice)
    claim_next(who=ME, times=TIMES)
    assert third.runs.get().device == "GPU-0"


def test_the_next_attempt_has_a_new_epoch_and_closes_the_one_before(alice: Any) -> None:
    task = make_task(alice)
    claim_next(who=ME, times=TIMES)
    TrainingTask.objects.filter(pk=task.pk).update(status="queued", lease_until=None)
    second = claim_next(who=ME, times=TIMES)
    assert second is not None and second.epoch == 2
    first = task.runs.get(epoch=1)
    assert first.ended is not None and first.reason


def test_renewing_needs_epoch_owner_and_a_living_task(alice: Any) -> None:
    task = make_task(alice)
    lease = claim_next(who=ME, times=TIMES)
    assert lease is not None
    TrainingTask.objects.update(lease_until=Now() - timedelta(seconds=5))
    assert renew(lease, TIMES), "it ran out, but nobody took it"
    assert not renew(Lease(task.pk, 2, lease.owner), TIMES)
    assert not renew(Lease(task.pk, 1, "somebody else"), TIMES)
    TrainingTask.objects.update(status="queued")
    assert not renew(lease, TIMES), "a sweep gave it back to the queue"


# --- eight processes at once ------------------------------------------------------------------------

PROCESSES, TASKS = 8, 40


def _claim_all(path: str, results: Any, barrier: Any) -> None:
    from django.db import connections

    from tests.integration.box import own_database

    connections.close_all()
    with own_database(Path(path)):
        who = Identity(f"host-{os.getpid()}", "boot", os.getpid(), 1.0)
        barrier.wait()
        won = []
        while True:
            lease = claim_next(who=who, times=TIMES)
            if lease is None:
                break
            won.append((str(lease.task_id), lease.epoch))
            Run.objects.filter(task_id=lease.task_id).update(ended=Now())
        results.put(won)


@pytest.mark.slow
def test_eight_processes_win_each_task_exactly_once(tmp_path: Path, django_db_blocker: Any) -> None:
    from django.contrib.auth import get_user_model
    from django.core.management import call_command

    from tests.integration.box import own_database

    path = tmp_path / "studio.sqlite3"
    with django_db_blocker.unblock(), own_database(path):
        call_command("migrate", verbosity=0)
        owner = get_user_model().objects.create_user("alice")
        dataset, base = make_dataset(owner), make_base_model()
        made = {str(make_task(owner, dataset=dataset, base_model=base).pk) for _ in range(TASKS)}
        context = multiprocessing.get_context("fork")
        results, barrier = context.Queue(), context.Barrier(PROCESSES)
        workers = [
            context.Process(target=_claim_all, args=(str(path), results, barrier)) for _ in range(PROCESSES)
        ]
        for worker in workers:
            worker.start()
        won = [claim for _ in workers for claim in results.get(timeout=60)]
        for worker in workers:
            worker.join(timeout=30)
    assert sorted(won) == sorted((task_id, 1) for task_id in made)


def test_an_attempt_begins_by_the_clock_of_the_database(alice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is an hour behind must not seem to have run before the task was queued.

    `memory_retries` counts attempts since then: with its own clock the batch would never be halved.
    """
    monkeypatch.setattr(timezone, "now", lambda: datetime.now(UTC) - timedelta(hours=1))
    task = make_task(alice, queued_at=Now())
    assert claim_next(who=ME, times=TIMES) is not None
    run = task.runs.get()
    task.refresh_from_db()
    assert run.started >= task.queued_at
    task.runs.update(exit_code=ExitCode.OUT_OF_MEMORY)
    assert memory_retries(task) == 1
