"""The supervisor with a real engine process (without torch) and no Celery: every way in which a run can end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from django.contrib.auth import get_user_model
from django.utils import timezone

from tests.integration.box import TIMES, Box
from tests.integration.checks import assert_every_step_once, texts
from tests.integration.in_process import meanwhile, run_all, wait_for_step, with_fault
from tests.training.making import make_task
from training.models import Run, TrainedModel, TrainingTask, WorkerHost
from training.services.tasks import task_cancel, task_retry, task_stop
from training.worker import machine

pytestmark = [pytest.mark.slow]


def test_a_run_ends_with_a_model_and_every_point_once(task: TrainingTask, own_box: Box) -> None:
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


def test_a_task_for_two_gpus_runs_on_both(task: TrainingTask, own_box: Box) -> None:
    gpus = [{"uuid": f"GPU-{number}", "name": "Card", "memory_bytes": 1} for number in (0, 1)]
    WorkerHost.objects.update_or_create(
        host=machine.identity().host, queue="gpu",
        defaults={"boot_id": "b", "pid": 1, "last_seen": timezone.now(), "slots": 2, "gpus": gpus},
    )  # fmt: skip
    TrainingTask.objects.filter(pk=task.pk).update(num_devices=2)
    assert run_all() == 1
    task.refresh_from_db()
    assert task.status == "succeeded"
    assert task.runs.get().device == "GPU-0,GPU-1"
    assert json.loads((task.folder / "e1" / "config.json").read_text())["num_devices"] == 2
    assert "(GPU-0, GPU-1)" in texts(task)[0] + texts(task)[1]


@pytest.mark.parametrize(
    ("fault", "sentence", "step_part"),
    [
        ("refuse@3", "The model of {folder} cannot be read.", "Do something about it."),
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
    folder = task.folder.relative_to(settings.DATA_DIR)  # no path of the server is anybody's business
    assert (task.status, task.error) == ("failed", sentence.format(folder=folder))
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


def test_out_of_memory_at_batch_one_is_not_tried_again(own_box: Box, settings: Any) -> None:
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
