""".env.example is the list of settings: complete, with the real defaults, and a valid file when uncommented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from studio import env, settings

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"^#((?:STUDIO_|DATABASE_)\w+)=(\S*)", re.MULTILINE)
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
SECRETS = {"DATABASE_URL", "STUDIO_REDIS_URL", "STUDIO_SECRET_KEY"}


def test_it_lists_exactly_the_settings_that_are_read() -> None:
    listed = [name for name, _ in LINE.findall(EXAMPLE)]
    read = {name for name in env.known() if not name.endswith("_FILE") or name == "STUDIO_ENV_FILE"}
    assert sorted(listed) == sorted(read)


def test_secrets_and_only_they_are_marked_as_such() -> None:
    marked = {line.split("=")[0].lstrip("#") for line in EXAMPLE.splitlines() if re.search(r"#\s+\* ", line)}
    assert marked == SECRETS
    assert {f"{name}_FILE" for name in SECRETS} <= env.known()


def test_its_values_are_the_defaults(tmp_path: Path) -> None:
    """A start with the file, every line uncommented as it stands, has the settings of a start without it."""
    file = tmp_path / "settings.env"
    file.write_text(re.sub(r"^#(?=STUDIO_|DATABASE_)", "", EXAMPLE, flags=re.MULTILINE), encoding="utf-8")
    names = "HOST PORT HTTPS DEBUG ALLOWED_HOSTS GPU_SLOTS UPLOAD_MAX_BYTES CHAT_IDLE_SECONDS REDIS_URL LOG_LEVEL "
    names += (
        "HUB_OFFLINE STARTER_MODEL TRUSTED_PROXIES MODEL_ROOTS DATA_DIR DATABASE_URL WORKER_NAME SECRET_KEY"
    )
    code = f"from studio import settings as s; print([str(getattr(s, n)) for n in {names.split()!r}])"
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("STUDIO_", "DATABASE_"))}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=plain | {"STUDIO_ENV_FILE": env_file},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for env_file in ("none", str(file))
    ]
    assert outputs[0] == outputs[1]
    assert settings.VERSION
