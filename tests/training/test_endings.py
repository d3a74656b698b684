"""Why a run ended, told apart, each with a sentence and a next step; and how long a quiet run may be quiet."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from training.contract import ExitCode
from training.worker import probe
from training.worker.endings import Asked, Circumstances, Then, judge
from training.worker.prepare import smaller_batch
from training.worker.progress import ProgressWatch
from training.worker.timing import Times


def found(exit_code: int, **fields: Any) -> Circumstances:
    values: dict[str, Any] = {
        "result": None, "asked": Asked.NOTHING, "memory_retries": 0, "micro_batch": 2, "oom_killed": False,
    }  # fmt: skip
    return Circumstances(exit_code=exit_code, **values | fields)


def test_an_ending_calls_what_lies_in_the_data_folder_as_it_is_called_there() -> None:
    result = {
        "error": "/srv/data/models/a is damaged, /mnt/srv/data/b is not.",
        "next_step": "See /srv/data/c.",
    }
    ending = judge(found(ExitCode.REFUSED, result=result)).seen_from(Path("/srv/data"))
    assert ending.text == "models/a is damaged, /mnt/srv/data/b is not."
    assert ending.next_step == "See c."


@pytest.mark.parametrize(
    ("circumstances", "then", "words"),
    [
        (found(0, result={"status": "succeeded"}), Then.DONE, ""),
        (found(0, result={"status": "stopped"}), Then.DONE, ""),
        (found(-11, result={"status": "succeeded"}), Then.DONE, ""),
        (found(0), Then.TRY_AGAIN, "without saying how the run went"),
        (found(0, result={"status": "failed"}), Then.TRY_AGAIN, "without saying"),
        (found(ExitCode.REFUSED), Then.FAIL, "refused"),
        (found(ExitCode.REFUSED, result={"error": "No tokenizer."}), Then.FAIL, "No tokenizer."),
        (found(ExitCode.OUT_OF_MEMORY), Then.TRY_AGAIN, "out of memory"),
        (found(ExitCode.OUT_OF_MEMORY, memory_retries=1), Then.FAIL, "out of memory"),
        (found(ExitCode.OUT_OF_MEMORY, micro_batch=1), Then.FAIL, "out of memory"),
        (found(ExitCode.DIVERGED), Then.FAIL, "NaN"),
        (found(ExitCode.DISK_FULL), Then.FAIL, "disk is full"),
        (found(ExitCode.INTERRUPTED), Then.TRY_AGAIN, "somebody else"),
        (found(ExitCode.INTERRUPTED, asked=Asked.INTERRUPT), Then.CONTINUE, "shut down"),
        (found(-9, asked=Asked.INTERRUPT), Then.CONTINUE, "shut down"),
        (found(-9, asked=Asked.CANCEL), Then.CANCELLED, "Cancelled"),
        (found(0, result={"status": "succeeded"}, asked=Asked.CANCEL), Then.CANCELLED, "Cancelled"),
        (found(-9, asked=Asked.HANG), Then.TRY_AGAIN, "no progress"),
        (found(-9), Then.TRY_AGAIN, "probably because the machine's memory"),
        (found(-9, oom_killed=True), Then.TRY_AGAIN, "The system killed the run because"),
        (found(-int(signal.SIGSEGV)), Then.TRY_AGAIN, "SIGSEGV"),
        (found(-99), Then.TRY_AGAIN, "signal 99"),
        (found(1), Then.TRY_AGAIN, "exit code 1"),
        (found(1, result={"error": "KeyError."}), Then.TRY_AGAIN, "KeyError."),
    ],
)
def test_every_end_is_told_apart(circumstances: Circumstances, then: Then, words: str) -> None:
    ending = judge(circumstances)
    assert ending.then is then and words in ending.text
    if then is Then.FAIL or ending.with_log:
        assert ending.next_step.endswith(".")


@pytest.mark.parametrize(
    ("batch", "accumulation", "smaller"),
    [(2, 8, (1, 16)), (6, 4, (3, 8)), (9, 1, (3, 3)), (7, 2, (1, 14)), (1, 5, (1, 5))],
)
def test_a_smaller_batch_keeps_the_effective_one(
    batch: int, accumulation: int, smaller: tuple[int, int]
) -> None:
    assert smaller_batch(batch, accumulation) == smaller
    assert smaller[0] * smaller[1] == batch * accumulation


def test_long_steps_are_not_taken_for_a_hang() -> None:
    watch = ProgressWatch(Times(), now=0.0)
    assert not watch.stalled(1500) and watch.stalled(1801), "a large model may load for half an hour"
    for step in range(10):
        watch.event(2000.0 + 300 * step, is_step=True)
    last = 2000.0 + 300 * 9
    assert not watch.stalled(last + 2999) and watch.stalled(last + 3001), "ten median steps"


def test_the_second_step_of_a_slow_run_is_given_as_long_as_its_first_took() -> None:
    """A large model on a CPU: one step is longer than the floor, and nothing is wrong with it."""
    watch = ProgressWatch(Times(), now=0.0)
    watch.event(100.0, is_step=False)  # "training, step 0"
    watch.event(1000.0, is_step=True)
    assert not watch.stalled(1000.0 + 8999) and watch.stalled(1000.0 + 9001)


def test_short_steps_are_given_ten_minutes_and_frozen_time_is_none() -> None:
    watch = ProgressWatch(Times(), now=0.0)
    for step in range(10):
        watch.event(float(step), is_step=True)
    assert not watch.stalled(600) and watch.stalled(610)
    watch.pause(5000.0)
    assert not watch.stalled(5001.0)


NVIDIA = "GPU-aaa, NVIDIA H200, 143771\nGPU-bbb, NVIDIA H200, 143771\nnonsense\nGPU-ccc, X, [N/A]\n"


def test_what_nvidia_smi_says_is_read_and_narrowed() -> None:
    cards = probe.parse(NVIDIA)
    assert [card["uuid"] for card in cards] == ["GPU-aaa", "GPU-bbb"]
    assert cards[0]["memory_bytes"] == 143771 * 1024 * 1024
    assert probe.visible(cards, None) == cards
    assert probe.visible(cards, "1") == [cards[1]]
    assert probe.visible(cards, "GPU-a,7") == [cards[0]]
    assert probe.visible(cards, "") == []


def test_a_machine_without_nvidia_smi_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert probe.gpus() == []
    assert probe.ram_bytes() > 10**8
