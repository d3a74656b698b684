"""What a run starts from beside its base model: a finished adapter, or a checkpoint of an earlier run.

Reads and checks the files; puts nothing on a model. A checkpoint of an adapter's run holds the adapter's
settings beside its weights, one of full fine-tuning the weights of the whole model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from training.contract import CHECKPOINT_FILES, MANIFEST_FILE, read_manifest, verify_checkpoint
from training.engine.errors import RefusedError
from training.engine.file_hashes import known_sha256

ADAPTER_WEIGHTS, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
# Which base an adapter belongs to, beside it. Not in the header of its weights: safetensors writes the keys there
# in any order, and equal adapters would have other hashes.
BASE_FILE = "base_model.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """Weights to start from (or to compare with), and what they were trained on."""

    folder: Path
    weights_path: Path
    settings: dict[str, Any] | None  # peft's; None for the weights of a whole model
    base_sha256: str = ""  # "" where nobody wrote it down
    is_checkpoint: bool = False

    @property
    def is_adapter(self) -> bool:
        return self.settings is not None

    @property
    def sha256(self) -> str:
        """Of what decides the numbers: weights and settings."""
        paths = [self.weights_path, self.folder / ADAPTER_SETTINGS]
        return files_sha256([path for path in paths if path.is_file()])

    def tensors(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.weights_path)

    def tensor_names(self) -> set[str]:
        from safetensors import safe_open

        with safe_open(self.weights_path, framework="pt") as file:
            return set(file.keys())


def open_starting_point(path: str) -> StartingPoint | None:
    """None for "". Raises `RefusedError` where the folder is nothing to start from, or is damaged."""
    if not path:
        return None
    folder = Path(path)
    try:
        if (folder / MANIFEST_FILE).is_file():
            return _checkpoint(folder)
        if (folder / ADAPTER_WEIGHTS).is_file():
            return _finished_adapter(folder)
    except (OSError, ValueError, KeyError) as error:
        raise RefusedError(
            f"What training should start from, {folder}, cannot be read: {_first_line(error)}",
            "Choose another model or checkpoint to start from.",
        ) from error
    if (folder / "config.json").is_file():
        raise RefusedError(
            f"{folder} is a whole model, not an adapter.", "Choose it as the base model instead."
        )
    raise RefusedError(
        f"The adapter to start from, {folder}, has no {ADAPTER_WEIGHTS}.",
        "Choose another model to start from.",
    )


def _finished_adapter(folder: Path) -> StartingPoint:
    settings = json.loads((folder / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
    return StartingPoint(folder, folder / ADAPTER_WEIGHTS, settings, _base_of(folder))


def _checkpoint(folder: Path) -> StartingPoint:
    verify_checkpoint(folder)
    weights, settings = folder / CHECKPOINT_FILES[0], None
    if ADAPTER_SETTINGS in read_manifest(folder)["files"]:
        settings = json.loads((folder / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
        return StartingPoint(folder, weights, settings, _base_of(folder), is_checkpoint=True)
    found = StartingPoint(folder, weights, None, is_checkpoint=True)
    if any("lora_" in name for name in found.tensor_names()):
        raise ValueError(f"{folder.name} was written before checkpoints kept the adapter's settings.")
    return found


def same_tokens(one: Path, other: Path) -> bool:
    """Whether the tokenizers of two folders write the same ids, as far as both have one to look at."""
    files = [folder / TOKENIZER_FILE for folder in (one, other)]
    if not all(file.is_file() for file in files) or known_sha256(files[0]) == known_sha256(files[1]):
        return True
    from tokenizers import Tokenizer

    vocabularies = [Tokenizer.from_file(str(file)).get_vocab() for file in files]
    return bool(vocabularies[0] == vocabularies[1])


def _base_of(folder: Path) -> str:
    path = folder / BASE_FILE
    return str(json.loads(path.read_text(encoding="utf-8"))["sha256"]) if path.is_file() else ""


def base_note(sha256: str) -> str:
    """The text of BASE_FILE."""
    return json.dumps({"sha256": sha256}) + "\n"


def base_sha256(model_path: Path) -> str:
    """Of a base model's weights; its other files may change without making it another model."""
    return files_sha256(sorted(model_path.glob("*.safetensors")))


def files_sha256(paths: list[Path]) -> str:
    """One hash over the names and bytes of files."""
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.name} {known_sha256(path)}\n".encode())
    return total.hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
