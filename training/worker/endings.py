"""Why an attempt ended and what follows: a sentence with a next step, and whether to try again. Pure."""

from __future__ import annotations

import dataclasses
import enum
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.contract import ExitCode
from training.shown_paths import seen_from

MEMORY_ADVICE = (
    "Choose a smaller batch_size or max_context_length, a lower lora_rank, or a smaller base model; "
    "raise gradient_accumulation_steps to keep the effective batch."
)
LOG_ADVICE = "Look at the end of the log below. Retry continues from the last checkpoint."


class Asked(enum.Enum):
    """What this supervisor did to the engine before it ended."""

    NOTHING = "nothing"
    CANCEL = "cancel"
    INTERRUPT = "interrupt"  # the worker shuts down: continue later
    HANG = "hang"  # killed because it made no progress


class Then(enum.Enum):
    DONE = "done"  # keep the model
    FAIL = "fail"
    TRY_AGAIN = "try again"  # counts as an attempt
    CONTINUE = "continue"  # interrupted by us: does not count
    CANCELLED = "cancelled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    then: Then
    text: str  # what happened, one sentence
    next_step: str = ""
    with_log: bool = False

    def seen_from(self, folder: Path) -> Ending:
        """The same with paths inside `folder` relative to it: who reads a task's page may not know the server."""
        text, next_step = (seen_from(folder, words) for words in (self.text, self.next_step))
        return dataclasses.replace(self, text=text, next_step=next_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What is known when the engine has ended."""

    exit_code: int
    result: Mapping[str, Any] | None
    asked: Asked
    memory_retries: int  # attempts of this task that ended out of memory and were tried again smaller
    micro_batch: int
    oom_killed: bool  # the kernel says that it killed a process of this control group for memory


def judge(found: Circumstances) -> Ending:
    status = (found.result or {}).get("status")
    if found.asked is Asked.CANCEL:
        return Ending(then=Then.CANCELLED, text="Cancelled.")
    if status in ("succeeded", "stopped"):  # written last: what went wrong after it took nothing away
        return Ending(then=Then.DONE, text="The run ended and kept its model.")
    if found.asked is Asked.INTERRUPT:
        return Ending(then=Then.CONTINUE, text="The worker was shut down.")
    if found.asked is Asked.HANG:
        return Ending(
            then=Then.TRY_AGAIN,
            text="The run made no progress for a long time and was ended.",
            next_step="Look at the stacks at the end of the log below; a disk or a GPU may not answer.",
            with_log=True,
        )
    known = _BY_CODE.get(found.exit_code)
    return known(found) if known else _crash(found)


def _refused(found: Circumstances) -> Ending:
    result = found.result or {}
    return Ending(
        then=Then.FAIL,
        text=str(result.get("error") or "The engine refused the input of this run."),
        next_step=str(
            result.get("next_step") or "Look at the end of the log below, then duplicate the task."
        ),
        with_log=True,
    )


def _out_of_memory(found: Circumstances) -> Ending:
    said = str((found.result or {}).get("error") or "The device ran out of memory.")
    advice = str((found.result or {}).get("next_step") or MEMORY_ADVICE)
    if found.memory_retries == 0 and found.micro_batch > 1:
        return Ending(then=Then.TRY_AGAIN, text=said, next_step=advice, with_log=True)
    return Ending(then=Then.FAIL, text=said, next_step=advice, with_log=True)


def _diverged(found: Circumstances) -> Ending:
    said = str((found.result or {}).get("error") or "The loss became NaN or infinite three updates in a row.")
    advice = "Duplicate the task with a lower learning_rate, and look for odd pairs in the data."
    return Ending(
        then=Then.FAIL,
        text=said,
        next_step=str((found.result or {}).get("next_step") or advice),
        with_log=True,
    )


def _disk_full(found: Circumstances) -> Ending:
    return Ending(
        then=Then.FAIL,
        text=str((found.result or {}).get("error") or "The disk is full, so nothing more could be saved."),
        next_step="Delete old tasks or models for space, then Retry: it continues from the last checkpoint.",
        with_log=True,
    )


def _interrupted(_found: Circumstances) -> Ending:
    return Ending(then=Then.TRY_AGAIN, text="The engine was asked to end by somebody else on this machine.")


def _unfinished(_found: Circumstances) -> Ending:
    return Ending(
        then=Then.TRY_AGAIN,
        text="The engine ended without saying how the run went.",
        next_step=LOG_ADVICE,
        with_log=True,
    )


def _crash(found: Circumstances) -> Ending:
    if found.exit_code == -signal.SIGKILL:
        if found.oom_killed:
            text = "The system killed the run because the machine's memory was full."
        else:
            text = "The run was killed from outside, probably because the machine's memory was full."
        return Ending(then=Then.TRY_AGAIN, text=text, next_step=MEMORY_ADVICE, with_log=True)
    if found.exit_code < 0:
        try:
            name = signal.Signals(-found.exit_code).name
        except ValueError:
            name = f"signal {-found.exit_code}"
        text = f"The engine crashed ({name})."
    else:
        text = f"The engine crashed (exit code {found.exit_code})."
    said = (found.result or {}).get("error")
    return Ending(
        then=Then.TRY_AGAIN, text=f"{text} {said}" if said else text, next_step=LOG_ADVICE, with_log=True
    )


_BY_CODE = {
    int(ExitCode.OK): _unfinished,
    int(ExitCode.REFUSED): _refused,
    int(ExitCode.OUT_OF_MEMORY): _out_of_memory,
    int(ExitCode.DIVERGED): _diverged,
    int(ExitCode.DISK_FULL): _disk_full,
    int(ExitCode.INTERRUPTED): _interrupted,
}
