"""result.json tells where the time went, all attempts together, however the last of them ended.

The clock is the test's: each line of events.jsonl takes a second, in the phase that is on when it is written.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import NewRun, RunFolder
from tests.engine.interruptions import LeaveAt
from training.contract import PHASES, Event, ExitCode
from training.engine import events, session
from training.engine.loop import Loop

IMPORTS = 7.0  # seconds on the test's clock


class Clock:
    """What events.py sees as the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    write, import_training = events.EventLog.write, session._import_training

    def write_for_a_second(self: events.EventLog, event: Event) -> None:
        write(self, event)
        clock.now += 1

    def import_slowly() -> Any:
        clock.now += IMPORTS
        return import_training()

    monkeypatch.setattr(events, "time", clock)
    monkeypatch.setattr(events.EventLog, "write", write_for_a_second)
    monkeypatch.setattr(session, "_import_training", import_slowly)
    return clock


def spent(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds in each phase by one attempt's lines."""
    seconds: dict[str, float] = collections.Counter({"starting": IMPORTS})
    phase = ""
    for line in lines:
        phase = line.get("phase", phase)
        seconds[phase] += 1
    return dict(seconds)


def added(*parts: dict[str, float]) -> dict[str, float]:
    return dict(sum((collections.Counter(part) for part in parts), collections.Counter()))  # type: ignore[arg-type]


def require_told(result: dict[str, Any], seconds: dict[str, float]) -> None:
    assert result["phase_seconds"] == seconds
    assert result["seconds"] == sum(seconds.values())


def kept(run: RunFolder, step: int) -> dict[str, float]:
    """In each phase up to a checkpoint, which tells the same sum."""
    state = json.loads((run.path / f"checkpoints/step-{step:06d}/state.json").read_text())
    assert state["seconds"] == sum(state["phase_seconds"].values())
    return dict(state["phase_seconds"])


def test_the_phases_add_up_to_the_whole_all_attempts_together(new_run: NewRun) -> None:
    run = new_run(max_steps=4)
    assert run.train() == 0
    first = run.events
    require_told(run.result, spent(first))
    assert set(run.result["phase_seconds"]) == set(PHASES) - {"watching"}
    saved = next(i for i, line in enumerate(first) if line["type"] == "checkpoint" and line["step"] == 4)
    assert kept(run, 4) == spent(first[:saved])
    assert run.train() == 0  # continued: nothing is left to do
    require_told(run.result, added(spent(first[:saved]), spent(run.events[len(first) :])))


def test_an_interrupted_attempt_and_a_failed_one_after_it_tell_all_of_the_time(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(max_steps=6, save_steps=50)
    assert run.train(LeaveAt(run, 2)) == ExitCode.INTERRUPTED
    require_told(run.result, spent(run.events))
    before, lines = kept(run, 2), len(run.events)
    step = Loop._step

    def broken(self: Loop) -> None:
        if self.state.step == 3:
            raise RuntimeError("broken")
        step(self)

    monkeypatch.setattr(Loop, "_step", broken)
    assert run.train() == 1
    assert run.result["status"] == "failed"
    require_told(run.result, added(before, spent(run.events[lines:])))


def test_a_run_that_is_refused_before_it_reads_its_data_tells_its_start(
    new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run(train_path=str(tmp_path / "nowhere.jsonl"))
    assert run.train() == ExitCode.REFUSED
    require_told(run.result, {"starting": 2.0})  # its phase and its sentence
