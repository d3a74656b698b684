"""Validations and downloads that wait are rung for by the workers' sweep, with a broker and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.db.models.functions import Now

from datasets_app.models import Dataset
from training.models import BaseModel
from training.worker import neighbours


@pytest.fixture
def bells(monkeypatch: pytest.MonkeyPatch, data_dir: Path, alice: Any) -> list[tuple[str, str]]:
    rung: list[tuple[str, str]] = []
    monkeypatch.setattr(
        neighbours.current_app, "send_task", lambda name, args, **_: rung.append((name, args[0]))
    )
    return rung


@pytest.mark.parametrize("broker", ["redis+socket:///x", "memory://"])
def test_what_waits_is_rung_for(broker: str, bells: list[tuple[str, str]], alice: Any, settings: Any) -> None:
    settings.CELERY_BROKER_URL = broker
    dataset = Dataset.objects.create(owner=alice, name="D", status="queued")
    model = BaseModel.objects.create(source="hub", name="a/b", status="queued")
    BaseModel.objects.create(source="hub", name="a/c", status="ready")
    neighbours.sweep_neighbours(queues=["default"])
    assert sorted(bells) == sorted(
        [("datasets.validate", str(dataset.pk)), ("models.download", str(model.pk))]
    )
    neighbours.sweep_neighbours(queues=["default"])
    assert len(bells) == 2, "not again at once"


def test_without_a_broker_a_gpu_worker_does_not_ring_for_what_it_cannot_do(
    bells: list[tuple[str, str]], alice: Any
) -> None:
    Dataset.objects.create(owner=alice, name="D", status="queued")
    neighbours.sweep_neighbours(queues=["gpu"])
    assert bells == []


def test_work_under_a_living_lease_is_left_alone(bells: list[tuple[str, str]], alice: Any) -> None:
    Dataset.objects.create(owner=alice, name="D", status="validating", lease_until=Now())
    Dataset.objects.update(lease_until="2100-01-01T00:00Z")
    neighbours.sweep_neighbours(queues=["default"])
    assert bells == []
