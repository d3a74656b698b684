"""What an engine call changes in the process around it, and how that is put back. For the Python face."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.engine.events import log_handler
from training.engine.interrupts import Interrupts


@contextlib.contextmanager
def borrowed_process(run_dir: Path | None = None) -> Iterator[None]:
    """Log lines go to the run's engine.log, torch is deterministic; at the end all is as it was."""
    with contextlib.ExitStack() as stack:
        if run_dir is not None:
            stack.enter_context(_logging_to(run_dir))
        stack.enter_context(_torch_as_before())
        stack.enter_context(_transformers_as_before())
        stack.enter_context(_accelerate_as_before())
        yield


@contextlib.contextmanager
def without_peft_s_old_name() -> Iterator[None]:
    """peft, when it wraps a model, asks transformers for a property by its former name: nothing that a person of
    this studio could do anything about, said on the error stream of every command. Only that sentence is left out.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextlib.contextmanager
def signals_to(interrupts: Interrupts) -> Iterator[None]:
    """Ctrl-C and SIGTERM finish the step. Python sets handlers in the main thread only; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, interrupts.terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python, which cannot be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _logging_to(run_dir: Path) -> Iterator[None]:
    root = logging.getLogger()
    level, handler = root.level, log_handler(run_dir)
    root.addHandler(handler)
    root.setLevel(min(level, logging.INFO))
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


@contextlib.contextmanager
def _torch_as_before() -> Iterator[None]:
    import torch

    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextlib.contextmanager
def _transformers_as_before() -> Iterator[None]:
    import transformers

    library: Any = transformers.logging
    root = library.get_logger("transformers")
    before = root.propagate, list(root.handlers), root.level
    bars = library.is_progress_bar_enabled()
    try:
        yield
    finally:
        root.propagate, root.handlers, level = before
        root.setLevel(level)
        if bars:
            library.enable_progress_bar()


@contextlib.contextmanager
def _accelerate_as_before() -> Iterator[None]:
    """Its state is one for the process: left behind, it would decide the device of the caller's own Accelerator."""
    from accelerate.state import AcceleratorState, PartialState

    known = bool(AcceleratorState._shared_state), bool(PartialState._shared_state)
    try:
        yield
    finally:
        if not known[0]:
            AcceleratorState._reset_state(reset_partial_state=not known[1])
