"""Rows for the tests of the monitor: a task with points and sentences, as the worker would have stored them."""

from __future__ import annotations

from typing import Any

from django.db.models import F
from django.utils import timezone

from datasets_app.models import Dataset
from training.models import BaseModel, MetricPoint, Run, TaskEvent, TrainedModel, TrainingTask


def make_task(
    owner: Any, *, status: str = "running", name: str = "Q1 alignment", **fields: Any
) -> TrainingTask:
    base = BaseModel.objects.create(
        source="starter", kind="instruct", name="SmolLM2-135M-Instruct", status="ready"
    )
    dataset = Dataset.objects.create(
        owner=owner, name="Brief answers", original_name="a.jsonl", status="ready"
    )
    values: dict[str, Any] = {"started_at": timezone.now(), "phase": "training", "total_steps": 100}
    if status in {"succeeded", "stopped", "failed", "cancelled"}:
        values["ended_at"] = timezone.now()
    if status in {"queued", "draft"}:
        values = {"queued_at": timezone.now() if status == "queued" else None}
    return TrainingTask.objects.create(
        owner=owner,
        status=status,
        name=name,
        model_name="Brief-v1",
        base_model=base,
        dataset=dataset,
        **values | fields,
    )


def add_point(task: TrainingTask, step: int, values: dict[str, Any], *, split: str = "train") -> int:
    """One point with the next seq; the row in memory follows."""
    TrainingTask.objects.filter(pk=task.pk).update(last_seq=F("last_seq") + 1, step=step)
    task.refresh_from_db()
    MetricPoint.objects.create(
        task=task, seq=task.last_seq, step=step, split=split, values=values, time=1_700_000_000.0 + 2 * step
    )
    return task.last_seq


def add_points(task: TrainingTask, count: int) -> None:
    """The next `count` training steps, in one go."""
    points = [
        MetricPoint(
            task=task,
            seq=task.last_seq + number,
            step=task.step + number,
            split="train",
            values={"loss": 0.7 - (task.step + number) / 1000, "grad_norm": 2.0, "tokens_per_second": 1500.0},
            time=1_700_000_000.0 + 2 * (task.step + number),
        )
        for number in range(1, count + 1)
    ]
    MetricPoint.objects.bulk_create(points)
    task.step, task.last_seq = task.step + count, task.last_seq + count
    task.save(update_fields=["step", "last_seq"])


def add_events(task: TrainingTask, *texts: str) -> None:
    TaskEvent.objects.bulk_create(
        TaskEvent(task=task, seq=task.last_seq + number, time=1_700_000_000.0, text=text)
        for number, text in enumerate(texts, start=1)
    )
    task.last_seq += len(texts)
    task.save(update_fields=["last_seq"])


def add_log(task: TrainingTask, text: str, *, epoch: int = 1) -> None:
    run = Run.objects.create(task=task, epoch=epoch, host="here", boot_id="b")
    run.folder.mkdir(parents=True)
    (run.folder / "engine.log").write_text(text, encoding="utf-8")


def make_model(task: TrainingTask) -> TrainedModel:
    return TrainedModel.objects.create(
        owner=task.owner,
        task=task,
        name="Brief-v1",
        base_model=task.base_model,
        base_model_name="SmolLM2-135M-Instruct",
        size_bytes=9_000_000,
        result={
            "initial_metrics": {"eval_loss": 0.6931, "eval_rewards/margins": 0.0},
            "metrics": {"eval_loss": 0.412, "eval_rewards/margins": 1.25},
        },
    )
