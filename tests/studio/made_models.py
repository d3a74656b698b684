"""Rows and files of My Models for tests: a base model, a finished task, a model with an adapter folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets_app.models import Dataset
from training.models import BaseModel, MetricPoint, TrainedModel, TrainingTask

RESULT = {
    "status": "succeeded",
    "step": 12,
    "total_steps": 12,
    "seconds": 83.5,
    "num_tokens": 123456,
    "num_trainable_parameters": 4884480,
    "adapter_sha256": "ab" * 32,
    "data_sha256": "cd" * 32,
    "initial_metrics": {"eval_loss": 0.6931, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.0},
    "metrics": {
        "eval_loss": 0.41,
        "eval_rewards/accuracies": 0.875,
        "eval_rewards/margins": 0.73,
        "eval_kl": 0.021,
        "loss": 0.39,
    },
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
}
PARAMETERS = {
    "beta": 0.1,
    "learning_rate": 5e-5,
    "lora_r": 16,
    "target_modules": ["q_proj", "v_proj"],
    "seed": 42,
}


def make_base(folder: Path | None = None, *, owner: Any = None, name: str = "org/tiny-base") -> BaseModel:
    return BaseModel.objects.create(
        owner=owner,
        source=BaseModel.Source.FOLDER,
        name=name,
        path=str(folder or "/nowhere"),
        status=BaseModel.Status.READY,
        facts={"licence": "apache-2.0"},
    )


def make_model(
    owner: Any, *, base: BaseModel | None = None, name: str = "Brief answers v1", **fields: Any
) -> TrainedModel:
    """A model with files that look right; the weights are only bytes."""
    base = base or make_base()
    dataset = Dataset.objects.create(
        owner=owner,
        name="Example: brief",
        original_name="brief.jsonl",
        status="ready",
        num_pairs=200,
        sha256="ef" * 32,
    )
    task = TrainingTask.objects.create(
        owner=owner,
        name="Task of " + name[:80],
        model_name=name[:120],
        base_model=base,
        dataset=dataset,
        status=TrainingTask.Status.SUCCEEDED,
        step=12,
        total_steps=12,
        last_seq=8,
    )
    for seq, step in enumerate(range(0, 12, 3), start=1):
        loss = 0.69 - step * 0.02
        MetricPoint.objects.create(
            task=task,
            seq=seq,
            step=step,
            split="train",
            time=step,
            values={"loss": loss, "rewards/margins": step * 0.1},
        )
        MetricPoint.objects.create(
            task=task,
            seq=seq + 4,
            step=step,
            split="eval",
            time=step,
            values={
                "eval_loss": loss + 0.01,
                "eval_kl": step * 0.001,
                "eval_rewards/accuracies": 0.5 + step / 40,
            },
        )
    model = TrainedModel.objects.create(
        **{
            "owner": owner,
            "task": task,
            "name": name,
            "base_model": base,
            "base_model_name": base.name,
            "dataset_name": dataset.name,
            "dataset_sha256": dataset.sha256,
            "parameters": PARAMETERS,
            "result": RESULT,
            "size_bytes": 19_600_000,
            **fields,
        }
    )
    write_files(model.folder, base.name)
    return model


def write_files(folder: Path, base_name: str) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 9000)
    config = {"base_model_name_or_path": base_name, "peft_type": "LORA", "r": 16, "lora_alpha": 32}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("what peft wrote")
    (folder / "optimizer.pt").write_bytes(b"must never be sent")
