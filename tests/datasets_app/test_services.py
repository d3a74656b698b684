"""Making, ringing for, renaming and deleting datasets."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile

from datasets_app import services
from datasets_app.jobs import validate_dataset
from datasets_app.models import Dataset
from tests.datasets_app.conftest import MakeDataset
from tests.datasets_app.samples import jsonl, record
from training.models import TrainingTask


@pytest.fixture
def bell(monkeypatch: pytest.MonkeyPatch, settings: Any) -> list[Any]:
    """A broker that is there; what it was told."""
    settings.CELERY_BROKER_URL = "redis://broker"
    rung: list[Any] = []
    monkeypatch.setattr(
        services.current_app, "send_task", lambda name, args, queue: rung.append((name, args, queue))
    )
    return rung


def test_an_upload_is_kept_whole_under_an_id_of_its_own(queued: MakeDataset) -> None:
    data = jsonl(record(1), record(2))
    dataset = queued(data, "my pairs.jsonl")
    assert dataset.original_path.read_bytes() == data
    assert (dataset.name, dataset.original_name) == ("my pairs", "my pairs.jsonl")
    assert (dataset.status, dataset.size_bytes, len(dataset.sha256)) == ("queued", len(data), 64)


def test_the_same_content_is_kept_once_per_person(queued: MakeDataset, mallory: Any, data_dir: Path) -> None:
    first = queued(name="a.jsonl")
    with pytest.raises(services.AlreadyUploaded) as caught:
        queued(name="b.jsonl")
    assert caught.value.dataset == first
    assert "“a”" in str(caught.value)
    services.dataset_create(mallory, upload=SimpleUploadedFile("c.jsonl", first.original_path.read_bytes()))
    assert len(list((data_dir / "datasets").iterdir())) == Dataset.objects.count() == 2


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\x.jsonl", "x.jsonl"),
        ("a\0b\u202egpj.jsonl", "abgpj.jsonl"),
        ("\x1b[31m", "[31m"),
        ("", "dataset"),
        ("n" * 300, "n" * 255),
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
    ],
)
def test_a_name_is_only_ever_text(given: str, shown: str) -> None:
    assert services.display_name(given) == shown


def test_the_broker_is_told_after_the_commit(
    queued: MakeDataset, bell: list[Any], django_capture_on_commit_callbacks: Any
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        dataset = queued()
        assert bell == []
    assert bell == [("datasets.validate", [str(dataset.pk)], "default")]


def test_a_broken_broker_does_not_fail_the_upload(
    queued: MakeDataset,
    bell: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    django_capture_on_commit_callbacks: Any,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no broker")

    monkeypatch.setattr(services.current_app, "send_task", broken)
    with django_capture_on_commit_callbacks(execute=True):
        assert queued().status == "queued"


def test_the_sweep_rings_for_what_waits_unheard_and_not_for_what_was_rung(
    queued: MakeDataset, validated: MakeDataset, bell: list[Any]
) -> None:
    validated(jsonl(record(2)))
    dataset = queued()
    assert services.jobs_ring_again() == 1
    assert bell == [("datasets.validate", [str(dataset.pk)], "default")]
    assert services.jobs_ring_again() == 0


def test_the_sweep_rings_for_a_validation_whose_worker_is_gone(queued: MakeDataset, bell: list[Any]) -> None:
    dataset = queued()
    Dataset.objects.update(
        status="validating", lease_until="2020-01-01T00:00:00Z", rung_at="2020-01-01T00:00:00Z"
    )
    assert services.jobs_ring_again() == 1
    assert bell[0][1] == [str(dataset.pk)]


def test_the_sweep_removes_parts_of_uploads_that_were_killed(data_dir: Path, db: None) -> None:
    old, new = data_dir / "uploads" / "old.part", data_dir / "uploads" / "new.part"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * services.STALE_UPLOAD_SECONDS,) * 2)
    services.jobs_ring_again()
    assert not old.exists() and new.exists()


def test_deleting_removes_the_row_and_the_files(validated: MakeDataset) -> None:
    dataset = validated()
    folder = dataset.folder
    services.dataset_delete(dataset)
    assert not folder.exists()
    assert not Dataset.objects.exists()


@pytest.mark.parametrize("status", ["queued", "running", "cancelling"])
@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
def test_a_dataset_a_task_still_reads_is_not_deleted(
    validated: MakeDataset, alice: Any, status: str, field: str
) -> None:
    dataset = validated()
    TrainingTask.objects.create(owner=alice, name="My run", status=status, **{field: dataset})
    with pytest.raises(services.DatasetInUse, match="My run"):
        services.dataset_delete(dataset)
    assert dataset.pairs_path.exists()


@pytest.mark.parametrize("status", ["draft", "succeeded", "failed"])
def test_a_task_that_is_over_does_not_keep_its_dataset(
    validated: MakeDataset, alice: Any, status: str
) -> None:
    dataset = validated()
    task = TrainingTask.objects.create(owner=alice, status=status, dataset=dataset)
    services.dataset_delete(dataset)
    task.refresh_from_db()
    assert task.dataset is None


def test_only_a_failed_validation_is_done_again(queued: MakeDataset) -> None:
    dataset = queued()
    assert not services.dataset_validate_again(dataset)
    Dataset.objects.update(status="failed", problem="disk", attempts=4)
    assert services.dataset_validate_again(dataset)
    dataset.refresh_from_db()
    assert (dataset.status, dataset.problem, dataset.attempts) == ("queued", "", 0)


def test_the_example_comes_once_and_by_the_same_road(alice: Any, data_dir: Path) -> None:
    example = services.example_dataset_ensure(alice)
    assert services.example_dataset_ensure(alice) == example
    assert (example.is_example, example.name, example.status) == (True, services.EXAMPLE_NAME, "queued")
    assert validate_dataset(example.pk)
    example.refresh_from_db()
    assert (example.status, example.num_errors) == ("ready", 0)
    assert example.num_pairs > 150 and example.stats["num_multi_turn"] > 0
    assert services.EXAMPLE_PATH.exists()
