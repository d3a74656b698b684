"""Rows for tests of the wizard: the starter, a dataset with pairs on disk, a model of My Models, a whole draft."""

from __future__ import annotations

import json
from typing import Any

from datasets_app.models import Dataset
from training.base_models import STARTER
from training.models import BaseModel, TrainedModel, TrainingTask
from training.services import drafts

STATS = {
    "num_prompts": 200,
    "tokens_estimate": {"prompt": 40, "chosen": 30, "rejected": 50, "total_max": 120},
}


def make_starter(**fields: Any) -> BaseModel:
    values = {"status": "ready", "facts": STARTER.facts()} | fields
    return BaseModel.objects.create(source="starter", name=STARTER.hub_id, kind="instruct", **values)


def make_dataset(owner: Any, *, pairs: int = 200, name: str = "Brief answers", **fields: Any) -> Dataset:
    values = {"status": "ready", "stats": STATS} | fields
    row = Dataset.objects.create(
        owner=owner, name=name, original_name="brief.jsonl", num_pairs=pairs, **values
    )
    Dataset.objects.filter(pk=row.pk).update(pairs_sha256=row.pk.hex)
    row.folder.mkdir(parents=True)
    with row.pairs_path.open("w") as file:
        for number in range(pairs):
            pair = {
                "id": str(number),
                "prompt": [{"role": "user", "content": f"Question {number}?"}],
                "chosen": [{"role": "assistant", "content": "Yes."}],
                "rejected": [{"role": "assistant", "content": "<script>alert(1)</script>"}],
            }
            file.write(json.dumps(pair) + "\n")
    row.refresh_from_db()
    return row


def make_parent(owner: Any, base: BaseModel | None, **parameters: Any) -> TrainedModel:
    return TrainedModel.objects.create(
        owner=owner, name="Polite v1", base_model=base, base_model_name="the base", parameters=parameters
    )


def make_draft(owner: Any, base: BaseModel) -> TrainingTask:
    """Every step done; nothing is missing."""
    task = drafts.draft_create(owner, dataset=make_dataset(owner))
    drafts.draft_save_model(task, base_model=base, parent_model=None)
    drafts.draft_save_settings(task, name="My task", model_name="My model", parameters={"beta": 0.2})
    return task
