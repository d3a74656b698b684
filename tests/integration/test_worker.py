"""Real Celery workers, a real Valkey, an engine without torch: what a person sees of the queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from celery import Celery
from channels_redis.pubsub import RedisPubSubChannelLayer
from django.contrib.auth import get_user_model

from tests.integration.box import Box
from tests.integration.checks import assert_every_step_once, assert_never_two_at_once, texts
from tests.training.making import make_base_model, make_dataset, make_task
from training.models import TrainedModel, WorkerHost
from training.services.queue import queue_position, waiting_reason
from training.services.tasks import task_cancel, task_stop

pytestmark = [pytest.mark.slow]


def test_a_queued_task_runs_to_a_model_and_the_worker_leaves_in_order(box: Box, person: Any) -> None:
    task = make_task(person)
    assert "No GPU worker is running" in waiting_reason(task)
    worker = box.start_worker()
    box.wait_status(task, "succeeded", "failed")
    assert task.status == "succeeded", task.error
    assert_every_step_once(task, 40)
    assert task.trained_model.parameters == task.plan["config"]
    assert (task.trained_model.folder / "adapter_model.safetensors").is_file()
    host = WorkerHost.objects.get(host="here", queue="gpu")
    assert host.slots == 1 and host.ram_bytes > 0 and host.pid == worker.pid
    worker.terminate()
    assert worker.wait(timeout=10) == 0
    assert not WorkerHost.objects.exists(), "an orderly end is said at once"
    assert not box.processes()


def test_the_bell_starts_a_task_at_once_and_ticks_reach_the_channel_layer(
    make_box: Callable[..., Box],
) -> None:
    """With a sweep that never rings, only the broker's message can start it."""
    box = make_box()
    times = '{"sweep_every": 1.0, "ring_after": 600, "watch_every": 0.1}'
    box.start_worker(TEST_WORKER_TIMES=times)
    box.wait(lambda: WorkerHost.objects.exists(), "the worker's first sign")
    person = get_user_model().objects.get(username="alice")
    task = make_task(person, rung_at="2100-01-01T00:00Z")
    layer = RedisPubSubChannelLayer(hosts=[f"unix://{box.socket}"])
    app = Celery(broker=f"redis+socket://{box.socket}")
    app.conf.broker_transport_options = {"global_keyprefix": "studio:"}

    async def listen() -> tuple[float, dict[str, Any]]:
        channel = await layer.new_channel()
        await layer.group_add(f"task.{task.pk}", channel)
        began = time.monotonic()
        await asyncio.to_thread(app.send_task, "training.run", [str(task.pk)], queue="gpu")
        message = await asyncio.wait_for(layer.receive(channel), 15)
        return time.monotonic() - began, message

    seconds, message = asyncio.run(listen())
    assert message["type"] == "tick" and message["seq"] >= 1
    assert seconds < 5
    box.wait_status(task, "succeeded")


def test_cancel_and_stop_reach_a_running_task_within_three_seconds(box: Box, person: Any) -> None:
    box.start_worker(STUB_STEPS="5000")
    for action, end in ((task_cancel, "cancelled"), (task_stop, "stopped")):
        task = make_task(person)
        box.wait_step(task, 5)
        began = time.monotonic()
        assert action(task, by="alice").ok
        box.wait_status(task, end)
        assert time.monotonic() - began < 3
        assert not box.engines()
    assert TrainedModel.objects.count() == 1


def test_tasks_wait_their_turn_and_say_so(box: Box, person: Any) -> None:
    dataset, base = make_dataset(person), make_base_model()
    box.start_worker(STUB_STEPS="60")
    first = make_task(person, dataset=dataset, base_model=base)
    box.wait_step(first, 1)
    second, third = (make_task(person, dataset=dataset, base_model=base) for _ in range(2))
    assert [queue_position(task) for task in (second, third)] == [1, 2]
    assert waiting_reason(second) == "It is next: it starts when a running task ends."
    assert waiting_reason(third) == "1 task before it."
    for task in (first, second, third):
        box.wait_status(task, "succeeded")
    starts = [task.started_at for task in (first, second, third)]
    assert starts == sorted(starts)
    assert_never_two_at_once(box.trail)


