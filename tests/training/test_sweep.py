"""Nothing waits for ever for somebody who is gone: what each sweep puts right, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from django.db.models.functions import Now
from django.utils import timezone

from tests.training.making import make_task
from training.models import Run, TrainingTask, WorkerHost
from training.worker import probe
from training.worker import sweep as sweeping
from training.worker.machine import Identity, boot_id
from training.worker.prepare import REFERENCE_CACHE
from training.worker.probe import Gpu
from training.worker.sweep import clean_up, release_expired, release_local, ring_waiting, work_is_left
from training.worker.sweeper import Sweeper
from training.worker.timing import Times

TIMES = Times()


@pytest.fixture(autouse=True)
def _own_data(data_dir: Path) -> None: ...


@pytest.fixture
def me() -> Identity:
    process = psutil.Process()
    return Identity("here", boot_id(), process.pid, process.create_time())


@pytest.fixture
def gone() -> tuple[int, float]:
    """The pid and start time of a process that has ended."""
    process = subprocess.Popen(["true"])
    created = psutil.Process(process.pid).create_time()
    process.wait()
    return process.pid, created


def running(
    alice: Any, *, lease_seconds: float = 30, run: dict[str, Any] | None = None, **fields: Any
) -> TrainingTask:
    values = {"status": "running", "lease_epoch": 1, "lease_owner": "somebody", "attempts": 1} | fields
    task = make_task(alice, **values)
    TrainingTask.objects.filter(pk=task.pk).update(lease_until=Now() + timedelta(seconds=lease_seconds))
    Run.objects.create(task=task, epoch=1, **{"host": "there", "boot_id": "b", "pid": 1} | (run or {}))
    return task


def gpu_worker(**fields: Any) -> WorkerHost:
    values = {"host": "here", "queue": "gpu", "boot_id": "b", "pid": 1, "last_seen": timezone.now()}
    return WorkerHost.objects.create(**values | fields)


def test_a_run_whose_lease_ran_out_is_queued_again_in_its_old_place(alice: Any) -> None:
    task = running(alice, lease_seconds=-1)
    place = task.queued_at
    release_expired()
    task.refresh_from_db()
    assert (task.status, task.lease_owner, task.lease_until) == ("queued", "", None)
    assert task.queued_at == place and task.lease_epoch == 1
    assert task.runs.get().ended is not None
    assert "The worker was lost" in task.events.get().text


def test_a_living_lease_is_left_alone(alice: Any, me: Identity) -> None:
    tasks = [running(alice), running(alice, status="cancelling")]
    release_expired()
    release_local(who=me, limits=TIMES)
    for task in tasks:
        before = task.status
        task.refresh_from_db()
        assert task.status == before and not task.events.exists()


def test_a_cancel_without_an_owner_is_completed(alice: Any) -> None:
    task = running(alice, lease_seconds=-1, status="cancelling", desired_state="cancel")
    release_expired()
    task.refresh_from_db()
    assert task.status == "cancelled" and task.ended_at is not None


def test_a_task_that_lost_three_workers_without_progress_fails_with_its_log(alice: Any) -> None:
    task = running(alice, lease_seconds=-1, attempts=3)
    (task.folder / "e1").mkdir(parents=True)
    (task.folder / "e1" / "engine.log").write_text("loading\nIt ate the machine\n")
    release_expired()
    task.refresh_from_db()
    assert task.status == "failed" and "attempt 3" in task.error
    assert task.log_tail.endswith("It ate the machine") and task.next_step


def test_a_run_whose_process_is_gone_from_this_machine_needs_no_waiting(
    alice: Any, me: Identity, gone: tuple[int, float]
) -> None:
    dead = {"host": "here", "boot_id": me.boot_id, "pid": gone[0], "pid_created": gone[1]}
    reused = dead | {"pid": me.pid, "pid_created": me.pid_created - 1000}
    alive = dead | {"pid": me.pid, "pid_created": me.pid_created}
    tasks = [running(alice, run=run) for run in (dead, reused, alive)]
    release_local(who=me, limits=TIMES)
    for task in tasks:
        task.refresh_from_db()
    assert [task.status for task in tasks] == ["queued", "queued", "running"]


def test_a_run_from_before_the_restart_of_this_machine_needs_no_waiting(alice: Any, me: Identity) -> None:
    before = {"host": "here", "boot_id": "the boot before", "pid": me.pid, "pid_created": me.pid_created}
    task = running(alice, lease_seconds=15, run=before)
    release_local(who=me, limits=TIMES)
    task.refresh_from_db()
    assert task.status == "queued"


def test_two_machines_of_one_name_do_not_take_each_others_runs(alice: Any, me: Identity) -> None:
    """The other one renewed a moment ago: its boot id differs because it is another machine."""
    twin = {"host": "here", "boot_id": "another machine", "pid": 4242, "pid_created": 1.0}
    task = running(alice, lease_seconds=TIMES.lease_ttl - 1, run=twin)
    release_local(who=me, limits=TIMES)
    task.refresh_from_db()
    assert task.status == "running"


@pytest.fixture
def bells(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    rung: list[str] = []
    monkeypatch.setattr(sweeping.current_app, "send_task", lambda name, args, **_: rung.append(args[0]))
    return rung


def test_the_bell_rings_for_as_many_as_there_is_room(
    alice: Any, me: Identity, bells: list[str], settings: Any
) -> None:
    settings.CELERY_BROKER_URL = "redis+socket:///x"
    now = timezone.now()
    tasks = [make_task(alice, queued_at=now - timedelta(minutes=9 - n)) for n in range(3)]
    ring_waiting(who=me, limits=TIMES, serves_gpu=True)
    assert bells == [], "nobody is there to hear it"
    gpu_worker(slots=3)
    running(alice, run={"host": "here"})
    for _ in range(2):
        ring_waiting(who=me, limits=TIMES, serves_gpu=False)
    assert bells == [str(task.pk) for task in tasks[:2]], "and not again before 15 s have passed"
    TrainingTask.objects.filter(status="queued").update(rung_at=Now() - timedelta(seconds=16))
    ring_waiting(who=me, limits=TIMES, serves_gpu=False)
    assert len(bells) == 4


def test_without_a_broker_only_a_gpu_worker_rings_and_only_for_itself(
    alice: Any, me: Identity, bells: list[str]
) -> None:
    task = make_task(alice)
    gpu_worker(host="elsewhere")
    ring_waiting(who=me, limits=TIMES, serves_gpu=True)
    assert bells == []
    gpu_worker()
    ring_waiting(who=me, limits=TIMES, serves_gpu=False)
    assert bells == []
    ring_waiting(who=me, limits=TIMES, serves_gpu=True)
    assert bells == [str(task.pk)]


def test_work_is_left_only_while_there_is_room_here(alice: Any, me: Identity) -> None:
    gpu_worker()
    assert not work_is_left(me)
    make_task(alice)
    assert work_is_left(me)
    running(alice, run={"host": "here"})
    assert not work_is_left(me)


def test_old_folders_of_deleted_tasks_and_the_trash_are_removed(alice: Any, settings: Any) -> None:
    task, orphan = make_task(alice), "00000000-0000-4000-8000-000000000000"
    runs = Path(settings.RUNS_DIR)
    for name in (str(task.pk), orphan, ".trash", "something of a person"):
        (runs / name / "e1").mkdir(parents=True)
        os.utime(runs / name, (time.time() - 7200,) * 2)
    clean_up()
    assert sorted(path.name for path in runs.iterdir()) == sorted([str(task.pk), "something of a person"])


def test_the_cache_of_references_keeps_to_its_limit(settings: Any) -> None:
    settings.REFERENCE_CACHE_BYTES = 25
    folder = Path(settings.DATA_DIR) / REFERENCE_CACHE / "a reference"
    folder.mkdir(parents=True)
    for name, hours in (("oldest", 9), ("older", 5), ("old", 2)):
        (folder / f"{name}.safetensors").write_bytes(b"x" * 10)
        os.utime(folder / f"{name}.safetensors", (time.time() - hours * 3600,) * 2)
    clean_up()
    assert sorted(path.stem for path in folder.iterdir()) == ["old", "older"]


def test_what_a_reference_said_is_forgotten_when_no_run_has_read_it_for_long(settings: Any) -> None:
    folder = Path(settings.DATA_DIR) / REFERENCE_CACHE / "a reference"
    folder.mkdir(parents=True)
    for name, days in (("old.safetensors", 31), (".half.tmp", 31), ("read.safetensors", 29)):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (time.time() - days * 86_400,) * 2)
    clean_up()
    assert [path.name for path in folder.iterdir()] == ["read.safetensors"]


@pytest.mark.django_db
def test_a_gpu_that_nvidia_smi_forgets_for_a_moment_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next run would be given the CPU, and take days."""
    sweeper = Sweeper(queues={"gpu"}, slots=1)
    card: Gpu = {"uuid": "GPU-1", "name": "Card", "memory_bytes": 1}
    for answer in ([card], []):
        monkeypatch.setattr(probe, "gpus", lambda answer=answer: answer)
        sweeper._probed = float("-inf")
        sweeper._probe_if_due()
        sweeper._say_present()
        assert WorkerHost.objects.get(queue="gpu").gpus == [card]
