"""A task's history: sentences with a `seq`, taken in the transaction that writes them.

`seq` is one counter per task for points and sentences alike: a page asks for "after 41" and misses nothing.
"""

from __future__ import annotations

import time
import uuid
from typing import Literal

from django.db import transaction
from django.db.models import F

from training.models import TaskEvent, TrainingTask

Source = Literal["engine", "worker", "person"]
Level = Literal["info", "warning", "error"]


def event_add(
    task_id: uuid.UUID | str, text: str, *, source: Source, level: Level = "info", at: float | None = None
) -> int:
    """Add one sentence; its seq, or 0 when the task is gone."""
    with transaction.atomic():
        # The update locks the row to the end of the transaction: nobody else gets this seq.
        if TrainingTask.objects.filter(pk=task_id).update(last_seq=F("last_seq") + 1) != 1:
            return 0
        seq: int = TrainingTask.objects.values_list("last_seq", flat=True).get(pk=task_id)
        TaskEvent.objects.create(
            task_id=task_id,
            seq=seq,
            time=time.time() if at is None else at,
            level=level,
            source=source,
            text=text,
        )
    return seq
