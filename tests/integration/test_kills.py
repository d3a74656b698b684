"""SIGKILL at random moments: afterwards every task has ended truthfully, every point is there, none twice.

The seed is printed; `KILL_SEED=…` replays it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from django.contrib.auth import get_user_model

from tests.integration.box import Box
from tests.integration.checks import assert_every_step_once, assert_never_two_at_once, texts
from tests.training.making import make_base_model, make_dataset, make_task
from training.models import TrainingTask, WorkerHost
from training.services.tasks import task_cancel

pytestmark = [pytest.mark.slow, pytest.mark.kill]

STEPS = 60
STUB = {"STUB_STEPS": str(STEPS), "STUB_STEP_SECONDS": "0.02"}


@pytest.fixture
def dice() -> random.Random:
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 1_000_000)
    print(f"KILL_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def new_task(box: Box, person: Any) -> Callable[[], TrainingTask]:
    dataset, base = make_dataset(person), make_base_model()
    return lambda: make_task(person, dataset=dataset, base_model=base)


def model_bytes(task: TrainingTask) -> bytes:
    return (task.trained_model.folder / "adapter_model.safetensors").read_bytes()


def assert_ended_well(box: Box, task: TrainingTask, seconds: float = 30.0) -> None:
    box.wait_status(task, "succeeded", "failed", seconds=seconds)
    assert task.status == "succeeded", (task.error, texts(task))
    assert_every_step_once(task, STEPS)
    assert_never_two_at_once(box.trail)
    assert not task.runs.filter(ended=None).exists()


def kill_quietly(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_an_engine_killed_at_random_steps_goes_on_within_five_seconds(
    box: Box, new_task: Callable[[], TrainingTask], dice: random.Random
) -> None:
    box.start_worker(**STUB)
    undisturbed = new_task()
    assert_ended_well(box, undisturbed)
    for _ in range(4):
        task = new_task()
        for _ in range(2):  # twice in one run: fewer than the attempts that a poisoned task gets
            box.wait_step(task, dice.randrange(1, STEPS - 10))
            engine = task.runs.latest("epoch").engine_pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
            killed = time.monotonic()
            epoch = task.lease_epoch
            box.wait(
                lambda task=task, epoch=epoch: (
                    task.runs.filter(epoch__gt=epoch, engine_pid__gt=0).exists()
                    or TrainingTask.objects.get(pk=task.pk).is_terminal
                ),
                "the next attempt",
            )
            assert time.monotonic() - killed < 5
            task.refresh_from_db()
        assert_ended_well(box, task)
        assert model_bytes(task) == model_bytes(undisturbed)


@pytest.mark.parametrize("victim", ["pool", "main", "tree"])
def test_a_killed_worker_leaves_no_orphan_and_its_run_goes_on(
    victim: str, box: Box, new_task: Callable[[], TrainingTask], dice: random.Random
) -> None:
    worker = box.start_worker(**STUB)
    for _ in range(2):
        task = new_task()
        box.wait_step(task, 1)
        time.sleep(dice.uniform(0, STEPS * 0.02 * 0.8))
        children = box.tree(worker)
        pool = [child for child in children if child.pid == task.runs.latest("epoch").pid]
        if victim == "pool":
            kill_quietly(pool)
        else:
            box.kill_worker(worker, pool_too=victim == "tree")
            box.wait(lambda: not box.processes(), "the end of all its processes", 0.5)
            worker = box.start_worker(**STUB)
        assert_ended_well(box, task)
    assert len(box.engines()) == 0


def test_a_broker_killed_in_the_middle_disturbs_no_run_and_later_tasks_start(
    box: Box, new_task: Callable[[], TrainingTask], dice: random.Random
) -> None:
    box.start_worker(**STUB)
    for _ in range(2):
        task = new_task()
        box.wait_step(task, dice.randrange(1, STEPS - 20))
        box.kill_broker()
        time.sleep(dice.uniform(0, 1))
        if dice.random() < 0.5:  # its data directory is lost with it
            for path in box.folder.glob("appendonlydir/*"):
                path.unlink()
        waiting = new_task()
        box.start_broker()
        assert_ended_well(box, task)
        assert task.runs.count() == 1
        assert_ended_well(box, waiting)


def test_everything_killed_at_once_comes_back_within_ten_seconds(
    box: Box, new_task: Callable[[], TrainingTask], dice: random.Random
) -> None:
    worker = box.start_worker(**STUB)
    running, waiting = new_task(), new_task()
    box.wait_step(running, 1)
    time.sleep(dice.uniform(0, 1))
    kill_quietly(box.processes())
    box.kill_broker()
    worker.wait()
    box.wait(lambda: not box.processes(), "the end of all processes", 1)
    box.start_broker()
    box.start_worker(**STUB)
    started = time.monotonic()
    box.wait(lambda: box.engines(), "an engine", 10)
    assert time.monotonic() - started < 10
    for task in (running, waiting):
        assert_ended_well(box, task)


def test_a_cancel_without_a_worker_is_complete_when_one_is_back(
    box: Box, new_task: Callable[[], TrainingTask]
) -> None:
    worker = box.start_worker(**STUB)
    task = new_task()
    box.wait_step(task, 3)
    box.kill_worker(worker, pool_too=True)
    assert task_cancel(task, by="alice").ok
    task.refresh_from_db()
    assert task.status == "cancelling"
    box.start_worker(**STUB)
    box.wait_status(task, "cancelled")
    assert not hasattr(task, "trained_model") and not box.engines()


def test_a_machine_that_falls_silent_is_replaced_and_changes_nothing_when_it_wakes(
    make_box: Callable[..., Box],
) -> None:
    """All its processes are frozen; the other machine waits for the lease and finishes; then the first wakes."""
    box = make_box()
    person = get_user_model().objects.get(username="alice")
    left = box.start_worker(STUDIO_WORKER_NAME="left", **STUB | {"STUB_STEPS": "400"})
    task = make_task(person)
    box.wait_step(task, 5)
    run = task.runs.get()
    with frozen([psutil.Process(left.pid), *box.tree(left)]):
        frozen_at = time.monotonic()
        box.start_worker(STUDIO_WORKER_NAME="right", **STUB | {"STUB_STEPS": "100"})
        box.wait(lambda: task.runs.filter(host="right").exists(), "the other machine", 15)
        assert time.monotonic() - frozen_at < 3 + 5, "lease time and a sweep"
        box.wait_status(task, "succeeded")
        box.wait(lambda: not task.checkpoints.exists(), "the removal of checkpoints that nobody needs")
        after = (task.points.count(), task.last_seq, task.checkpoints.count(), task.updated)
    box.wait(lambda: not psutil.pid_exists(run.engine_pid), "the end of the old engine", 5)
    time.sleep(1.0)
    task.refresh_from_db()
    assert after == (task.points.count(), task.last_seq, task.checkpoints.count(), task.updated)
    assert task.status == "succeeded" and task.trained_model.result["total_steps"] == 100
    assert WorkerHost.objects.filter(host="left").exists(), "the woken worker goes on for other tasks"
    other = make_task(person, dataset=task.dataset, base_model=task.base_model)
    box.wait_status(other, "running")


@contextlib.contextmanager
def frozen(processes: list[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def test_a_frozen_supervisor_on_one_machine_loses_its_engine_to_the_next_attempt(
    box: Box, new_task: Callable[[], TrainingTask], tmp_path: Path
) -> None:
    """Only the supervisor is frozen: its engine would go on stepping, so the next attempt ends it first."""
    box.start_worker(STUDIO_WORKER_NAME="here", **STUB | {"STUB_STEPS": "2000"})
    task = new_task()
    box.wait_step(task, 5)
    run = task.runs.get()
    with frozen([psutil.Process(run.pid)]):
        box.start_worker(STUDIO_WORKER_NAME="here", **STUB | {"STUB_STEPS": "300"})
        box.wait(lambda: task.runs.filter(epoch=2, engine_pid__gt=0).exists(), "the next attempt", 20)
        assert not psutil.pid_exists(run.engine_pid) or psutil.Process(run.engine_pid).status() == "zombie"
        box.wait_status(task, "succeeded")
    assert_never_two_at_once(box.trail)
    points = list(task.points.filter(split="train").order_by("seq").values_list("step", flat=True))
    assert points == list(range(1, 301)), "what the first engine said late was not entered"
