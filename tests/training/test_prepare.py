"""The run directory of an attempt: what the engine is told is what will happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.making import make_task
from training.models import Run, TrainedModel, TrainingTask
from training.worker.engine_process import environment
from training.worker.prepare import Prepared, prepare


@pytest.fixture(autouse=True)
def _own_data(data_dir: Path) -> None: ...


def prepared(task: TrainingTask, device: str = "cpu") -> Prepared:
    return prepare(task, Run.objects.create(task=task, epoch=1, host="h", boot_id="b", device=device))


def make_parent(owner: Any, **parameters: Any) -> TrainedModel:
    kept = {"lora_r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "beta": 0.3} | parameters
    parent = TrainedModel.objects.create(owner=owner, name="First", base_model_name="base", parameters=kept)
    parent.folder.mkdir(parents=True)
    return parent


def test_a_continued_adapter_keeps_its_rank_alpha_and_layers_and_the_run_says_so(alice: Any) -> None:
    """Its matrices are there already: another rank in the configuration would be a lie on every page."""
    chosen = {"lora_r": 64, "lora_alpha": 128, "target_modules": ["v_proj"], "beta": 0.2}
    run = prepared(make_task(alice, parent_model=make_parent(alice), parameters=chosen))
    assert (run.config.lora_r, run.config.lora_alpha) == (4, 8)
    assert run.config.target_modules == ("q_proj",)
    assert run.config.beta == 0.2, "what can be chosen anew is"
    (note,) = run.notes
    assert "“First”" in note and "lora_rank 4 instead of 64" in note and "lora_alpha 8 instead of 128" in note
    assert "target_modules q_proj instead of v_proj" in note


def test_a_continued_adapter_with_the_same_shape_needs_no_note(alice: Any) -> None:
    same = {"lora_r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    assert prepared(make_task(alice, parent_model=make_parent(alice), parameters=same)).notes == []


def test_a_new_adapter_has_the_shape_that_was_chosen(alice: Any) -> None:
    run = prepared(make_task(alice, parameters={"lora_r": 64}))
    assert (run.config.lora_r, run.notes) == (64, [])


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", ("auto", 1)), ("GPU-0", ("cuda", 1)), ("GPU-0,GPU-1", ("cuda", 2))]
)
def test_the_engine_gets_the_devices_of_the_attempt(
    alice: Any, device: str, expected: tuple[str, int]
) -> None:
    """A task that asked for two may still have none: what was claimed counts."""
    run = prepared(make_task(alice, num_devices=2), device)
    assert (run.config.device, run.config.num_devices) == expected
    assert environment(device)["CUDA_VISIBLE_DEVICES"] == ("" if device == "cpu" else device)
