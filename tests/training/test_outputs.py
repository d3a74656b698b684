"""A model appears whole, once, in the moment its task ends; anything else leaves My Models as it was."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from django.db.models.functions import Now

from tests.training.making import make_task
from training.models import Run, TrainedModel, TrainingTask
from training.services.outputs import (
    UnusableAdapter,
    outputs_forget,
    trained_model_create,
    unentered_result,
)
from training.states import Fenced

WEIGHTS = b"the weights"


@pytest.fixture
def task(alice: Any, data_dir: Path) -> TrainingTask:
    plan = {"config": {"beta": 0.1}}
    return make_task(alice, status="running", lease_epoch=1, lease_owner="me", plan=plan)


@pytest.fixture
def run_dir(task: TrainingTask) -> Path:
    return finished(task, 1)


def finished(task: TrainingTask, epoch: int, status: str = "succeeded") -> Path:
    run = Run.objects.create(task=task, epoch=epoch, host="h", boot_id="b")
    adapter = run.folder / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (adapter / "adapter_config.json").write_text("{}")
    (run.folder / "result.json").write_text(json.dumps(result(status)))
    return run.folder


def result(status: str = "succeeded", **fields: Any) -> Any:
    sha = hashlib.sha256(WEIGHTS).hexdigest()
    return {"status": status, "step": 7, "total_steps": 7, "adapter_sha256": sha, **fields}


def models_dir(settings: Any) -> list[str]:
    return sorted(path.name for path in Path(settings.MODELS_DIR).iterdir())


def test_files_row_and_end_of_the_task_belong_together(
    task: TrainingTask, run_dir: Path, settings: Any
) -> None:
    model = trained_model_create(task, epoch=1, run_dir=run_dir, result=result())
    task.refresh_from_db()
    assert (task.status, task.step, task.trained_model) == ("succeeded", 7, model)
    assert (model.folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert not (run_dir / "adapter").exists()
    assert models_dir(settings) == [str(model.pk)]
    assert (model.name, model.base_model_name, model.dataset_name) == ("Model", "stub/base", "Pairs")
    assert model.dataset_sha256 == "ab" * 32 and model.parameters == {"beta": 0.1}
    assert model.size_bytes == len(WEIGHTS) + 2


@pytest.mark.parametrize("harm", ["other bytes", "no config", "empty weights"])
def test_an_adapter_that_is_not_what_the_run_wrote_becomes_no_model(
    harm: str, task: TrainingTask, run_dir: Path, settings: Any
) -> None:
    adapter = run_dir / "adapter"
    if harm == "no config":
        (adapter / "adapter_config.json").unlink()
    else:
        (adapter / "adapter_model.safetensors").write_bytes(b"" if harm == "empty weights" else b"others")
    with pytest.raises(UnusableAdapter, match=r"^The run ended, but .*\.$"):
        trained_model_create(task, epoch=1, run_dir=run_dir, result=result())
    task.refresh_from_db()
    assert task.status == "running" and not TrainedModel.objects.exists()
    assert models_dir(settings) == []


def test_a_fenced_owner_enters_nothing_and_the_next_one_finds_the_files(
    task: TrainingTask, run_dir: Path
) -> None:
    TrainingTask.objects.filter(pk=task.pk).update(lease_epoch=2)
    with pytest.raises(Fenced):
        trained_model_create(task, epoch=1, run_dir=run_dir, result=result())
    assert not TrainedModel.objects.exists()
    task.refresh_from_db()
    found = unentered_result(task)
    assert found is not None and found[0] == run_dir
    model = trained_model_create(task, epoch=2, run_dir=found[0], result=found[1])
    assert (model.folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    task.refresh_from_db()
    assert task.status == "succeeded" and unentered_result(task) is None


def test_what_a_cancelled_task_left_is_removed_and_what_it_kept_is_not(
    task: TrainingTask, run_dir: Path, settings: Any
) -> None:
    TrainingTask.objects.filter(pk=task.pk).update(status="cancelling")
    with pytest.raises(Fenced):
        trained_model_create(task, epoch=1, run_dir=run_dir, result=result())
    assert len(models_dir(settings)) == 1
    outputs_forget(task)
    assert models_dir(settings) == []
    TrainingTask.objects.filter(pk=task.pk).update(status="running", lease_epoch=2)
    model = trained_model_create(task, epoch=2, run_dir=finished(task, 2), result=result())
    outputs_forget(task)
    assert models_dir(settings) == [str(model.pk)]


def test_across_file_systems_the_adapter_is_copied_and_then_renamed(
    task: TrainingTask, run_dir: Path, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "adapter":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    model = trained_model_create(task, epoch=1, run_dir=run_dir, result=result())
    assert (model.folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert models_dir(settings) == [str(model.pk)]


def test_a_stopped_task_that_goes_on_does_not_end_with_its_old_result(task: TrainingTask) -> None:
    finished(task, 1, "stopped")
    assert unentered_result(task) is not None, "its worker died before it could enter it"
    TrainingTask.objects.filter(pk=task.pk).update(queued_at=Now())
    task.refresh_from_db()
    assert unentered_result(task) is None, "the person has asked to go on since"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"status": "failed"}', '{"status": "interrupted"}'])
def test_only_a_finished_result_is_one(content: str, task: TrainingTask, run_dir: Path) -> None:
    (run_dir / "result.json").write_text(content)
    assert unentered_result(task) is None
