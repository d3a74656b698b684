"""After something was lost, broken or taken away: the supervisor goes on, heals, or says what to do."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from django.contrib.auth import get_user_model
from django.db.models.functions import Now

from tests.integration.box import TIMES, Box
from tests.integration.checks import assert_every_step_once, texts
from tests.integration.in_process import meanwhile, run_all, run_once, wait_for_step, with_fault
from tests.training.making import make_task
from training.models import Run, TrainedModel, TrainingTask
from training.services.tasks import task_retry
from training.worker.shutdown import Shutdown
from training.worker.supervisor import run_next

pytestmark = [pytest.mark.slow]


def test_attempts_that_get_further_are_not_counted(task: TrainingTask, settings: Any) -> None:
    """Each attempt crashes at the step after the next checkpoint: five attempts, never two without progress."""
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_STEPS": "10", "STUB_SAVE_STEPS": "2"}
    steps = []
    for crash_at in (3, 5, 7, 9):
        with_fault(settings, f"crash@{crash_at}")
        assert run_once()
        task.refresh_from_db()
        steps.append((task.status, task.attempts))
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_FAULT": ""}
    assert run_once()
    task.refresh_from_db()
    assert steps == [("queued", 0)] * 4
    assert task.status == "succeeded"
    assert list(task.runs.values_list("resumed_from_step", flat=True)) == [0, 2, 4, 6, 8]
    assert_every_step_once(task, 10)


def test_a_resumed_run_ends_with_the_same_bytes_as_an_undisturbed_one(own_box: Box, settings: Any) -> None:
    person = get_user_model().objects.get(username="alice")
    undisturbed = make_task(person)
    assert run_all() == 1
    disturbed = make_task(person, dataset=undisturbed.dataset, base_model=undisturbed.base_model)
    with_fault(settings, "segfault@8:1")
    assert run_all() == 2
    weights = [
        (model.folder / "adapter_model.safetensors").read_bytes()
        for model in TrainedModel.objects.filter(task__in=[undisturbed, disturbed])
    ]
    assert len(weights) == 2 and weights[0] == weights[1]
    losses = [
        list(one.points.filter(split="train").order_by("step").values_list("step", "values"))
        for one in (undisturbed, disturbed)
    ]
    assert losses[0] == losses[1]


def test_a_shutdown_interrupts_with_a_checkpoint_and_counts_no_attempt(
    task: TrainingTask, settings: Any
) -> None:
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_STEP_SECONDS": "0.05"}
    shutdown = Shutdown()

    def leave() -> None:
        wait_for_step(task, 7)
        shutdown.ask()

    leaver = meanwhile(leave)
    assert run_next(shutdown)
    leaver.join()
    task.refresh_from_db()
    assert (task.status, task.attempts, task.lease_until) == ("queued", 0, None)
    saved = task.checkpoints.latest("step").step
    assert saved == task.step, "nothing that was done is lost"
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_STEP_SECONDS": "0.005"}
    assert run_all() == 1
    task.refresh_from_db()
    assert task.status == "succeeded" and task.runs.get(epoch=2).resumed_from_step == saved
    assert_every_step_once(task, 12)


@pytest.mark.parametrize("harm", ["half", "flip", "gone", "manifest"])
def test_a_broken_checkpoint_is_put_aside_and_the_one_before_is_used(
    harm: str, task: TrainingTask, settings: Any
) -> None:
    with_fault(settings, "crash@12:1")
    assert run_once()
    newest = task.checkpoints.latest("step")
    assert newest.step == 10
    weights = newest.folder / "adapter.safetensors"
    if harm == "half":
        weights.write_bytes(weights.read_bytes()[:10])
    elif harm == "flip":
        raw = bytearray(weights.read_bytes())
        raw[3] ^= 1
        weights.write_bytes(raw)
    elif harm == "gone":
        weights.unlink()
    else:
        (newest.folder / "MANIFEST.json").unlink()
    assert run_once()
    task.refresh_from_db()
    assert task.status == "succeeded"
    assert task.runs.get(epoch=2).resumed_from_step == 5
    assert task.events.filter(text__startswith="Attempt 2 started", text__endswith=", from step 5.").exists()
    assert any("step 10 is damaged and was put aside" in text for text in texts(task))
    assert newest.folder.with_name("step-000010.bad").is_dir()
    assert_every_step_once(task, 12)


def test_a_worker_that_dies_between_files_and_rows_is_healed(
    task: TrainingTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter was moved, the rows were not written: nothing shows; the next attempt only writes the rows."""
    from training.services import outputs

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> bool:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(outputs.states, "transition", die)
        with pytest.raises(Killed):
            run_once()
    assert not TrainedModel.objects.exists()
    TrainingTask.objects.filter(pk=task.pk).update(status="queued", lease_until=None)
    before = box_steps(task)
    assert run_all() == 1
    task.refresh_from_db()
    assert task.status == "succeeded" and task.trained_model.size_bytes > 0
    assert box_steps(task) == before, "no step was computed again"
    assert not task.runs.filter(ended=None).exists()


def box_steps(task: TrainingTask) -> int:
    return len(list((task.folder).rglob("events.jsonl")))


