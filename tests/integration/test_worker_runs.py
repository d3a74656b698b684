"""A real worker, a real broker, an engine without torch: tasks run, stop and are cancelled."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.box import Box
from tests.training.making import make_task
from training.models import TrainingTask
from training.services.queue import waiting_reason

pytestmark = [pytest.mark.slow]


def assert_every_step_once(task: TrainingTask, steps: int) -> None:
    """No gap, no double, in order of `seq`; and `seq` itself has no gap."""
    points = list(task.points.filter(split="train").order_by("seq").values_list("step", flat=True))
    assert points == list(range(1, steps + 1))
    seqs = sorted([*task.points.values_list("seq", flat=True), *task.events.values_list("seq", flat=True)])
    task.refresh_from_db()
    assert seqs == list(range(1, task.last_seq + 1))


def test_a_queued_task_runs_to_a_model(box: Box, person: Any) -> None:
    task = make_task(person)
    assert "No GPU worker is running" in waiting_reason(task)
    box.start_worker()
    box.wait_status(task, "succeeded", "failed")
    assert task.status == "succeeded", task.error
    assert_every_step_once(task, 40)
    model = task.trained_model
    assert (model.folder / "adapter_model.safetensors").is_file()
    assert model.name == "Model"
    assert model.parameters == task.plan["config"] or model.parameters["beta"] == 0.1
    for e in task.events.all():
        print(e.time, e.source, e.text)
    print(list(task.runs.values()))
    print(box.log())
    assert task.runs.get().exit_code == 0
    assert not box.engines()
