"""A worker without Celery, in the test's own process: claims, supervises a real engine process, writes the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from django.db import connection

from training.models import TrainingTask
from training.worker.shutdown import Shutdown
from training.worker.supervisor import run_next


def run_once() -> bool:
    return run_next(Shutdown())


def run_all(limit: int = 6) -> int:
    """Like a worker whose bell is rung as long as there is work."""
    attempts = 0
    while attempts < limit and run_once():
        attempts += 1
    return attempts


def with_fault(settings: Any, fault: str, **more: str) -> None:
    settings.ENGINE_ENV = settings.ENGINE_ENV | {"STUB_FAULT": fault} | more


def meanwhile(action: Callable[[], Any]) -> threading.Thread:
    """Do it in another thread, with a database connection of its own."""

    def do() -> None:
        try:
            action()
        finally:
            connection.close()

    thread = threading.Thread(target=do)
    thread.start()
    return thread


def wait_for_step(task: TrainingTask, step: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if TrainingTask.objects.filter(pk=task.pk, step__gte=step).exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")
