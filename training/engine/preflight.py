"""What can be refused before torch is imported: settings not known here, files that are not there."""

from __future__ import annotations

import os
from pathlib import Path

from training.contract import RunConfig
from training.engine.errors import RefusedError

METHODS = ("dpo", "sft", "orpo")
LOSS_TYPES = (
    "sigmoid", "ipo", "hinge", "robust", "exo_pair", "apo_zero", "apo_down", "nca_pair", "sppo_hard",
)  # fmt: skip
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
SWITCHES = ("auto", "on", "off")
PARALLELISMS = ("data", "fsdp")


def check_config(config: RunConfig) -> None:
    """Raises `RefusedError` with the first thing that cannot work."""
    for name, value, known in (
        ("method", config.method, METHODS),
        ("loss_type", config.loss_type, LOSS_TYPES),
        ("lr_scheduler_type", config.lr_scheduler_type, SCHEDULERS),
        ("gradient_checkpointing", config.gradient_checkpointing, SWITCHES),
        ("parallelism", config.parallelism, PARALLELISMS),
    ):
        if value not in known:
            raise RefusedError(f"{name} {value!r} is not known here.", f"Use {' or '.join(known)}.")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if config.num_devices > 1 and started != config.num_devices:
        raise RefusedError(
            f"num_devices is {config.num_devices}, and the run was started on {started}.",
            f"Start it with --nproc-per-node={config.num_devices}, without torchrun, or set num_devices to 1: "
            "then it takes what it is started with.",
        )
    if not Path(config.model_path).is_dir():
        raise RefusedError("The base model's folder is not there.", "Choose the base model again.")
    if config.adapter_path and not Path(config.adapter_path).is_dir():
        raise RefusedError(
            "The model to start from is not there any more.", "Choose another model to start from."
        )
    if config.chat_template_path and not Path(config.chat_template_path).is_file():
        raise RefusedError("The file of the chat template is not there.", "Correct chat_template_path.")
    for split, path in (("training", config.train_path), ("validation", config.eval_path)):
        if path and not Path(path).is_file():
            raise RefusedError(f"The {split} pairs are not there.", "Prepare the dataset again.")
