"""Files that a run leaves at a step (`pairs/step-000040.parquet`), and which of them a resumed run keeps."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from training.contract import PAIRS_DIR, WATCH_DIR, checkpoint_name
from training.engine.checkpoints import link_or_copy
from training.reference_cache import TEMPORARY


def step_path(folder: Path, step: int, suffix: str) -> Path:
    return folder / f"{checkpoint_name(step)}{suffix}"


def write_durably(path: Path, content: bytes) -> None:
    """Beside, flushed, renamed; the folder is made when it is not there.

    The name beside is nobody else's: other runs may write the same file into a shared folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def continue_files(run_dir: Path, source: Path, step: int) -> None:
    """Leave what steps 0 to `step` wrote; `source` is the run directory that the checkpoint comes from.

    What is later is written again by the steps that are done again, and is the same.
    """
    for name in (PAIRS_DIR, WATCH_DIR):
        folder = run_dir / name
        if step < 0:
            shutil.rmtree(folder, ignore_errors=True)
        if source != run_dir:
            shutil.rmtree(folder, ignore_errors=True)
            if (source / name).is_dir():
                shutil.copytree(
                    source / name, folder, copy_function=link_or_copy, ignore=shutil.ignore_patterns(".*")
                )
        for path in folder.glob("step-*"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()
