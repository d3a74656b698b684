"""Settings of the worker processes that tests start: the stub engine, and times short enough to wait for."""

from __future__ import annotations

import json
import os

from studio.settings import *  # noqa: F403
from studio.settings import BASE_DIR, ENGINE_COMMAND, sys

if os.environ.get("TEST_REAL_ENGINE") != "1":
    ENGINE_COMMAND = [sys.executable, str(BASE_DIR / "tests" / "stub_engine.py")]
ENGINE_ENV = {name: value for name, value in os.environ.items() if name.startswith("STUB_")}
WORKER_TIMES = json.loads(os.environ.get("TEST_WORKER_TIMES", "{}"))
