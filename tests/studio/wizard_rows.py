"""Rows for the tests of the wizard: a starter on disk, a dataset with pairs, a draft, and what each step posts."""

from __future__ import annotations

import json
from typing import Any

from django.urls import reverse

from datasets_app.models import Dataset
from training import recipes
from training.base_models import STARTER
from training.models import BaseModel, TrainingTask

HTMX = {"HTTP_HX_REQUEST": "true"}


def starter(**fields: Any) -> BaseModel:
    values = {"source": "starter", "name": STARTER.hub_id, "kind": "instruct", "status": "ready"}
    return BaseModel.objects.create(**{**values, "facts": STARTER.facts(), **fields})


def dataset_of(owner: Any, *, pairs: int = 120, name: str = "Pairs", **fields: Any) -> Dataset:
    row = Dataset.objects.create(
        owner=owner, name=name, original_name="p.jsonl", num_pairs=pairs, **{"status": "ready", **fields}
    )
    Dataset.objects.filter(pk=row.pk).update(pairs_sha256=str(row.pk))
    row.refresh_from_db()
    row.folder.mkdir(parents=True)
    with row.pairs_path.open("w", encoding="utf-8") as file:
        for number in range(pairs):
            pair = {
                "id": str(number),
                "prompt": [{"role": "user", "content": f"Question {number}"}],
                "chosen": [{"role": "assistant", "content": "Yes <script>alert(1)</script>"}],
                "rejected": [{"role": "assistant", "content": "It depends."}],
            }
            file.write(json.dumps(pair) + "\n")
    return row


def step_url(task: TrainingTask, step: str) -> str:
    return reverse("setup:step", args=[task.pk, step])


def data_post(dataset: Dataset, **changes: Any) -> dict[str, Any]:
    values = {
        "dataset": str(dataset.pk),
        "evaluation": "split",
        "validation_percent": "10",
        "eval_steps": "0",
    }
    return {**values, **changes}


def settings_post(task: TrainingTask, **changes: Any) -> dict[str, Any]:
    """Step 3 with every field at its default."""
    values: dict[str, Any] = {"name": "Task", "model_name": "Model-v1"}
    for parameter in recipes.PARAMETERS:
        values[parameter.name] = recipes.number(parameter.default)
    values["target_modules"] = list(task.base_model.facts["linear_modules"]) if task.base_model else []
    return {**values, **changes}
