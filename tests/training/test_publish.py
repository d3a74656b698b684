"""Events become rows once and in order, under the lease, whoever reads them and however often."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.training.making import make_task
from training.models import Run, TrainingTask
from training.services.history import event_add
from training.states import Fenced
from training.worker.leases import Lease
from training.worker.publish import publish, publish_earlier
from training.worker.tail import Line


@pytest.fixture
def task(alice: Any, data_dir: Path) -> TrainingTask:
    task = make_task(alice, status="running", lease_epoch=1, lease_owner="me", attempts=1)
    Run.objects.create(task=task, epoch=1, host="h", boot_id="b")
    return task


@pytest.fixture
def lease(task: TrainingTask) -> Lease:
    return Lease(task.pk, 1, "me")


def metrics(step: int, split: str = "train", **values: Any) -> dict[str, Any]:
    return {
        "type": "metrics",
        "time": float(step),
        "split": split,
        "step": step,
        "values": values or {"loss": 1.0},
    }


def log(text: str) -> dict[str, Any]:
    return {"type": "log", "time": 1.0, "level": "info", "text": text}


def lines(*events: dict[str, Any] | None) -> list[Line]:
    return [Line(index * 100, event) for index, event in enumerate(events)]


def all_seqs(task: TrainingTask) -> list[int]:
    return sorted([*task.points.values_list("seq", flat=True), *task.events.values_list("seq", flat=True)])


def test_a_batch_becomes_points_sentences_and_the_standing_of_the_task(
    task: TrainingTask, lease: Lease
) -> None:
    plan = {
        "type": "plan",
        "time": 1.0,
        "total_steps": 9,
        "num_train_pairs": 4,
        "reference": "The base model.",
    }
    phase = {"type": "phase", "time": 1.0, "phase": "reference", "done": 3, "total": 8, "unit": "pairs"}
    seq = publish(lease, lines(log("Hello."), plan, phase, metrics(1), None, metrics(1, "eval")), offset=600)
    task.refresh_from_db()
    assert (seq, task.last_seq) == (3, 3) and all_seqs(task) == [1, 2, 3]
    assert (task.phase, task.phase_done, task.phase_total, task.phase_unit) == ("reference", 3, 8, "pairs")
    assert (task.step, task.total_steps, task.plan["reference"]) == (1, 9, "The base model.")
    assert task.runs.get().events_offset == 600


def test_paths_in_sentences_are_those_of_the_data_folder(
    task: TrainingTask, lease: Lease, settings: Any
) -> None:
    folder = Path(settings.DATA_DIR)
    publish(lease, lines(log(f"{folder / 'base_models' / 'a'} and /elsewhere/b")), offset=60)
    assert task.events.get(source="engine").text == "base_models/a and /elsewhere/b"


def test_nan_and_what_is_no_number_become_null(task: TrainingTask, lease: Lease) -> None:
    values = {"loss": float("nan"), "kl": float("inf"), "grad_norm": "1", "num_tokens": 5, "beta": True}
    publish(lease, lines(metrics(1, **values)), offset=1)
    stored = task.points.get().values
    assert stored == {"loss": None, "kl": None, "grad_norm": None, "num_tokens": 5, "beta": None}


def test_the_same_batch_twice_adds_nothing(task: TrainingTask, lease: Lease) -> None:
    batch = lines(metrics(1), log("Once."), metrics(2))
    first = publish(lease, batch, offset=300)
    assert publish(lease, batch, offset=300) == first == 3
    assert all_seqs(task) == [1, 2, 3]


def test_a_replayed_step_is_the_same_point_and_leaves_no_gap(task: TrainingTask, lease: Lease) -> None:
    publish(lease, lines(metrics(1, loss=0.5), metrics(2, loss=0.4)), offset=200)
    TrainingTask.objects.filter(pk=task.pk).update(lease_epoch=2)
    Run.objects.create(task=task, epoch=2, host="h", boot_id="b")
    publish(Lease(task.pk, 2, "me"), lines(metrics(2, loss=9.9), metrics(3, loss=0.3)), offset=200)
    points = list(task.points.order_by("seq").values_list("seq", "step", "values"))
    assert points == [(1, 1, {"loss": 0.5}), (2, 2, {"loss": 0.4}), (3, 3, {"loss": 0.3})]


@pytest.mark.parametrize(
    "change",
    [
        {"lease_epoch": 2},
        {"lease_owner": "somebody else"},
        {"status": "queued"},
        {"status": "failed"},
    ],
)
def test_a_fenced_writer_enters_nothing(change: dict[str, Any], task: TrainingTask, lease: Lease) -> None:
    TrainingTask.objects.filter(pk=task.pk).update(**change)
    with pytest.raises(Fenced):
        publish(lease, lines(metrics(1), log("No.")), offset=200)
    task.refresh_from_db()
    assert (task.last_seq, task.points.count(), task.events.count()) == (0, 0, 0)
    assert task.runs.get().events_offset == 0


def test_while_a_task_is_being_cancelled_its_last_points_still_count(
    task: TrainingTask, lease: Lease
) -> None:
    TrainingTask.objects.filter(pk=task.pk).update(status="cancelling")
    assert publish(lease, lines(metrics(1)), offset=100) == 1


def test_only_a_newer_checkpoint_is_progress(task: TrainingTask, lease: Lease) -> None:
    def checkpoint(step: int) -> dict[str, Any]:
        return {"type": "checkpoint", "time": 1.0, "step": step, "path": f"checkpoints/step-{step:06d}"}

    def attempts() -> int:
        return TrainingTask.objects.values_list("attempts", flat=True).get(pk=task.pk)

    publish(lease, lines(metrics(1)), offset=1)
    assert attempts() == 1, "points alone are not kept when the run dies"
    publish(lease, lines(checkpoint(5)), offset=2)
    assert attempts() == 0
    row = task.checkpoints.get()
    assert row.path == "e1/checkpoints/step-000005" and row.folder == task.folder / row.path
    TrainingTask.objects.filter(pk=task.pk).update(attempts=2)
    publish(lease, lines(checkpoint(5)), offset=3)
    assert attempts() == 2 and task.checkpoints.count() == 1


def test_what_a_dead_attempt_said_is_entered_for_it_and_moves_nothing_else(task: TrainingTask) -> None:
    folder = task.folder / "e1"
    folder.mkdir(parents=True)
    said = [
        log("Last words."),
        metrics(7),
        {"type": "phase", "time": 1.0, "phase": "saving", "done": 0, "total": 0},
    ]
    (folder / "events.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in said) + '{"type": "met'
    )
    TrainingTask.objects.filter(pk=task.pk).update(lease_epoch=2, lease_owner="next")
    Run.objects.create(task=task, epoch=2, host="h", boot_id="b")
    for _ in range(2):
        publish_earlier(Lease(task.pk, 2, "next"))
    task.refresh_from_db()
    assert all_seqs(task) == [1, 2] and task.events.get().text == "Last words."
    assert (task.phase, task.step) == ("", 0), "the new attempt stands where it stands"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.integers(1, 8), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=6),
    repeats=st.lists(st.integers(1, 3), min_size=7, max_size=7),
    said=st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_however_batches_are_cut_and_repeated_seq_has_no_gap_and_no_double(
    steps: list[int], cuts: list[int], repeats: list[int], said: list[bool], task: TrainingTask, lease: Lease
) -> None:
    TrainingTask.objects.filter(pk=task.pk).update(last_seq=0)
    task.points.all().delete()
    task.events.all().delete()
    whole = lines(*[metrics(step) for step in steps])
    edges = sorted({0, len(whole), *(cut % (len(whole) + 1) for cut in cuts)})
    for index, (start, end) in enumerate(pairwise(edges)):
        for _ in range(repeats[index]):
            publish(lease, whole[start:end], offset=end)
        if said[index]:
            event_add(task.pk, "A person did something.", source="person")
    task.refresh_from_db()
    assert all_seqs(task) == list(range(1, task.last_seq + 1))
    assert sorted(task.points.values_list("step", flat=True)) == sorted(set(steps))
