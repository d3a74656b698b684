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
    CHECKPOINTS_DIR,
    MODEL_DIR,
    RESULT_FILE,
    RunConfig,
    verify_checkpoint,
)
from training.engine.adapters import POLICY, place
from training.engine.data import TokenizedPair
from training.engine.errors import RefusedError
from training.engine.placement import Placement
from training.engine.policy import Policy, load_policy
from training.engine.starting_point import ADAPTER_WEIGHTS, open_starting_point


@dataclasses.dataclass(frozen=True)
class Kept:
    """Weights that a run left behind."""

    folder: Path
    name: str  # "adapter", "model" (of full fine-tuning), "step-000200"
    step: int | None  # None where nobody wrote it down

    @property
    def is_checkpoint(self) -> bool:
        return self.name not in {ADAPTER_DIR, MODEL_DIR}


def load_config(run_dir: Path) -> RunConfig:
    """The run's settings, without its pairs, which may be gone by now, and for this one process.

    What asks for evaluations during training goes with them.
    """
    return dataclasses.replace(
        RunConfig.load(run_dir),
        train_path="", eval_path="", resume_from="", num_devices=1,
        early_stopping_patience=0, early_stopping_threshold=0.0, kl_budget=0.0,
    )  # fmt: skip


def find_kept(run_dir: Path, checkpoint: str) -> Kept:
    """The finished adapter (or whole model), or the checkpoint of that name (or at that path), verified."""
    if not checkpoint:
        for name, file in ((ADAPTER_DIR, ADAPTER_WEIGHTS), (MODEL_DIR, "config.json")):
            if (run_dir / name / file).is_file():
                return Kept(run_dir / name, name, _finished_step(run_dir))
        names = sorted(path.name for path in (run_dir / CHECKPOINTS_DIR).glob("step-*"))
        raise RefusedError(
            f"{run_dir} has no finished model.",
            f"Name a checkpoint: {', '.join(names)}." if names else "Train it first.",
        )
    own = run_dir / CHECKPOINTS_DIR / checkpoint
    folder = own if own.is_dir() else Path(checkpoint)
    try:
        return Kept(folder, folder.name, verify_checkpoint(folder))
    except ValueError as error:
        raise RefusedError(
            f"The checkpoint {folder} cannot be used: {error}",
            "Choose another one, or the finished model.",
        ) from None


def load_kept(config: RunConfig, kept: Kept, placement: Placement, probe: Sequence[TokenizedPair]) -> Policy:
    """The policy with these weights, in eval mode; its reference is the run's. `probe` as in `load_policy`."""
    policy = load_policy(config, placement, probe)
    try:
        _place_model(policy, kept.folder) if kept.name == MODEL_DIR else _place_trained(policy, kept.folder)
    except (ValueError, RuntimeError, KeyError) as error:
        raise RefusedError(
            f"{kept.folder} does not fit the model of config.json, {config.model_path}: "
            f"{str(error).splitlines()[0][:300]}",
            "Name the run directory that it was made in.",
        ) from error
    policy.model.eval()
    return policy


def greeting(tokenizer: Any) -> TokenizedPair:
    """A prompt to try the model with, where there are no pairs at hand."""
    none = np.array([], dtype=np.int32)
    return TokenizedPair("greeting", np.array(tokenizer("Hello.")["input_ids"], dtype=np.int32), none, none)


def _place_trained(policy: Policy, folder: Path) -> None:
    """An adapter, or a checkpoint of either kind of run."""
    start = open_starting_point(str(folder))
    assert start is not None  # noqa: S101 - None is for no path
    if start.base_sha256 and start.base_sha256 != policy.base_sha256:
        raise ValueError("the base model's weights are not those that it was trained on")
    if start.is_adapter:
        place(policy.model, start, POLICY)
    else:
        _copy_all(policy, start.tensors())


def _place_model(policy: Policy, folder: Path) -> None:
    """What full fine-tuning left: all weights, in one file or several."""
    from safetensors.torch import load_file

    _copy_all(policy, {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()})


def _copy_all(policy: Policy, tensors: dict[str, torch.Tensor]) -> None:
    own = dict(policy.base.named_parameters())
    if set(tensors) != set(own):
        raise ValueError(f"{len(set(tensors) ^ set(own))} of its weights have no place in the model")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


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
