"""What can be refused before torch is imported: settings not known here, files that are not there."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from training.contract import RunConfig
from training.engine.errors import RefusedError
from training.run_checks import METHODS
from training.setting_names import method_hint

LOSS_TYPES = (
    "sigmoid", "ipo", "hinge", "robust", "exo_pair", "apo_zero", "apo_down", "nca_pair", "sppo_hard",
)  # fmt: skip
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
SWITCHES = ("auto", "on", "off")
PARALLELISMS = ("data", "fsdp")
FINETUNING_TYPES = ("lora", "full")
QUANTIZATIONS = ("none", "nf4")


def check_config(config: RunConfig) -> None:
    """Raises `RefusedError` with the first thing that cannot work."""
    for name, value, known in (
        ("method", config.method, METHODS),
        ("loss_type", config.loss_type, LOSS_TYPES),
        ("lr_scheduler_type", config.lr_scheduler_type, SCHEDULERS),
        ("gradient_checkpointing", config.gradient_checkpointing, SWITCHES),
        ("parallelism", config.parallelism, PARALLELISMS),
        ("finetuning_type", config.finetuning_type, FINETUNING_TYPES),
        ("quantization", config.quantization, QUANTIZATIONS),
    ):
        if value not in known:
            hint = method_hint(value, LOSS_TYPES) if name == "method" else ""
            next_step = f"Use {', '.join(known[:-1])} or {known[-1]}."
            raise RefusedError(
                f"{name} {value!r} is not known here.", f"{hint}. {next_step}" if hint else next_step
            )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if config.num_devices > 1 and started != config.num_devices:
        raise RefusedError(
            f"num_devices is {config.num_devices}, and the run was started on {started}.",
            f"Start it with --nproc-per-node={config.num_devices}, without torchrun, or set num_devices to 1: "
            "then it takes what it is started with.",
        )
    if not Path(config.model_path).is_dir():
        raise RefusedError(
            f"The base model's folder is not there: {config.model_path}.", "Choose the base model again."
        )
    if config.adapter_path and not Path(config.adapter_path).is_dir():
        raise RefusedError(
            f"The model to start from is not there any more: {config.adapter_path}.",
            "Choose another model to start from.",
        )
    if config.watch_path and not Path(config.watch_path).is_file():
        raise RefusedError(
            f"The watch prompts are not there: {config.watch_path}.",
            "Choose the file again, or leave watch_path empty.",
        )
    if config.chat_template_path and not Path(config.chat_template_path).is_file():
        raise RefusedError(
            f"The file of the chat template is not there: {config.chat_template_path}.",
            "Correct chat_template_path.",
        )
    _check_other_models(config)
    for split, path in (("training", config.train_path), ("validation", config.eval_path)):
        if path and not Path(path).is_file():
            raise RefusedError(f"The {split} pairs are not there: {path}.", "Prepare the dataset again.")


def _check_other_models(config: RunConfig) -> None:
    for name in ("reference_model_path", "reference_adapter_path"):
        path = getattr(config, name)
        if path and not Path(path).is_dir():
            raise RefusedError(
                f"The folder of {name} is not there: {path}.", "Choose another reference, or none."
            )
    if config.quantization != "none" and find_spec("bitsandbytes") is None:
        raise RefusedError(
            f"The quantization {config.quantization} needs bitsandbytes, which is not installed here.",
            "Install bitsandbytes on a machine with a CUDA device, or set quantization to none.",
        )
