"""What the engine says while it runs: one flushed JSON line an event, library logs in engine.log."""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO, cast

from training.contract import EVENTS_FILE, LOG_FILE, PHASES, Event, PlanEvent, Split

LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PHASE_INTERVAL = 0.5  # seconds between two phase events of the same phase

logger = logging.getLogger(__name__)


def finite(value: float | None) -> float | None:
    """JSON has no NaN: what is not a finite number is null."""
    if value is None:
        return None
    return float(value) if math.isfinite(value) else None


class EventLog:
    """Appends to `events.jsonl`. A line is complete or, after a crash, the last one and cut short."""

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / EVENTS_FILE
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")
        self._start()

    def _start(self) -> None:
        self._phase = ""
        self._phase_time = 0.0  # of the last phase event
        self._started = time.monotonic()
        self._since = self._started  # of the phase's begin, as far as it is not in `_spent`
        self._spent: dict[str, float] = {}
        self._seconds_before = 0.0
        self._spent_before: Mapping[str, float] = {}

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, event: Event) -> None:
        self._file.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def phase(self, phase: str, *, done: int = 0, total: int = 0, unit: str = "") -> None:
        """Progress within one phase is said at most twice a second; its start and its end always."""
        now = time.time()
        same = phase == self._phase
        if same and done != total and now - self._phase_time < PHASE_INTERVAL:
            return
        if not same:
            self._spend(phase)
        self._phase, self._phase_time = phase, now
        if not same:
            logger.info("phase %s", phase)
        self.write({"type": "phase", "time": now, "phase": phase, "done": done, "total": total, "unit": unit})

    def add_earlier(self, seconds: float, phase_seconds: Mapping[str, float]) -> None:
        """What the attempts that this one continues spent, all phases together and in each: counted from now on."""
        self._seconds_before, self._spent_before = seconds, phase_seconds

    def phase_seconds(self) -> dict[str, float]:
        """Wall time in each phase so far, with what earlier attempts spent in it."""
        self._spend(self._phase)
        before = self._spent_before
        return {
            phase: round(before.get(phase, 0.0) + self._spent.get(phase, 0.0), 3)
            for phase in PHASES
            if phase in before or phase in self._spent
        }

    def seconds(self) -> float:
        """Wall time of the attempt so far, all phases together, with that of earlier attempts."""
        return round(self._seconds_before + time.monotonic() - self._started, 3)

    def _spend(self, next_phase: str) -> None:
        now, phase = time.monotonic(), self._phase or next_phase  # what precedes the first phase is its own
        self._spent[phase] = self._spent.get(phase, 0.0) + now - self._since
        self._since = now
        self._phase = next_phase

    def plan(self, **facts: Any) -> None:
        event: PlanEvent = {"type": "plan", "time": time.time(), **facts}  # type: ignore[typeddict-item]
        self.write(event)

    def metrics(self, split: Split, step: int, values: Mapping[str, float | None]) -> None:
        clean = {key: finite(value) for key, value in values.items()}
        self.write({"type": "metrics", "time": time.time(), "split": split, "step": step, "values": clean})

    def checkpoint(self, step: int, path: str) -> None:
        self.write({"type": "checkpoint", "time": time.time(), "step": step, "path": path})

    def watch(self, step: int, model: Literal["policy", "reference"], path: str, num_prompts: int) -> None:
        self.write(
            {"type": "watch", "time": time.time(), "step": step, "model": model, "path": path,
             "num_prompts": num_prompts}
        )  # fmt: skip

    def log(self, text: str, level: Literal["info", "warning", "error"] = "info") -> None:
        logger.log(logging.getLevelNamesMapping()[level.upper()], text)
        self.write({"type": "log", "time": time.time(), "level": level, "text": text})


class LoggedEvents(EventLog):
    """For commands beside a run: its events.jsonl is left alone, sentences go to the log only."""

    def __init__(self) -> None:
        self._start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def write(self, event: Event) -> None:
        pass


class QuietEvents(LoggedEvents):
    """Of a rank that is not the first: all of them see the same, and one of them says it."""

    def log(self, text: str, level: Literal["info", "warning", "error"] = "info") -> None:
        pass


def open_events(run_dir: Path, *, rank: int = 0) -> EventLog:
    return QuietEvents() if rank else EventLog(run_dir)


def log_handler(run_dir: Path, *, rank: int = 0) -> logging.FileHandler:
    """Lines for engine.log, not yet added to a logger.

    Of the ranks after the first only warnings: the rest would be the first one's lines again.
    """
    handler = logging.FileHandler(run_dir / LOG_FILE, encoding="utf-8")
    handler.setFormatter(
        logging.Formatter(LINE.replace("%(name)s", f"rank {rank} %(name)s") if rank else LINE)
    )
    if rank:
        handler.setLevel(logging.WARNING)
    return handler


def open_log(run_dir: Path, *, rank: int = 0) -> TextIO:
    """Every logger's lines, Python warnings and the stacks of a crash go to engine.log. Returns it."""
    handler = log_handler(run_dir, rank=rank)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    if sys.stderr.isatty():
        terminal = logging.StreamHandler()
        terminal.setFormatter(logging.Formatter(LINE))
        root.addHandler(terminal)
    for noisy in ("httpx", "urllib3", "fsspec", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    stream = cast(TextIO, handler.stream)
    faulthandler.enable(file=stream, all_threads=True)
    return stream