def test_events_of_a_dead_attempt_are_published_before_the_next_one(task: TrainingTask, own_box: Box) -> None:
    """Its supervisor was killed before it could read them."""
    folder = task.folder / "e1"
    folder.mkdir(parents=True)
    lines = [
        {"type": "log", "time": 1.0, "level": "info", "text": "said by the dead"},
        {"type": "metrics", "time": 1.0, "split": "train", "step": 1, "values": {"loss": 0.123}},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Run.objects.create(task=task, epoch=1, host="here", boot_id="x", ended=Now())
    TrainingTask.objects.filter(pk=task.pk).update(lease_epoch=1)
    assert run_all() == 1
    assert texts(task).count("said by the dead") == 1
    assert task.points.get(split="train", step=1).values == {"loss": 0.123}
    assert task.events.get(text="said by the dead").seq < task.events.get(text__startswith="Attempt 2").seq
    assert_every_step_once(task, 12)


def test_a_fenced_supervisor_writes_nothing_and_ends_its_engine(task: TrainingTask, settings: Any) -> None:
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_STEPS": "5000", "STUB_STEP_SECONDS": "0.02"}
    rows: dict[str, int] = {}

    def take_over() -> None:
        wait_for_step(task, 5)
        TrainingTask.objects.filter(pk=task.pk).update(lease_epoch=2, lease_owner="somebody else")
        rows["points"] = task.points.count()

    thief = meanwhile(take_over)
    assert run_once()
    thief.join()
    task.refresh_from_db()
    assert (task.status, task.lease_owner, task.lease_epoch) == ("running", "somebody else", 2)
    assert task.points.count() == rows["points"]
    run = Run.objects.get(task=task, epoch=1)
    assert run.ended is None and not psutil.pid_exists(run.engine_pid)


@pytest.mark.parametrize("notes", [["A note."], []])
def test_a_supervisor_that_is_fenced_while_it_prepares_leaves_no_trace(
    notes: list[str], task: TrainingTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.worker import supervisor

    prepare = supervisor.prepare

    def slow(*arguments: Any) -> Any:
        prepared = prepare(*arguments)
        TrainingTask.objects.filter(pk=task.pk).update(lease_epoch=2, lease_owner="somebody else")
        return dataclasses.replace(prepared, notes=notes)

    monkeypatch.setattr(supervisor, "prepare", slow)
    monkeypatch.setattr(supervisor.LeaseKeeper, "check", lambda self: None)  # it has not noticed yet
    assert run_once()
    task.refresh_from_db()
    assert (task.status, task.lease_owner, task.plan) == ("running", "somebody else", {})
    assert not task.events.exists() and not task.points.exists()


def test_without_renewal_the_engine_is_frozen_and_goes_on_when_the_database_is_back(
    task: TrainingTask, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from django.db import OperationalError

    from training.worker import keeper

    settings.WORKER_TIMES = TIMES | {"self_stop": 1.0, "renew_every": 0.2, "lease_ttl": 60.0}
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_STEP_SECONDS": "0.05", "STUB_STEPS": "40"}
    real, away = keeper.renew, threading.Event()
    states: list[str] = []

    def renew(*args: Any) -> bool:
        if away.is_set():
            raise OperationalError("the database is away")
        return real(*args)

    monkeypatch.setattr(keeper, "renew", renew)

    def outage() -> None:
        wait_for_step(task, 4)
        engine = psutil.Process(Run.objects.get(task=task).engine_pid)
        away.set()
        time.sleep(2.0)
        states.append(engine.status())
        away.clear()
        time.sleep(0.7)
        states.append(engine.status())

    other = meanwhile(outage)
    assert run_all() == 1
    other.join()
    assert states[0] == psutil.STATUS_STOPPED and states[1] != psutil.STATUS_STOPPED
    task.refresh_from_db()
    assert task.status == "succeeded" and task.runs.count() == 1
    assert_every_step_once(task, 40)


def test_an_engine_left_over_from_an_earlier_attempt_is_ended_first(task: TrainingTask, own_box: Box) -> None:
    import subprocess

    from training.worker import machine

    old = subprocess.Popen(["sleep", "60"], start_new_session=True)
    created = psutil.Process(old.pid).create_time()
    who = machine.identity()
    Run.objects.create(
        task=task,
        epoch=1,
        host=who.host,
        boot_id=who.boot_id,
        engine_pid=old.pid,
        engine_created=created,
        ended=Now() - timedelta(minutes=1),
    )
    TrainingTask.objects.filter(pk=task.pk).update(lease_epoch=1)
    assert run_all() == 1
    assert old.wait(timeout=5) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda t: t.dataset.delete(), "The dataset of this task was removed."),
        (lambda t: t.dataset.pairs_path.unlink(), "cannot be used"),
        (lambda t: t.base_model.delete(), "The base model of this task was removed."),
        (lambda t: Path(t.base_model.path).rmdir(), "are not on this machine"),
    ],
)
def test_a_task_whose_input_is_gone_fails_with_a_next_step(
    break_it: Callable[[TrainingTask], Any], sentence: str, task: TrainingTask
) -> None:
    break_it(task)
    assert run_all() == 1
    task.refresh_from_db()
    assert task.status == "failed" and sentence in task.error and task.next_step


def test_an_error_nobody_foresaw_counts_as_an_attempt_and_ends_the_task(
    task: TrainingTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.worker import supervisor

    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(supervisor, "prepare", broken)
    assert run_all() == 3
    task.refresh_from_db()
    assert task.status == "failed" and "an error of its own" in task.error
    assert "KeyError" not in task.error and task.next_step


def test_a_disk_that_takes_nothing_fails_the_task_with_a_next_step(
    task: TrainingTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from training.services import outputs

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_move", full)
        assert run_all() == 1
    task.refresh_from_db()
    assert task.status == "failed" and "No space left on device" in task.error
    assert "free space" in task.next_step and not TrainedModel.objects.exists()
    assert task_retry(task, by="alice").ok
    assert run_all() == 1
    task.refresh_from_db()
    assert task.status == "succeeded", "the finished run was kept: only its result is entered"
    assert not (task.folder / "e2" / "events.jsonl").exists()
