"""After a run: whose data its model names, what cannot be a model, what nobody will claim, what a retry keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.making import make_task
from training.contract import file_sha256
from training.models import Checkpoint, Run, TrainedModel, TrainingTask
from training.services.outputs import trained_model_create, unentered_result
from training.services.tasks import task_delete, task_retry
from training.worker.finish import prune_checkpoints


@pytest.fixture(autouse=True)
def _own_data(data_dir: Path) -> None: ...


@pytest.fixture
def task(alice: Any) -> TrainingTask:
    return make_task(alice, status="running", lease_epoch=1, lease_owner="me", attempts=1)


def finished_run(task: TrainingTask, *, epoch: int = 1) -> Run:
    run = Run.objects.create(task=task, epoch=epoch, host="h", boot_id="b")
    adapter = run.folder / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text("{}")
    sha256 = file_sha256(adapter / "adapter_model.safetensors")
    result = {"status": "succeeded", "step": 12, "adapter_sha256": sha256}
    (run.folder / "result.json").write_text(json.dumps(result))
    return run


def test_a_model_remembers_its_data_although_the_dataset_was_deleted_between_attempts(
    task: TrainingTask,
) -> None:
    run = finished_run(task)
    plan = {"dataset_name": "Pairs", "dataset_sha256": "ab" * 32}
    TrainingTask.objects.filter(pk=task.pk).update(dataset=None, plan=plan)
    task.refresh_from_db()
    found = unentered_result(task)
    assert found is not None
    model = trained_model_create(task, epoch=1, run_dir=run.folder, result=found[1])
    assert (model.dataset_name, model.dataset_sha256) == ("Pairs", "ab" * 32)


@pytest.mark.parametrize("harm", ["other bytes", "no configuration"])
def test_a_result_whose_adapter_is_unusable_is_not_taken_up_again(harm: str, task: TrainingTask) -> None:
    """Else every further attempt, and every Retry, would fail on the same files and train nothing."""
    run = finished_run(task)
    if harm == "other bytes":
        (run.folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weightz")
    else:
        (run.folder / "adapter" / "adapter_config.json").unlink()
    assert unentered_result(task) is None


def test_deleting_a_task_removes_an_adapter_that_was_moved_but_never_entered(
    task: TrainingTask, settings: Any
) -> None:
    run = finished_run(task)
    found = unentered_result(task)
    assert found is not None
    trained_model_create(task, epoch=1, run_dir=run.folder, result=found[1])
    TrainedModel.objects.all().delete()  # as if the worker had died before it could write the rows
    Run.objects.update(reason="The worker's process was killed.")
    TrainingTask.objects.update(status="failed")
    assert list(Path(settings.MODELS_DIR).iterdir())
    assert task_delete(task, by="alice").ok
    assert not list(Path(settings.MODELS_DIR).iterdir())


@pytest.mark.parametrize(("status", "left"), [("succeeded", 0), ("stopped", 1)])
def test_checkpoints_go_when_nobody_continues_from_them(status: str, left: int, task: TrainingTask) -> None:
    for step in (5, 10):
        Checkpoint.objects.create(task=task, epoch=1, step=step, path=f"e1/checkpoints/step-{step:06d}")
    TrainingTask.objects.filter(pk=task.pk).update(status=status)
    prune_checkpoints(task)
    assert list(task.checkpoints.values_list("step", flat=True)) == [10] * left


def test_a_stopped_task_keeps_the_checkpoint_of_its_best_evaluation_too(task: TrainingTask) -> None:
    run = finished_run(task)
    found = unentered_result(task)
    assert found is not None
    trained_model_create(task, epoch=1, run_dir=run.folder, result={**found[1], "best_step": 5})
    for step in (5, 7, 10):
        Checkpoint.objects.create(task=task, epoch=1, step=step, path=f"e1/checkpoints/step-{step:06d}")
    TrainingTask.objects.filter(pk=task.pk).update(status="stopped")
    prune_checkpoints(task)
    assert sorted(task.checkpoints.values_list("step", flat=True)) == [5, 10]


def test_a_stopped_task_that_is_retried_at_that_very_moment_keeps_its_checkpoint(task: TrainingTask) -> None:
    Checkpoint.objects.create(task=task, epoch=1, step=10, path="e1/checkpoints/step-000010")
    TrainingTask.objects.filter(pk=task.pk).update(status="stopped")
    assert task_retry(task, by="alice").ok  # between the end of the run and its tidying up
    prune_checkpoints(task)
    assert task.checkpoints.count() == 1
