"""The lease: one winner, the database's clock, and no write by an owner who was overtaken."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import connections
from django.db.models import Q
from django.db.models.functions import Now
from django.utils import timezone

from datasets_app import leases
from datasets_app.models import Dataset

TTL = timedelta(seconds=30)
QUEUED = Dataset.Status.QUEUED
VALIDATING = Dataset.Status.VALIDATING


def claimable() -> Any:
    return Dataset.objects.filter(status__in=[QUEUED, VALIDATING])


@pytest.fixture
def dataset(alice: Any) -> Dataset:
    return Dataset.objects.create(owner=alice, name="d", original_name="d.jsonl")


def database_now() -> datetime:
    return Dataset.objects.annotate(now=Now()).values_list("now", flat=True)[0]


def test_the_first_claim_wins_and_the_second_gets_nothing(dataset: Dataset) -> None:
    first = leases.claim(claimable(), dataset.pk, owner="one", ttl=TTL, status=VALIDATING)
    second = leases.claim(claimable(), dataset.pk, owner="two", ttl=TTL, status=VALIDATING)
    dataset.refresh_from_db()
    assert (first, second) == (1, None)
    assert (dataset.lease_owner, dataset.status, dataset.attempts) == ("one", VALIDATING, 1)
    left = dataset.lease_until - database_now() if dataset.lease_until else timedelta(0)
    assert timedelta(seconds=28) < left <= TTL


def test_a_row_outside_the_queryset_cannot_be_claimed(dataset: Dataset) -> None:
    Dataset.objects.update(status=Dataset.Status.READY)
    assert leases.claim(claimable(), dataset.pk, owner="one", ttl=TTL) is None


def test_an_expired_lease_is_taken_over_and_the_old_owner_is_fenced(dataset: Dataset) -> None:
    old = leases.claim(claimable(), dataset.pk, owner="old", ttl=timedelta(seconds=-1))
    assert old is not None
    new = leases.claim(claimable(), dataset.pk, owner="new", ttl=TTL)
    assert new == old + 1
    assert not leases.renew(Dataset.objects.all(), dataset.pk, old, ttl=TTL, lines_done=7)
    assert not leases.guarded_update(Dataset.objects.all(), dataset.pk, old, status=Dataset.Status.READY)
    assert not leases.release(Dataset.objects.all(), dataset.pk, old)
    dataset.refresh_from_db()
    assert (dataset.lines_done, dataset.status, dataset.lease_owner, dataset.attempts) == (
        0,
        QUEUED,
        "new",
        2,
    )


def test_renewing_moves_the_end_and_sets_fields(dataset: Dataset) -> None:
    epoch = leases.claim(claimable(), dataset.pk, owner="one", ttl=timedelta(seconds=1)) or 0
    assert leases.renew(Dataset.objects.all(), dataset.pk, epoch, ttl=TTL, lines_done=5)
    dataset.refresh_from_db()
    assert dataset.lease_until and dataset.lease_until - database_now() > timedelta(seconds=25)
    assert dataset.lines_done == 5


def test_an_expired_lease_nobody_took_is_still_its_owners(dataset: Dataset) -> None:
    epoch = leases.claim(claimable(), dataset.pk, owner="one", ttl=timedelta(seconds=-5)) or 0
    assert leases.renew(Dataset.objects.all(), dataset.pk, epoch, ttl=TTL)


def test_a_released_row_can_be_claimed_again(dataset: Dataset) -> None:
    epoch = leases.claim(claimable(), dataset.pk, owner="one", ttl=TTL) or 0
    assert leases.release(Dataset.objects.all(), dataset.pk, epoch, status=QUEUED)
    assert leases.claim(claimable(), dataset.pk, owner="two", ttl=TTL) == epoch + 1


def test_the_workers_own_clock_does_not_matter(dataset: Dataset, time_machine: Any) -> None:
    """A worker whose clock is a year ahead does not steal a live lease."""
    assert leases.claim(claimable(), dataset.pk, owner="right clock", ttl=TTL)
    time_machine.move_to(datetime.now(tz=timezone.get_default_timezone()) + timedelta(days=365))
    assert leases.claim(claimable(), dataset.pk, owner="wrong clock", ttl=TTL) is None


def test_the_bell_is_due_when_never_rung_or_long_ago(dataset: Dataset) -> None:
    due = leases.bell_is_due(timedelta(seconds=15))
    assert Dataset.objects.filter(due).exists()
    Dataset.objects.update(rung_at=Now())
    assert not Dataset.objects.filter(due).exists()
    Dataset.objects.update(rung_at=Now() - timedelta(seconds=16))
    assert Dataset.objects.filter(due).exists()


def test_whole_seconds_compare_like_fractions(dataset: Dataset) -> None:
    """SQLite stores times as text; one without a fraction must still sort beside those with one."""
    Dataset.objects.update(lease_until=datetime(2020, 1, 1, tzinfo=timezone.get_default_timezone()))
    assert Dataset.objects.filter(leases.lease_is_free()).exists()
    assert not Dataset.objects.exclude(leases.lease_is_free() & Q(pk=dataset.pk)).exists()


def test_of_eight_claimers_at_once_exactly_one_wins(tmp_path: Path, django_db_blocker: Any) -> None:
    """Threads with a connection each, on a database file: an in-memory one would not have real locks."""
    race = {**connections.databases["default"], "NAME": str(tmp_path / "race.sqlite3")}
    if connections["default"].vendor != "sqlite":
        pytest.skip("builds its own SQLite file; the other tests here cover PostgreSQL")
    with django_db_blocker.unblock():
        connections.databases["race"] = race
        try:
            with connections["race"].schema_editor() as editor:
                editor.create_model(get_user_model())
                editor.create_model(Dataset)
            owner = get_user_model().objects.using("race").create(username="alice")
            rows = [Dataset.objects.using("race").create(owner=owner, name=str(n)) for n in range(12)]
            assert sorted(_contend(rows)) == sorted((row.pk, 1) for row in rows)
        finally:
            connections["race"].close()
            del connections.databases["race"]


def _contend(rows: list[Dataset]) -> list[tuple[Any, int]]:
    """Eight threads claim every row; what each of them won."""
    wins: list[tuple[Any, int]] = []
    barrier = threading.Barrier(8)

    def run(name: str) -> None:
        for row in rows:
            barrier.wait(timeout=30)
            epoch = leases.claim(claimable().using("race"), row.pk, owner=name, ttl=TTL)
            if epoch is not None:
                wins.append((row.pk, epoch))
        connections["race"].close()

    threads = [threading.Thread(target=run, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wins
