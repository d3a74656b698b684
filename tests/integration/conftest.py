"""Fixtures of the integration tests: a box per test, its database made once per session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import call_command

from tests.integration.box import TIMES, Box, checkpointed, own_database, point_settings
from tests.needs import need_broker
from tests.training.making import make_task
from training.models import TrainingTask


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory, django_db_blocker: Any) -> Path:
    """A migrated SQLite file, with one person, to be copied."""
    folder = tmp_path_factory.mktemp("template")
    with django_db_blocker.unblock(), own_database(folder / "work.sqlite3"):
        call_command("migrate", verbosity=0)
        get_user_model().objects.create_user("alice", password="correct horse battery")
    checkpointed(folder / "work.sqlite3", folder / "empty.sqlite3")
    return folder / "empty.sqlite3"


@pytest.fixture
def make_box(
    empty_database: Path, django_db_blocker: Any, settings: Any, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Box]]:
    boxes: list[Box] = []
    contexts: list[Any] = []

    def make(*, broker: bool = True) -> Box:
        if broker:
            need_broker()
        box = Box(empty_database, broker=broker)
        boxes.append(box)
        point_settings(box.data, settings)
        context = own_database(box.data / "studio.sqlite3")
        context.__enter__()
        contexts.append(context)
        return box

    with django_db_blocker.unblock():
        yield make
        for box in boxes:
            box.close()
        for context in reversed(contexts):
            context.__exit__(None, None, None)


@pytest.fixture
def box(make_box: Callable[..., Box]) -> Box:
    return make_box()


@pytest.fixture
def person(box: Box) -> Any:
    return get_user_model().objects.get(username="alice")


@pytest.fixture
def own_box(make_box: Callable[..., Box], settings: Any) -> Box:
    """No worker process: the test's own process does the work, see `tests.integration.in_process`."""
    box = make_box(broker=False)
    settings.ENGINE_COMMAND = [
        sys.executable,
        str(settings.BASE_DIR / "tests" / "stub_engine.py"),
    ]
    settings.WORKER_TIMES = TIMES
    settings.ENGINE_ENV = {"STUB_STEPS": "12", "STUB_STEP_SECONDS": "0.005", "STUB_TRAIL": str(box.trail)}
    return box


@pytest.fixture
def task(own_box: Box) -> TrainingTask:
    return make_task(get_user_model().objects.get(username="alice"))