def test_two_workers_race_for_each_task_and_each_runs_once(box: Box, person: Any) -> None:
    dataset, base = make_dataset(person), make_base_model()
    for name in ("left", "right"):
        box.start_worker(STUDIO_WORKER_NAME=name, STUB_STEPS="15")
    box.wait(lambda: WorkerHost.objects.count() == 2, "both workers' sign")
    tasks = [make_task(person, dataset=dataset, base_model=base) for _ in range(8)]
    for task in tasks:
        box.wait_status(task, "succeeded")
        assert task.runs.count() == 1 and task.lease_epoch == 1
        assert_every_step_once(task, 15)
    assert {run.host for task in tasks for run in task.runs.all()} == {"left", "right"}
    assert_never_two_at_once(box.trail)


def test_without_a_broker_the_same_worker_finds_its_work(make_box: Callable[..., Box]) -> None:
    box = make_box(broker=False)
    person = get_user_model().objects.get(username="alice")
    box.start_worker(STUB_STEPS="15")
    box.wait(lambda: WorkerHost.objects.exists(), "the worker's first sign")
    for _ in range(2):
        task = make_task(person)
        began = time.monotonic()
        box.wait_status(task, "succeeded")
        assert time.monotonic() - began < 8
        assert_every_step_once(task, 15)


def test_without_a_broker_a_shutdown_is_as_orderly_and_a_killed_worker_leaves_as_little(
    make_box: Callable[..., Box],
) -> None:
    """Here a thread of Celery's pool forks its processes anew, and the kernel ties them to that thread."""
    box = make_box(broker=False)
    worker = box.start_worker(STUB_STEPS="5000", STUB_STEP_SECONDS="1.5", STUB_SAVE_STEPS="1")
    task = make_task(get_user_model().objects.get(username="alice"))
    box.wait_step(task, 1)
    psutil.Process(task.runs.get().pid).kill()
    box.wait(lambda: task.runs.filter(epoch=2, engine_pid__gt=0).exists(), "the next attempt")
    box.wait_step(task, 2)
    worker.terminate()  # the step that has just begun takes longer than the threads of the pool live on
    box.wait(lambda: not box.engines(), "the end of the engine", 5)
    assert worker.wait(timeout=20) == 0, "Celery looks for the lost pool process for 10 s"
    task.refresh_from_db()
    assert (task.status, task.attempts) == ("queued", 0)
    assert task.checkpoints.latest("step").step == task.step, "nothing that was done is lost"
    assert not box.processes()
    worker = box.start_worker(STUB_STEPS="5000")
    box.wait(lambda: task.runs.filter(epoch=3, engine_pid__gt=0).exists(), "the third attempt")
    worker.kill()
    box.wait(lambda: not box.processes(), "the end of all its processes", 1)


def test_sigterm_to_the_worker_writes_a_checkpoint_and_gives_the_task_back(box: Box, person: Any) -> None:
    task = make_task(person)
    worker = box.start_worker(STUB_STEPS="300")
    box.wait_step(task, 7)
    worker.terminate()
    began = time.monotonic()
    assert worker.wait(timeout=10) == 0
    assert time.monotonic() - began < 5
    task.refresh_from_db()
    assert (task.status, task.attempts) == ("queued", 0)
    assert task.checkpoints.latest("step").step == task.step, "nothing that was done is lost"
    assert not box.processes()
    assert any("The worker was shut down" in text for text in texts(task))
    box.start_worker(STUB_STEPS="40" if task.step < 40 else "300")
    box.wait_status(task, "succeeded")
    assert task.runs.get(epoch=2).resumed_from_step > 0


def test_a_worker_whose_broker_never_answers_looks_into_the_database(
    make_box: Callable[..., Box],
) -> None:
    box = make_box()
    box.kill_broker()
    person = get_user_model().objects.get(username="alice")
    task = make_task(person)
    box.start_worker(STUB_STEPS="15")
    box.wait_status(task, "succeeded", seconds=40)
    assert "looks into the database" in box.log()


def test_a_worker_that_does_not_get_its_work_ends_with_75(make_box: Callable[..., Box]) -> None:
    """Its consumer is stuck: the broker is there but answers nothing."""
    import os
    import signal

    box = make_box()
    person = get_user_model().objects.get(username="alice")
    worker = box.start_worker(TEST_WORKER_TIMES='{"sweep_every": 0.3, "ring_after": 600, "stuck_after": 2.0}')
    box.wait(lambda: WorkerHost.objects.exists(), "the worker's first sign")
    assert box.broker is not None
    os.kill(box.broker.pid, signal.SIGSTOP)
    try:
        make_task(person, rung_at="2100-01-01T00:00Z")
        assert worker.wait(timeout=15) == 75
        box.wait(lambda: not box.processes(), "the end of its pool", 5)
    finally:
        os.kill(box.broker.pid, signal.SIGCONT)
