"""Datasets of alice's in the states the tests need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile

from datasets_app import services
from datasets_app.jobs import validate_dataset
from datasets_app.models import Dataset
from tests.datasets_app.samples import jsonl, record

MakeDataset = Callable[..., Dataset]


@pytest.fixture
def queued(alice: Any, data_dir: Path) -> MakeDataset:
    """Upload bytes as alice; not validated yet."""

    def make(data: bytes = jsonl(record()), name: str = "pairs.jsonl") -> Dataset:
        return services.dataset_create(alice, upload=SimpleUploadedFile(name, data))

    return make


@pytest.fixture
def validated(queued: MakeDataset) -> MakeDataset:
    """Upload bytes as alice and validate them by the job itself."""

    def make(data: bytes = jsonl(record()), name: str = "pairs.jsonl") -> Dataset:
        dataset = queued(data, name)
        assert validate_dataset(dataset.pk)
        dataset.refresh_from_db()
        return dataset

    return make
