"""From an exception to what a person reads: one sentence, what to do next, the exit code. No torch."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

from training.contract import ExitCode, RunConfig
from training.run_checks import ConfigError
from training.shown_paths import seen_from

CRASH = 1  # the exit code of what was not understood


class EngineError(Exception):
    """An end of the run that was understood. The sentence and the next step are for the person."""

    exit_code: int = ExitCode.REFUSED

    def __init__(self, sentence: str, next_step: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.next_step = next_step


class RefusedError(EngineError):
    """The input cannot work, now or on another try."""


class DivergedError(EngineError):
    """Loss or gradient was not finite several updates in a row."""

    exit_code = ExitCode.DIVERGED


class InterruptedRunError(EngineError):
    """SIGTERM: what could be saved is saved, and the run can go on from there."""

    exit_code = ExitCode.INTERRUPTED


class PeerFailedError(EngineError):
    """Another rank of this run ended with this sentence; this one ends with it."""

    def __init__(self, sentence: str, next_step: str, *, exit_code: int) -> None:
        super().__init__(sentence, next_step)
        self.exit_code = exit_code


class PeerLostError(EngineError):
    """Another rank is gone: it said why itself, or was killed."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class Explanation:
    sentence: str
    next_step: str
    exit_code: int

    def seen_from(self, run_dir: Path) -> Explanation:
        """The same with paths inside `run_dir` as they are called there; others stay whole."""
        sentence, next_step = (seen_from(run_dir, text) for text in (self.sentence, self.next_step))
        return dataclasses.replace(self, sentence=sentence, next_step=next_step)

    @property
    def line(self) -> str:
        """For a terminal."""
        return f"{self.sentence} {self.next_step}".strip() + "\n"


def is_disk_full(error: BaseException) -> bool:
    """safetensors reports ENOSPC as text in an error of its own."""
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return True
    return any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


def is_file_too_large(error: BaseException) -> bool:
    """A limit on the size of a file: of the account (`ulimit -f`) or of the file system."""
    return (isinstance(error, OSError) and error.errno == errno.EFBIG) or "File too large" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has its own exception class; the CPU allocator raises a plain RuntimeError."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in text
        or "CUDA out of memory" in text
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
    )


def explain(error: BaseException, config: RunConfig | None) -> Explanation:
    """What happened, in words. Anything not known here is a crash: exit code 1 and a look at the log."""
    if isinstance(error, EngineError):
        return Explanation(error.sentence, error.next_step, int(error.exit_code))
    if isinstance(error, ConfigError):
        return Explanation(str(error), "Correct the setting and start the task again.", int(ExitCode.REFUSED))
    if is_disk_full(error):
        return Explanation(
            "The disk is full.",
            "Free some space and retry the task: it goes on from its last checkpoint.",
            int(ExitCode.DISK_FULL),
        )
    if is_file_too_large(error):
        return Explanation(
            "A file would be larger than this account or disk allows.",
            "Raise the limit (ulimit -f), or put the data directory on another disk, and retry the task: it goes on "
            "from its last checkpoint.",
            int(ExitCode.DISK_FULL),
        )
    if is_out_of_memory(error):
        return _explain_out_of_memory(config)
    return Explanation(
        f"The engine stopped on an unexpected {type(error).__name__}.",
        "The last lines of the log say where; retrying goes on from the last checkpoint.",
        CRASH,
    )


def _explain_out_of_memory(config: RunConfig | None) -> Explanation:
    if config is None:
        return Explanation("Out of memory.", "Close other programs and retry.", int(ExitCode.OUT_OF_MEMORY))
    batch, length = config.per_device_train_batch_size, config.max_length
    tries = [f"max_context_length {max(128, length * 3 // 4)}"]
    if batch > 1:
        tries.insert(0, f"batch_size {batch // 2} with twice the gradient_accumulation_steps")
    return Explanation(
        f"Out of memory at batch size {batch} × {length} tokens.",
        f"Try {' or '.join(tries)}, or a smaller base model.",
        int(ExitCode.OUT_OF_MEMORY),
    )
