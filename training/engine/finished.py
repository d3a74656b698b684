"""A run's model put back on its base: its adapter as it was kept, or one of its checkpoints. For the commands
beside training; they read a run directory and leave what training wrote there alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.contract import (
    ADAPTER_DIR,
    CHECKPOINT_FILES,
    CHECKPOINTS_DIR,
    RESULT_FILE,
    RunConfig,
    verify_checkpoint,
)
from training.engine.adapters import POLICY
from training.engine.data import TokenizedPair
from training.engine.errors import RefusedError
from training.engine.policy import Placement, Policy, load_policy

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Kept:
    """Weights that a run left behind."""

    folder: Path
    name: str  # "adapter", "step-000200"
    step: int | None  # None where nobody wrote it down

    @property
    def is_checkpoint(self) -> bool:
        return self.name != ADAPTER_DIR


def load_config(run_dir: Path) -> RunConfig:
    """The run's settings, without its pairs, which may be gone by now, and for this one process."""
    config = RunConfig.load(run_dir)
    return dataclasses.replace(config, train_path="", eval_path="", resume_from="", num_devices=1)


def find_kept(run_dir: Path, checkpoint: str) -> Kept:
    """The finished adapter, or the checkpoint of that name (or at that path), verified."""
    if not checkpoint:
        folder = run_dir / ADAPTER_DIR
        if not (folder / WEIGHTS_FILE).is_file():
            names = sorted(path.name for path in (run_dir / CHECKPOINTS_DIR).glob("step-*"))
            raise RefusedError(
                f"{run_dir.name} has no finished adapter.",
                f"Name a checkpoint: {', '.join(names)}." if names else "Train it first.",
            )
        return Kept(folder, ADAPTER_DIR, _finished_step(run_dir))
    own = run_dir / CHECKPOINTS_DIR / checkpoint
    folder = own if own.is_dir() else Path(checkpoint)
    try:
        return Kept(folder, folder.name, verify_checkpoint(folder))
    except ValueError as error:
        raise RefusedError(
            f"The checkpoint {folder.name!r} cannot be used: {error}",
            "Choose another one, or the finished adapter.",
        ) from None


def load_kept(config: RunConfig, kept: Kept, placement: Placement, probe: Sequence[TokenizedPair]) -> Policy:
    """The policy with these weights, in eval mode; its reference is the run's. `probe` as in `load_policy`."""
    policy = load_policy(config, placement, probe)
    try:
        _place_checkpoint(policy, kept.folder) if kept.is_checkpoint else _place_adapter(policy, kept.folder)
    except (ValueError, RuntimeError, KeyError) as error:
        raise RefusedError(
            f"{kept.name} does not fit the model of config.json: {str(error).splitlines()[0][:300]}",
            "Name the run directory that it was made in.",
        ) from error
    policy.model.eval()
    return policy


def greeting(tokenizer: Any) -> TokenizedPair:
    """A prompt to try the model with, where there are no pairs at hand."""
    none = np.array([], dtype=np.int32)
    return TokenizedPair("greeting", np.array(tokenizer("Hello.")["input_ids"], dtype=np.int32), none, none)


def _place_checkpoint(policy: Policy, folder: Path) -> None:
    from safetensors.torch import load_file

    tensors, own = load_file(folder / CHECKPOINT_FILES[0]), policy.trainable
    if set(tensors) != set(own):
        raise ValueError(f"{len(set(tensors) ^ set(own))} of its weights have no place in the model")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _place_adapter(policy: Policy, folder: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS_FILE)
    own = get_peft_model_state_dict(policy.model, adapter_name=POLICY, save_embedding_layers=False)
    if set(tensors) != set(own):
        raise ValueError(f"{len(set(tensors) ^ set(own))} of its weights have no place in the model")
    set_peft_model_state_dict(policy.model, tensors, adapter_name=POLICY)


def _finished_step(run_dir: Path) -> int | None:
    result = read_result(run_dir)
    step = result.get("model_step", result.get("step"))
    return None if step is None else int(step)


def read_result(run_dir: Path) -> dict[str, Any]:
    """What training said at its end; {} where it did not."""
    try:
        found = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
