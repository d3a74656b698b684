"""Which settings of a run can work together: each refusal is a sentence with what to do. Knows no files.

Standard library only. `RunConfig` calls these when it is made, so that nothing wrong travels further.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.contract import RunConfig


class ConfigError(ValueError):
    """The configuration cannot be run. The message is a sentence with what to do."""


def check_numbers(config: RunConfig) -> None:
    """Each number within what it can mean."""
    positive = (
        "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
        "learning_rate", "beta", "max_length", "lora_r", "lora_alpha", "save_steps",
    )  # fmt: skip
    for name in positive:
        value = getattr(config, name)
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} must be a number above 0, found {value!r}.")
    for name, low, high in (
        ("warmup_ratio", 0.0, 1.0), ("lora_dropout", 0.0, 0.95), ("label_smoothing", 0.0, 0.49),
    ):  # fmt: skip
        if not low <= getattr(config, name) <= high:
            raise ConfigError(f"{name} must be from {low} to {high}, found {getattr(config, name)!r}.")


# Settings that only DPO reads.
DPO_ONLY = ("loss_type", "label_smoothing", "rpo_alpha", "simpo_gamma", "dpo_normalize_logratios_by_length")
# Of DPO's losses those that `label_smoothing` is part of; exo_pair is not defined without it.
SMOOTHED_LOSSES = ("sigmoid", "robust", "exo_pair")


def check_objective(config: RunConfig) -> None:
    """Settings that would be ignored, or contradict each other, are refused with a sentence."""
    for name in ("rpo_alpha", "simpo_gamma"):
        value = getattr(config, name)
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name} must be 0 or a number above it, found {value!r}.")
    if not isinstance(config.dpo_normalize_logratios_by_length, bool):
        raise ConfigError("dpo_normalize_logratios_by_length must be true or false.")
    if config.method != "dpo":
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        ignored = [name for name in DPO_ONLY if getattr(config, name) != defaults[name]]
        if ignored:
            raise ConfigError(
                f"{' and '.join(ignored)} belong to the method dpo: leave them out, or choose dpo."
            )
        return
    if config.simpo_gamma > 0 and config.loss_type != "sigmoid":
        raise ConfigError(
            f"simpo_gamma is a margin inside the loss_type sigmoid, not {config.loss_type}: "
            "use sigmoid, or set simpo_gamma to 0."
        )
    if config.label_smoothing > 0 and config.loss_type not in SMOOTHED_LOSSES:
        raise ConfigError(
            f"The loss_type {config.loss_type} has no label_smoothing: set it to 0, or use "
            f"{' or '.join(SMOOTHED_LOSSES)}."
        )
    if config.loss_type == "exo_pair" and config.label_smoothing == 0:
        raise ConfigError("The loss_type exo_pair needs a label_smoothing above 0; its authors use 0.001.")
