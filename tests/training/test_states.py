"""Statuses change by conditional updates, along the table and no other way."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from tests.training.making import make_task
from training import states
from training.models import TrainingTask

Status = TrainingTask.Status


def test_every_status_has_its_row_in_the_table() -> None:
    assert set(states.TRANSITIONS) == set(Status.values)
    assert all(target in Status.values for targets in states.TRANSITIONS.values() for target in targets)


@pytest.mark.parametrize("source", Status.values)
@pytest.mark.parametrize("target", Status.values)
def test_a_move_that_is_not_in_the_table_is_a_bug_of_the_caller(
    source: str, target: str, alice: Any, data_dir: Any
) -> None:
    task = make_task(alice, status=source)
    if target in states.TRANSITIONS[source]:
        assert states.transition(task.pk, target, from_=source)
        task.refresh_from_db()
        assert task.status == target
    else:
        with pytest.raises(ValueError, match="may not go from"):
            states.transition(task.pk, target, from_=source)
        task.refresh_from_db()
        assert task.status == source


def test_a_move_from_another_status_changes_nothing(alice: Any, data_dir: Any) -> None:
    task = make_task(alice, status="succeeded")
    assert not states.transition(task.pk, Status.CANCELLED, from_=Status.QUEUED, error="no")
    task.refresh_from_db()
    assert (task.status, task.error) == ("succeeded", "")


def test_a_move_under_an_old_epoch_changes_nothing(alice: Any, data_dir: Any) -> None:
    task = make_task(alice, status="running", lease_epoch=3)
    assert not states.transition(task.pk, Status.FAILED, from_=Status.RUNNING, epoch=2)
    assert states.transition(task.pk, Status.FAILED, from_=Status.RUNNING, epoch=3, error="It broke.")
    task.refresh_from_db()
    assert (task.status, task.error) == ("failed", "It broke.")


def test_an_end_gives_the_lease_back_and_says_when(alice: Any, data_dir: Any) -> None:
    task = make_task(alice, status="running", lease_owner="me", lease_until=timezone.now(), phase="training")
    assert states.transition(task.pk, Status.STOPPED, from_=Status.RUNNING)
    task.refresh_from_db()
    assert (task.lease_owner, task.lease_until, task.phase) == ("", None, "")
    assert task.ended_at is not None


def test_an_attempt_that_ended_early_keeps_its_place_and_a_retry_goes_to_the_end(
    alice: Any, data_dir: Any
) -> None:
    long_ago = timezone.now() - timedelta(hours=1)
    early, retried = (
        make_task(alice, status=status, queued_at=long_ago, ended_at=long_ago)
        for status in ("running", "failed")
    )
    assert states.transition(early.pk, Status.QUEUED, from_=Status.RUNNING)
    assert states.transition(retried.pk, Status.QUEUED, from_=Status.FAILED)
    early.refresh_from_db()
    retried.refresh_from_db()
    assert early.queued_at == long_ago
    assert retried.queued_at > long_ago and retried.ended_at is None
