"""What the end of an attempt makes of its task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.making import make_task
from training.models import Run, TrainingTask
from training.states import Fenced
from training.worker.endings import Ending, Then
from training.worker.finish import write_end
from training.worker.leases import Lease


def end(alice: Any, then: Then, **fields: Any) -> TrainingTask:
    values = {"status": "running", "lease_epoch": 1, "lease_owner": "me", "attempts": 1} | fields
    task = make_task(alice, **values)
    Run.objects.create(task=task, epoch=1, host="h", boot_id="b")
    ending = Ending(then=then, text="It happened.", next_step="Do this.")
    write_end(Lease(task.pk, 1, "me"), ending, exit_code=7, log="the log")
    task.refresh_from_db()
    run = task.runs.get()
    assert (run.exit_code, run.reason, run.ended is not None) == (7, "It happened.", True)
    return task


@pytest.mark.parametrize(
    ("then", "fields", "status", "attempts"),
    [
        (Then.CONTINUE, {}, "queued", 0),
        (Then.CONTINUE, {"attempts": 3}, "queued", 2),
        (Then.TRY_AGAIN, {}, "queued", 1),
        (Then.TRY_AGAIN, {"attempts": 2}, "queued", 2),
        (Then.TRY_AGAIN, {"attempts": 3}, "failed", 3),
        (Then.FAIL, {}, "failed", 1),
        (Then.CANCELLED, {"status": "cancelling"}, "cancelled", 1),
        (Then.FAIL, {"status": "cancelling"}, "cancelled", 1),
        (Then.TRY_AGAIN, {"status": "cancelling"}, "cancelled", 1),
        (Then.CONTINUE, {"status": "cancelling"}, "cancelled", 1),
    ],
)
def test_an_end_leads_to_one_status(
    then: Then, fields: dict[str, Any], status: str, attempts: int, alice: Any, data_dir: Path
) -> None:
    task = end(alice, then, **fields)
    assert (task.status, task.attempts, task.lease_until) == (status, attempts, None)
    assert task.events.count() == 1
    if status == "failed":
        assert (task.next_step, task.log_tail) == ("Do this.", "the log")
        assert task.error.startswith("It happened.")


@pytest.mark.parametrize("change", [{"lease_epoch": 2}, {"lease_owner": "other"}, {"status": "queued"}])
def test_a_fenced_end_writes_nothing(change: dict[str, Any], alice: Any, data_dir: Path) -> None:
    task = make_task(alice, **{"status": "running", "lease_epoch": 1, "lease_owner": "me"} | change)
    run = Run.objects.create(task=task, epoch=1, host="h", boot_id="b")
    with pytest.raises(Fenced):
        write_end(Lease(task.pk, 1, "me"), Ending(then=Then.FAIL, text="No."), exit_code=1, log="")
    run.refresh_from_db()
    task.refresh_from_db()
    assert run.ended is None and task.status == change.get("status", "running") and not task.events.exists()
