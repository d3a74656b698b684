"""The validation job: under a lease, safe to run twice, safe to be killed, truthful when it fails."""

from __future__ import annotations

import errno
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from datasets_app import jobs, leases
from datasets_app.jobs import validate_dataset
from datasets_app.models import Dataset
from datasets_app.tasks import validate
from tests.datasets_app.conftest import MakeDataset
from tests.datasets_app.samples import jsonl, record


def names(dataset: Dataset) -> set[str]:
    return {path.name for path in dataset.folder.iterdir()}


def test_a_good_file_becomes_ready_with_its_pairs_beside_it(validated: MakeDataset) -> None:
    dataset = validated(jsonl(record(1), record(2, chosen=1), record(3)))
    assert (dataset.status, dataset.problem, dataset.format) == ("ready", "", "prompt")
    assert (dataset.num_lines, dataset.num_pairs, dataset.num_errors) == (3, 2, 1)
    assert len(dataset.pairs_path.read_text().splitlines()) == 2
    assert json.loads(dataset.issues_path.read_text().splitlines()[0])["line"] == 2
    assert names(dataset) == {"original", "pairs.jsonl", "issues.jsonl"}
    assert (dataset.lease_owner, dataset.lease_until, dataset.attempts) == ("", None, 0)


def test_a_file_without_a_usable_line_is_invalid_and_says_so(validated: MakeDataset) -> None:
    dataset = validated(b"nothing here\n")
    assert (dataset.status, dataset.num_pairs) == ("invalid", 0)
    assert dataset.problem.endswith(".")


def test_the_celery_task_is_the_same_job(queued: MakeDataset) -> None:
    dataset = queued()
    validate(str(dataset.pk))
    dataset.refresh_from_db()
    assert dataset.is_ready
    assert validate.name == "datasets.validate"


def test_a_second_message_does_nothing(validated: MakeDataset) -> None:
    dataset = validated()
    before = dataset.pairs_path.stat().st_mtime_ns
    assert not validate_dataset(dataset.pk)
    assert dataset.pairs_path.stat().st_mtime_ns == before


def test_a_message_for_a_dataset_that_is_gone_does_nothing(queued: MakeDataset) -> None:
    dataset = queued()
    Dataset.objects.all().delete()
    assert not validate_dataset(dataset.pk)


def test_a_killed_validation_is_taken_over_after_its_lease(queued: MakeDataset) -> None:
    """The dead worker left a half-written file and the status `validating`."""
    dataset = queued(jsonl(record(1), record(2)))
    rows = Dataset.objects.all()
    dead = leases.claim(rows, dataset.pk, owner="dead", ttl=timedelta(seconds=30), status="validating")
    (dataset.folder / f".pairs.{dead}.tmp").write_text('{"half')
    assert not validate_dataset(dataset.pk), "its lease still runs"
    Dataset.objects.update(lease_until="2020-01-01T00:00:00Z")
    assert validate_dataset(dataset.pk)
    dataset.refresh_from_db()
    assert (dataset.status, dataset.num_pairs) == ("ready", 2)
    assert names(dataset) == {"original", "pairs.jsonl", "issues.jsonl"}


def test_an_overtaken_worker_changes_nothing(queued: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two lines somebody else takes the lease: the old owner stops at its next report."""
    dataset = queued(jsonl(*(record(number) for number in range(50))))
    monkeypatch.setattr(jobs, "REPORT_SECONDS", 0.0)
    renew = leases.renew
    taken: list[int] = []

    def overtaken(rows: Any, pk: Any, epoch: int, **fields: Any) -> bool:
        if not taken:
            Dataset.objects.update(lease_until="2020-01-01T00:00:00Z")
            ttl = timedelta(seconds=30)
            taken.append(leases.claim(Dataset.objects.all(), pk, owner="new", ttl=ttl) or 0)
        return renew(rows, pk, epoch, **fields)

    monkeypatch.setattr(jobs.leases, "renew", overtaken)
    assert not validate_dataset(dataset.pk)
    dataset.refresh_from_db()
    assert (dataset.status, dataset.lease_owner, dataset.lease_epoch) == ("validating", "new", taken[0])
    assert names(dataset) == {"original"}


def test_progress_is_reported_while_it_works(queued: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = queued(jsonl(*(record(number) for number in range(20))))
    monkeypatch.setattr(jobs, "REPORT_SECONDS", 0.0)
    seen: list[int] = []
    renew = leases.renew

    def watched(*args: Any, **fields: Any) -> bool:
        seen.append(fields.get("lines_done", -1))
        return renew(*args, **fields)

    monkeypatch.setattr(jobs.leases, "renew", watched)
    assert validate_dataset(dataset.pk)
    assert seen[:20] == list(range(1, 21))


def test_a_dataset_deleted_while_it_is_read_leaves_no_folder_behind(
    queued: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets_app import services

    dataset = queued(jsonl(*(record(number) for number in range(20))))
    folder = dataset.folder
    monkeypatch.setattr(jobs, "REPORT_SECONDS", 0.0)
    renew = leases.renew

    def deleted(*args: Any, **fields: Any) -> bool:
        if folder.exists():
            services.dataset_delete(Dataset.objects.get())
        return renew(*args, **fields)

    monkeypatch.setattr(jobs.leases, "renew", deleted)
    assert not validate_dataset(dataset.pk)
    assert not folder.exists()


def test_a_missing_file_fails_with_what_to_do(queued: MakeDataset) -> None:
    dataset = queued()
    dataset.original_path.unlink()
    assert validate_dataset(dataset.pk)
    dataset.refresh_from_db()
    assert dataset.status == "failed"
    assert "upload the file again" in dataset.problem


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(errno.ENOSPC, "No space left on device"), "disk is full"), (RuntimeError("bug"), "log")],
)
def test_a_job_that_cannot_finish_fails_with_a_sentence_and_leaves_no_halves(
    queued: MakeDataset, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    dataset = queued()

    def broken(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(jobs.Validation, "run", broken)
    assert validate_dataset(dataset.pk)
    dataset.refresh_from_db()
    assert (dataset.status, dataset.lease_until) == ("failed", None)
    assert words in dataset.problem and "bug" not in dataset.problem
    assert names(dataset) == {"original"}


def test_a_file_that_kills_its_worker_every_time_is_given_up(queued: MakeDataset) -> None:
    dataset = queued()
    Dataset.objects.update(
        attempts=jobs.MAX_ATTEMPTS, status="validating", lease_until="2020-01-01T00:00:00Z"
    )
    assert validate_dataset(dataset.pk)
    dataset.refresh_from_db()
    assert dataset.status == "failed"
    assert "3 times" in dataset.problem


def test_validating_twice_gives_the_same_bytes(queued: MakeDataset, data_dir: Path) -> None:
    dataset = queued(jsonl(*(record(number) for number in range(30))))
    hashes = set()
    for _ in range(2):
        Dataset.objects.update(status="queued")
        assert validate_dataset(dataset.pk)
        dataset.refresh_from_db()
        hashes.add(dataset.pairs_sha256)
    assert len(hashes) == 1


def test_a_file_that_unpacks_to_more_than_the_disk_holds_is_ended_before_the_disk_is_full(
    queued: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database and the broker write to the same disk: what they need is never given to a dataset."""
    monkeypatch.setattr(jobs, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "disk_has_room", lambda size: False)
    dataset = queued()
    assert validate_dataset(dataset.pk)
    dataset.refresh_from_db()
    assert (dataset.status, "disk is full" in dataset.problem) == ("failed", True)
    assert names(dataset) == {"original"}
