"""The real engine under the real worker, with a model built from a config: killed in the middle, the same model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.box import Box
from tests.integration.checks import assert_every_step_once, texts
from tests.tiny import build_tiny_model
from tests.training.making import make_base_model, make_dataset, make_task
from training.contract import Metric

pytestmark = [pytest.mark.slow, pytest.mark.kill]

STEPS = 108  # 18 pairs, 2 at a time, 12 times
PARAMETERS = {
    "num_train_epochs": 12,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "max_length": 128,
}


def test_a_killed_real_run_ends_with_the_model_of_an_undisturbed_one(
    box: Box, person: Any, tmp_path: Path
) -> None:
    base = make_base_model(build_tiny_model(tmp_path / "tiny"))
    dataset = make_dataset(person)
    fields = {"base_model": base, "dataset": dataset, "parameters": PARAMETERS}
    undisturbed, killed = make_task(person, **fields), make_task(person, **fields)
    box.start_worker(TEST_REAL_ENGINE="1")
    box.wait_status(undisturbed, "succeeded", "failed", seconds=120)
    assert undisturbed.status == "succeeded", (undisturbed.error, undisturbed.log_tail)
    assert_every_step_once(undisturbed, STEPS)
    assert undisturbed.trained_model.result["metrics"][f"eval_{Metric.LOSS}"] > 0

    box.wait(lambda: killed.checkpoints.exists(), "the first checkpoint", 60)
    first = min(
        killed.checkpoints.values_list("step", flat=True)
    )  # of the first evaluation, or the fiftieth step
    os.kill(killed.runs.get().engine_pid, signal.SIGKILL)
    box.wait_status(killed, "succeeded", "failed", seconds=120)
    assert killed.status == "succeeded", (killed.error, killed.log_tail, texts(killed))
    assert_every_step_once(killed, STEPS)
    assert killed.runs.count() == 2 and killed.runs.get(epoch=2).resumed_from_step >= first > 0

    results = [task.trained_model.result for task in (undisturbed, killed)]
    assert results[0]["adapter_sha256"] == results[1]["adapter_sha256"], "bit for bit"
    curves = [
        [
            (point["step"], point["values"][Metric.LOSS])
            for point in task.points.filter(split="train").order_by("step").values("step", "values")
        ]
        for task in (undisturbed, killed)
    ]
    assert curves[0] == curves[1]
