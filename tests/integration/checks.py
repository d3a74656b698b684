"""What must be true of every task, however its run went."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from training.models import TrainingTask


def assert_every_step_once(task: TrainingTask, steps: int) -> None:
    """No gap and no double, in order of `seq`; and `seq` itself has no gap."""
    points = list(task.points.filter(split="train").order_by("seq").values_list("step", flat=True))
    assert points == list(range(1, steps + 1))
    seqs = sorted([*task.points.values_list("seq", flat=True), *task.events.values_list("seq", flat=True)])
    task.refresh_from_db()
    assert seqs == list(range(1, task.last_seq + 1))


def texts(task: TrainingTask) -> list[str]:
    return list(task.events.order_by("seq").values_list("text", flat=True))


def assert_never_two_at_once(trail: Path) -> None:
    """From the engines' own notes, on one clock: no two attempts of a task were stepping at the same time."""
    spans: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for line in trail.read_text().splitlines():
        run_id, _, _, moment = line.split()
        task, attempt = run_id.split("/")
        spans[task].setdefault(attempt, []).append(int(moment))
    for attempts in spans.values():
        ordered = sorted((min(moments), max(moments), attempt) for attempt, moments in attempts.items())
        for (_, end, first), (begin, _, second) in pairwise(ordered):
            assert end <= begin, f"{first} and {second} were stepping at the same time"
