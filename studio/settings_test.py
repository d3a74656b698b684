"""Settings for pytest: a temporary data directory, fast password hashing, an in-memory channel layer."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Set, not defaulted: a test must never meet the folder that somebody works with.
os.environ["STUDIO_DATA_DIR"] = tempfile.mkdtemp(prefix="studio-test-")
atexit.register(shutil.rmtree, os.environ["STUDIO_DATA_DIR"], ignore_errors=True)
os.environ["STUDIO_REDIS_URL"] = "none"
os.environ["STUDIO_ENV_FILE"] = "none"  # a developer's own .env is no part of a test

from studio.settings import *  # noqa: E402, F403

PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
AXES_ENABLED = False
# A file, as in life: SQLite's in-memory database locks whole tables and would fail what runs at the same time.
if DATABASES["default"]["ENGINE"].endswith("sqlite3"):  # noqa: F405
    DATABASES["default"]["TEST"] = {"NAME": os.path.join(os.environ["STUDIO_DATA_DIR"], "test.sqlite3")}  # noqa: F405, PTH118
