"""The supervisor with a real engine process (without torch) and no Celery: every way in which a run can end."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from django.conf import settings as django_settings
from django.contrib.auth import get_user_model
from django.db import connection
from django.db.models.functions import Now

from tests.integration.box import TIMES, Box
from tests.integration.checks import assert_every_step_once, texts
from tests.training.making import make_task
from training.models import Run, TrainedModel, TrainingTask
from training.services.tasks import task_cancel, task_retry, task_stop
from training.worker.shutdown import Shutdown
from training.worker.supervisor import run_next

pytestmark = [pytest.mark.slow]


@pytest.fixture
def box(make_box: Callable[..., Box], settings: Any) -> Box:
    box = make_box(broker=False)
    settings.ENGINE_COMMAND = [
        sys.executable,
        str(Path(django_settings.BASE_DIR) / "tests" / "stub_engine.py"),
    ]
    settings.WORKER_TIMES = TIMES
    settings.ENGINE_ENV = {"STUB_STEPS": "12", "STUB_STEP_SECONDS": "0.005", "STUB_TRAIL": str(box.trail)}
    return box


@pytest.fixture
def task(box: Box) -> TrainingTask:
    return make_task(get_user_model().objects.get(username="alice"))


def run_once() -> bool:
    return run_next(Shutdown())


def run_all(limit: int = 6) -> int:
    """Like a worker whose bell is rung as long as there is work."""
    attempts = 0
    while attempts < limit and run_once():
        attempts += 1
    return attempts


def with_fault(settings: Any, fault: str, **more: str) -> None:
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_FAULT": fault} | more


def meanwhile(action: Callable[[], Any]) -> threading.Thread:
    """Do it in another thread, with a database connection of its own."""

    def do() -> None:
        try:
            action()
        finally:
            connection.close()

    thread = threading.Thread(target=do)
    thread.start()
    return thread


def wait_for_step(task: TrainingTask, step: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if TrainingTask.objects.filter(pk=task.pk, step__gte=step).exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


def test_a_run_ends_with_a_model_and_every_point_once(task: TrainingTask, box: Box) -> None:
    assert run_all() == 1
    task.refresh_from_db()
    assert (task.status, task.error, task.step, task.total_steps) == ("succeeded", "", 12, 12)
    assert_every_step_once(task, 12)
    assert list(task.points.filter(split="eval").values_list("step", flat=True)) == [0, 12]
    assert task.trained_model.parameters["per_device_train_batch_size"] == 2
    assert task.lease_until is None and task.attempts == 0
    assert not task.checkpoints.exists(), "nobody continues from a run that succeeded"


def test_the_engine_gets_data_split_by_prompt_and_no_secret(
    task: TrainingTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_REDIS_URL", "redis://:secret@host/0")
    monkeypatch.setenv("DATABASE_URL", "postgres://u:secret@host/db")
    assert run_all() == 1
    config = json.loads((task.folder / "e1" / "config.json").read_text())
    train, evaluation = Path(config["train_path"]), Path(config["eval_path"])
    assert (len(train.read_text().splitlines()), len(evaluation.read_text().splitlines())) == (18, 2)
    from training.worker.engine_process import environment

    env = environment("cpu")
    assert not [name for name, value in env.items() if "secret" in value]
    assert env["CUDA_VISIBLE_DEVICES"] == "" and env["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("fault", "sentence", "step_part"),
    [
        ("refuse@3", "The model cannot be read.", "Do something about it."),
        ("nan@3", "The loss became NaN.", "Do something about it."),
        ("disk@3", "The disk is full.", "Delete old tasks"),
    ],
)
def test_an_end_that_the_engine_explains_is_not_tried_again(
    fault: str, sentence: str, step_part: str, task: TrainingTask, settings: Any
) -> None:
    with_fault(settings, fault)
    assert run_all() == 1
    task.refresh_from_db()
    assert (task.status, task.error) == ("failed", sentence)
    assert step_part in task.next_step
    assert f"about to {fault[: fault.index('@')]} at step 3" in task.log_tail
    assert not TrainedModel.objects.exists() and not list(Path(settings.MODELS_DIR).iterdir())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("segfault@3", "The engine crashed (SIGSEGV)."),
        ("crash@3", "The engine crashed (exit code 1)."),
        ("silent@3", "The engine ended without saying how the run went."),
    ],
)
def test_a_poisoned_task_fails_after_three_attempts_without_progress(
    fault: str, reason: str, task: TrainingTask, settings: Any
) -> None:
    with_fault(settings, fault)
    assert run_all() == 3
    task.refresh_from_db()
    assert task.status == "failed"
    assert task.error.startswith(reason) and "attempt 3" in task.error
    assert task.next_step and "about to" in task.log_tail


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


def test_a_resumed_run_ends_with_the_same_bytes_as_an_undisturbed_one(box: Box, settings: Any) -> None:
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


def test_out_of_memory_is_tried_once_more_with_half_the_batch(task: TrainingTask, settings: Any) -> None:
    with_fault(settings, "oom@7:1")
    assert run_all() == 2
    task.refresh_from_db()
    assert task.status == "succeeded"
    configs = [json.loads((task.folder / f"e{n}" / "config.json").read_text()) for n in (1, 2)]
    sizes = [(c["per_device_train_batch_size"], c["gradient_accumulation_steps"]) for c in configs]
    assert sizes == [(2, 8), (1, 16)]
    assert any("batch_size 2 → 1" in text for text in texts(task))
    assert task.runs.get(epoch=2).resumed_from_step == 5


def test_out_of_memory_twice_fails_with_advice(task: TrainingTask, settings: Any) -> None:
    with_fault(settings, "oom@7")
    assert run_all() == 2
    task.refresh_from_db()
    assert (task.status, task.error) == ("failed", "The GPU ran out of memory.")
    assert task.next_step == "Do something about it."


def test_out_of_memory_at_batch_one_is_not_tried_again(box: Box, settings: Any) -> None:
    person = get_user_model().objects.get(username="alice")
    task = make_task(person, parameters={"per_device_train_batch_size": 1})
    with_fault(settings, "oom@7")
    assert run_all() == 1
    task.refresh_from_db()
    assert task.status == "failed"


def test_a_killed_engine_is_told_as_such_and_goes_on(task: TrainingTask, settings: Any) -> None:
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_STEP_SECONDS": "0.05"}

    def kill() -> None:
        wait_for_step(task, 6)
        os.kill(Run.objects.get(task=task).engine_pid, signal.SIGKILL)

    killer = meanwhile(kill)
    assert run_all() == 2
    killer.join()
    task.refresh_from_db()
    assert task.status == "succeeded"
    assert any("killed from outside, probably because the machine's memory" in text for text in texts(task))
    assert_every_step_once(task, 12)


def test_a_torn_last_line_and_garbage_are_passed_over(task: TrainingTask, settings: Any) -> None:
    with_fault(settings, "torn@6:1")
    assert run_all() == 2
    task.refresh_from_db()
    assert task.status == "succeeded"
    assert_every_step_once(task, 12)


def test_a_run_that_hangs_is_ended_with_its_stacks_in_the_log(task: TrainingTask, settings: Any) -> None:
    settings.WORKER_TIMES = TIMES | {"stall_floor": 1.0, "load_floor": 1.0}
    with_fault(settings, "hang@3")
    assert run_all() == 3
    task.refresh_from_db()
    assert task.status == "failed" and "made no progress" in task.error
    assert "most recent call first" in task.log_tail and "in happen" in task.log_tail


def test_stop_and_keep_ends_at_the_next_step_with_a_model(task: TrainingTask, settings: Any) -> None:
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_STEPS": "500", "STUB_STEP_SECONDS": "0.02"}

    def stop() -> None:
        wait_for_step(task, 3)
        assert task_stop(task, by="alice").ok

    stopper = meanwhile(stop)
    assert run_all() == 1
    stopper.join()
    task.refresh_from_db()
    assert task.status == "stopped" and 3 <= task.step < 200
    assert task.trained_model.result["status"] == "stopped"
    assert task.checkpoints.count() <= 1


def test_a_stopped_task_can_go_on_and_its_first_model_stays(task: TrainingTask, settings: Any) -> None:
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_STEPS": "60", "STUB_STEP_SECONDS": "0.02"}

    def stop() -> None:
        wait_for_step(task, 6)
        task_stop(task, by="alice")

    stopper = meanwhile(stop)
    assert run_all() == 1
    stopper.join()
    first = TrainedModel.objects.get(task=task)
    assert task_retry(task, by="alice").ok
    assert run_all() == 1
    task.refresh_from_db()
    assert task.status == "succeeded"
    assert task.runs.get(epoch=2).resumed_from_step >= 5
    first.refresh_from_db()
    assert first.task is None and first.folder.is_dir()
    assert TrainedModel.objects.get(task=task).pk != first.pk
    assert_every_step_once(task, 60)


@pytest.mark.parametrize("deaf", ["", "1"])
def test_cancel_ends_even_a_deaf_engine_within_seconds(deaf: str, task: TrainingTask, settings: Any) -> None:
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_STEPS": "5000", "STUB_DEAF": deaf}
    asked = 0.0

    def cancel() -> None:
        nonlocal asked
        wait_for_step(task, 3)
        asked = time.monotonic()
        assert task_cancel(task, by="alice").ok

    canceller = meanwhile(cancel)
    assert run_all() == 1
    seconds = time.monotonic() - asked
    canceller.join()
    task.refresh_from_db()
    assert task.status == "cancelled" and seconds < 3
    assert not psutil.pid_exists(Run.objects.get(task=task).engine_pid)
    assert not TrainedModel.objects.exists()


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


def test_events_of_a_dead_attempt_are_published_before_the_next_one(task: TrainingTask, box: Box) -> None:
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


def test_an_engine_left_over_from_an_earlier_attempt_is_ended_first(task: TrainingTask, box: Box) -> None:
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
