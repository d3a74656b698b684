"""Rows for tests of tasks: a dataset with real pairs on disk, a base model folder, a task that may run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from django.conf import settings
from django.utils import timezone

from datasets_app.models import Dataset
from training.models import BaseModel, TrainingTask


def make_dataset(owner: Any, *, pairs: int = 20, name: str = "Pairs") -> Dataset:
    dataset = Dataset.objects.create(
        owner=owner, name=name, status="ready", num_pairs=pairs, sha256="ab" * 32
    )
    dataset.folder.mkdir(parents=True, exist_ok=True)
    with dataset.pairs_path.open("w", encoding="utf-8") as file:
        for index in range(pairs):
            pair = {
                "id": str(index),
                "prompt": [{"role": "user", "content": f"Question {index}?"}],
                "chosen": [{"role": "assistant", "content": "Yes."}],
                "rejected": [{"role": "assistant", "content": "Well, one could say that it depends."}],
            }
            file.write(json.dumps(pair) + "\n")
    return dataset


def make_base_model(path: Path | None = None) -> BaseModel:
    folder = path or Path(settings.BASE_MODELS_DIR) / "stub"
    folder.mkdir(parents=True, exist_ok=True)
    return BaseModel.objects.create(source="folder", name="stub/base", path=str(folder), status="ready")


def make_task(owner: Any, **fields: Any) -> TrainingTask:
    """A queued task with everything it needs; `fields` override."""
    values: dict[str, Any] = {"name": "Task", "model_name": "Model", "status": "queued"}
    if "dataset" not in fields:
        values["dataset"] = make_dataset(owner)
    if "base_model" not in fields:
        values["base_model"] = make_base_model()
    values |= fields
    if values["status"] != "draft":
        values.setdefault("queued_at", timezone.now())
    return TrainingTask.objects.create(owner=owner, **values)
