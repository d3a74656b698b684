"""One run from its start to its exit code: log, signals, result.json. The training itself is training_run.py."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from training.contract import RESULT_FILE, ExitCode, Result, RunConfig, write_atomically
from training.engine import launch
from training.engine.ended_run import note_on_ended
from training.engine.errors import (
    CRASH,
    EngineError,
    Explanation,
    InterruptedRunError,
    PeerLostError,
    explain,
)
from training.engine.events import EventLog, open_events, open_log
from training.engine.file_hashes import begin_hashing
from training.engine.interrupts import Interrupts
from training.engine.preflight import check_config

logger = logging.getLogger(__name__)


def main(run_dir: Path) -> int:
    """The `train` subcommand."""
    run_dir = run_dir.absolute()
    try:
        note = note_on_ended(run_dir)
    except EngineError as error:  # the finished run's own files stay as they are
        return _say(explain(error, None))
    if note:
        if launch.rank() == 0:
            sys.stdout.write(f"{note}\n")
        return ExitCode.OK
    count = launch.ranks_to_start(run_dir)
    if count > 1:
        return launch.launch(["train", str(run_dir)], count=count)
    launch.die_with_parent()
    stream = open_log(run_dir, rank=launch.rank())
    interrupts = Interrupts(run_dir)
    interrupts.install(stream)
    with open_events(run_dir, rank=launch.rank()) as events:
        return run(run_dir, events=events, interrupts=interrupts)


def _say(explanation: Explanation) -> int:
    if launch.rank() == 0:
        sys.stderr.write(explanation.line)
    return explanation.exit_code


def run(run_dir: Path, *, events: EventLog, interrupts: Interrupts) -> int:
    """Train and write result.json; every end is told there in words, a bad one on stderr too. Gives the exit code."""
    explanation, _ = _attempt(run_dir, events, interrupts)
    return ExitCode.OK if explanation is None else _say(explanation)


def run_or_raise(run_dir: Path, *, events: EventLog, interrupts: Interrupts) -> None:
    """The same for Python: what was understood is an `EngineError`, anything else what it was."""
    explanation, error = _attempt(run_dir, events, interrupts)
    if explanation is None or error is None:
        return
    if isinstance(error, EngineError) or explanation.exit_code == CRASH:
        raise error
    understood = EngineError(explanation.sentence, explanation.next_step)
    understood.exit_code = ExitCode(explanation.exit_code)
    raise understood from error


def _import_training() -> Callable[..., Result]:
    """With the collector off: it would look a dozen times through modules that are there to stay."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        import transformers.models.auto.modeling_auto  # noqa: F401 - the slow ones, which load_policy needs

        from training.engine.training_run import train
    finally:
        if collecting:
            gc.enable()
    return train


def _attempt(
    run_dir: Path, events: EventLog, interrupts: Interrupts
) -> tuple[Explanation | None, Exception | None]:
    config: RunConfig | None = None
    if launch.rank() == 0:
        (run_dir / RESULT_FILE).unlink(missing_ok=True)
    try:
        events.phase("starting")
        config = RunConfig.load(run_dir)
        check_config(config)
        interrupts.check()
        begin_hashing(sorted(Path(config.model_path).glob("*.safetensors")))
        train = _import_training()  # torch from here on
        result = train(config, run_dir, events=events, interrupts=interrupts)
        if launch.rank() == 0:
            _write_result(run_dir, result)
        return None, None
    except Exception as error:
        return _failed(error, config, run_dir, events), error


def _failed(error: Exception, config: RunConfig | None, run_dir: Path, events: EventLog) -> Explanation:
    explanation = explain(error, config).seen_from(run_dir)
    interrupted = isinstance(error, InterruptedRunError)
    logger.log(logging.INFO if interrupted else logging.ERROR, explanation.sentence, exc_info=error)
    result: Result = {
        "status": "interrupted" if interrupted else "failed",
        "error": explanation.sentence,
        "next_step": explanation.next_step,
    }
    if config is not None:
        result["config"] = dataclasses.asdict(config)
    with contextlib.suppress(OSError):  # a full disk must not hide the exit code
        # A rank that only lost another leaves that one's own words.
        if not (isinstance(error, PeerLostError) and (run_dir / RESULT_FILE).exists()):
            events.log(explanation.sentence, "info" if interrupted else "error")
            result["seconds"], result["phase_seconds"] = events.seconds(), events.phase_seconds()
            _write_result(run_dir, result)
    return explanation


def _write_result(run_dir: Path, result: Result) -> None:
    write_atomically(run_dir / RESULT_FILE, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))
