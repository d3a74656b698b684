"""What a person can do with a task, and what an action that comes too late says."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

from tests.training.making import make_base_model, make_task
from training.models import BaseModel, Checkpoint, TrainedModel, TrainingTask, WorkerHost
from training.services import queue
from training.services.queue import queue_position, ring, waiting_reason
from training.services.tasks import task_cancel, task_delete, task_duplicate, task_retry, task_stop

ENDED = ["succeeded", "stopped", "failed", "cancelled"]


@pytest.fixture
def here(data_dir: Path) -> None:
    """Every test has its own data directory."""


@pytest.fixture(autouse=True)
def _own_data(here: None) -> None: ...


def sentences(task: TrainingTask) -> list[tuple[int, str, str]]:
    return list(task.events.values_list("seq", "source", "text"))


def test_a_queued_task_is_cancelled_at_once(alice: Any) -> None:
    task = make_task(alice)
    assert task_cancel(task, by="alice").ok
    task.refresh_from_db()
    assert (task.status, task.desired_state) == ("cancelled", "cancel")
    assert sentences(task) == [(1, "person", "Cancelled by alice before it started.")]
    assert task.last_seq == 1


def test_a_running_task_is_asked_to_end_and_asked_only_once(alice: Any) -> None:
    task = make_task(alice, status="running")
    assert task_cancel(task, by="alice").ok
    assert task_cancel(task, by="alice").ok
    task.refresh_from_db()
    assert (task.status, task.desired_state) == ("cancelling", "cancel")
    assert len(sentences(task)) == 1


@pytest.mark.parametrize("status", ENDED)
@pytest.mark.parametrize("action", [task_cancel, task_stop])
def test_too_late_changes_nothing_and_says_so(action: Any, status: str, alice: Any) -> None:
    task = make_task(alice, status=status, error="as it was")
    before = TrainingTask.objects.filter(pk=task.pk).values().get()
    answer = action(task, by="alice")
    assert not answer.ok and "already finished" in answer.text
    assert TrainingTask.objects.filter(pk=task.pk).values().get() == before
    assert sentences(task) == []


def test_stop_and_keep_asks_the_worker(alice: Any) -> None:
    task = make_task(alice, status="running")
    assert task_stop(task, by="alice").ok
    assert task_stop(task, by="alice").ok
    task.refresh_from_db()
    assert (task.status, task.desired_state) == ("running", "stop")
    assert len(sentences(task)) == 1


def test_a_task_that_never_started_has_nothing_to_keep(alice: Any) -> None:
    task = make_task(alice)
    answer = task_stop(task, by="alice")
    assert not answer.ok and "nothing to keep" in answer.text
    task.refresh_from_db()
    assert task.desired_state == "run"


def test_a_task_waiting_to_continue_can_be_stopped_and_kept(alice: Any) -> None:
    task = make_task(alice)
    Checkpoint.objects.create(task=task, epoch=1, step=5, path="e1/checkpoints/step-000005")
    assert task_stop(task, by="alice").ok


def test_a_task_being_cancelled_can_no_longer_be_kept(alice: Any) -> None:
    answer = task_stop(make_task(alice, status="cancelling", desired_state="cancel"), by="alice")
    assert not answer.ok and "being cancelled" in answer.text


@pytest.mark.parametrize("status", ["failed", "cancelled", "stopped"])
def test_a_retry_is_a_fresh_queued_attempt(status: str, alice: Any) -> None:
    task = make_task(
        alice,
        status=status,
        desired_state="cancel",
        attempts=3,
        error="It broke.",
        log_tail="…",
        lease_epoch=4,
        started_at=timezone.now() - timedelta(days=3),
    )
    assert "from the start" in task_retry(task, by="alice").text
    task.refresh_from_db()
    assert (task.status, task.desired_state, task.attempts, task.error) == ("queued", "run", 0, "")
    assert task.started_at is None, "the days in between are no duration"
    assert task.lease_epoch == 4, "the next attempt gets a directory of its own"


@pytest.mark.parametrize("status", ["draft", "queued", "running", "cancelling", "succeeded"])
def test_what_cannot_be_retried_says_why(status: str, alice: Any) -> None:
    task = make_task(alice, status=status)
    answer = task_retry(task, by="alice")
    assert not answer.ok and answer.text
    task.refresh_from_db()
    assert task.status == status


@pytest.mark.parametrize("status", [*ENDED, "draft"])
def test_deleting_removes_row_and_folder_and_keeps_the_model(status: str, alice: Any, settings: Any) -> None:
    task = make_task(alice, status=status)
    (task.folder / "e1").mkdir(parents=True)
    (task.folder / "e1" / "events.jsonl").write_text("{}\n")
    model = TrainedModel.objects.create(owner=alice, task=task, name="Kept", base_model_name="base")
    assert task_delete(task, by="alice").ok
    assert not TrainingTask.objects.filter(pk=task.pk).exists() and not task.folder.exists()
    assert not list(Path(settings.RUNS_DIR).rglob("events.jsonl"))
    model.refresh_from_db()
    assert model.task is None
    assert task_delete(task, by="alice").ok, "twice is once"


@pytest.mark.parametrize("status", ["queued", "running", "cancelling"])
def test_a_task_that_has_not_ended_is_not_deleted(status: str, alice: Any) -> None:
    task = make_task(alice, status=status)
    task.folder.mkdir(parents=True)
    answer = task_delete(task, by="alice")
    assert not answer.ok and "Cancel it first" in answer.text
    assert task.folder.exists() and TrainingTask.objects.filter(pk=task.pk).exists()


# --- the queue --------------------------------------------------------------------------------------


def gpu_worker(**fields: Any) -> WorkerHost:
    values = {"host": "h", "queue": "gpu", "boot_id": "b", "pid": 1, "last_seen": timezone.now()}
    return WorkerHost.objects.create(**values | fields)


def test_positions_follow_the_time_of_queueing(alice: Any) -> None:
    now = timezone.now()
    late, early = (make_task(alice, queued_at=now - timedelta(minutes=m)) for m in (1, 2))
    assert (queue_position(early), queue_position(late)) == (1, 2)
    assert queue_position(make_task(alice, status="running")) == 0


def test_a_waiting_task_says_why(alice: Any) -> None:
    now = timezone.now()
    first, second, third = (make_task(alice, queued_at=now - timedelta(minutes=9 - n)) for n in range(3))
    assert "python manage.py worker --queue gpu" in waiting_reason(first)
    host = gpu_worker(last_seen=now - timedelta(minutes=1))
    assert "No GPU worker is running" in waiting_reason(first), "one that is silent does not count"
    host.last_seen = timezone.now()
    host.save()
    assert waiting_reason(first) == "It is next: a worker is about to take it."
    assert waiting_reason(second) == "1 task before it."
    assert waiting_reason(third) == "2 tasks before it."
    make_task(alice, status="running", lease_until=now + timedelta(seconds=30))
    assert waiting_reason(first) == "It is next: it starts when a running task ends."
    assert waiting_reason(make_task(alice, status="failed")) == ""


def test_a_task_that_waits_for_several_gpus_says_so(alice: Any) -> None:
    host = gpu_worker(slots=2, gpus=[{"uuid": "GPU-0"}, {"uuid": "GPU-1"}])
    task = make_task(alice, num_devices=2)
    assert waiting_reason(task) == "It is next: a worker is about to take it."
    make_task(alice, status="running", lease_until=timezone.now() + timedelta(seconds=30))
    assert waiting_reason(task) == "It is next: it starts when 2 GPUs of one machine are free at once."
    host.gpus = host.gpus[:1]
    host.save()
    assert waiting_reason(task).startswith("It asks for 2 GPUs, and the largest machine with a worker has 1.")


def test_a_task_waits_for_its_download_and_holds_up_nobody(alice: Any) -> None:
    gpu_worker()
    base = make_base_model()
    BaseModel.objects.filter(pk=base.pk).update(status="downloading", bytes_done=25, bytes_total=100)
    waiting = make_task(alice, base_model=BaseModel.objects.get(pk=base.pk))
    ready = make_task(alice)
    assert waiting_reason(waiting) == "It waits until stub/base has been downloaded (25 %)."
    assert list(queue.runnable_tasks()) == [ready]


def test_a_failing_broker_fails_no_request(
    alice: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.CELERY_BROKER_URL = "redis+socket:///nowhere"
    calls: list[Any] = []

    def send_task(*args: Any, **_: Any) -> None:
        calls.append(args)
        raise ConnectionError("the broker is away")

    monkeypatch.setattr(queue.current_app, "send_task", send_task)
    task = make_task(alice)
    ring(task.pk)
    assert calls == [("training.run", [str(task.pk)])]


def test_without_a_broker_no_message_is_left_in_this_process(
    alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue.current_app, "send_task", lambda *_, **__: pytest.fail("sent to nobody"))
    task = make_task(alice)
    ring(task.pk)
    task.refresh_from_db()
    assert task.rung_at is None


def test_a_retry_rings_after_the_commit_and_not_before(
    alice: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, django_capture_on_commit_callbacks: Any
) -> None:
    settings.CELERY_BROKER_URL = "redis+socket:///somewhere"
    rung: list[Any] = []
    monkeypatch.setattr(queue.current_app, "send_task", lambda *args, **_: rung.append(args))
    task = make_task(alice, status="failed")
    with django_capture_on_commit_callbacks() as callbacks:
        assert task_retry(task, by="alice").ok
        assert rung == []
    for callback in callbacks:
        callback()
    assert rung == [("training.run", [str(task.pk)])]
    shutil.rmtree(task.folder, ignore_errors=True)


def test_a_duplicate_is_a_new_draft_and_leaves_a_line_in_the_history(alice: Any) -> None:
    task = make_task(alice, status="failed", parameters={"beta": 0.3})
    draft = task_duplicate(task, by="alice")
    assert (draft.status, draft.parameters, draft.owner) == ("draft", {"beta": 0.3}, alice)
    assert draft.pk != task.pk and draft.dataset == task.dataset
    task.refresh_from_db()
    assert task.status == "failed"
    assert sentences(task) == [(1, "person", "alice duplicated the task into a new draft.")]
