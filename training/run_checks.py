"""Which settings of a run can work together: each refusal is a sentence with what to do. Knows no files.

Standard library only. `RunConfig` calls these when it is made, so that nothing wrong travels further.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from training.metric_keys import EVAL_PREFIX, OF_WATCHING, Metric, evaluation_keys, is_greater_better

if TYPE_CHECKING:
    from training.contract import RunConfig


class ConfigError(ValueError):
    """The configuration cannot be run. The message is a sentence with what to do."""


def check_settings(config: RunConfig) -> None:
    """Raises `ConfigError` with the first thing that cannot be meant."""
    for check in (
        check_numbers, check_objective, check_finetuning, check_lengths, check_cache, check_watch,
        check_stopping,
    ):  # fmt: skip
        check(config)


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
    coefficient = config.router_aux_loss_coef
    if coefficient is not None and not (
        isinstance(coefficient, (int, float)) and math.isfinite(coefficient) and coefficient >= 0
    ):
        raise ConfigError(
            f"router_aux_loss_coef must be 0, a number above it, or left out, found {coefficient!r}."
        )
    if not (isinstance(config.num_devices, int) and config.num_devices >= 1):
        raise ConfigError(f"num_devices must be a whole number from 1, found {config.num_devices!r}.")


METHODS = ("dpo", "sft", "orpo")
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
    if config.method not in METHODS:
        return  # which one was meant is said by the engine's preflight
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


def check_cache(config: RunConfig) -> None:
    """A limit without a shared cache would limit nothing."""
    limit = config.reference_cache_bytes
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        raise ConfigError(
            f"reference_cache_bytes must be 0 (no limit) or a whole number above, found {limit!r}."
        )
    if limit and not config.reference_cache_dir:
        raise ConfigError(
            "reference_cache_bytes limits a shared cache: name its folder in reference_cache_dir."
        )


LENGTHS_PER = ("side", "pair")
TRUNCATION_MODES = ("keep_end", "keep_start", "drop")


def check_lengths(config: RunConfig) -> None:
    """The rule for over-long pairs: see `training/engine/cutting.py`."""
    if config.truncation_mode not in TRUNCATION_MODES:
        raise ConfigError(
            f"truncation_mode must be keep_end, keep_start or drop, found {config.truncation_mode!r}."
        )
    if config.max_length_per not in LENGTHS_PER:
        raise ConfigError(f"max_length_per must be side or pair, found {config.max_length_per!r}.")
    if config.side_length < 1:
        raise ConfigError(
            "max_length 1 leaves nothing for half a pair: raise it, or set max_length_per to side."
        )
    for name in ("max_prompt_length", "max_completion_length"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(
                f"{name} must be 0 (no bound of its own) or a whole number above, found {value!r}."
            )
        if value >= config.side_length:
            raise ConfigError(
                f"{name} {value} bounds nothing, for a prompt with one answer has {config.side_length} tokens at "
                "most: lower it, set it to 0, or raise max_length."
            )


def uses_reference(method: str, simpo_gamma: float) -> bool:
    """Whether the loss compares with a reference: DPO does, but for SimPO."""
    return method == "dpo" and simpo_gamma == 0


def check_watch(config: RunConfig) -> None:
    """Watch prompts: how many, how long, how hot."""
    for name, low in (("watch_prompts", 0), ("watch_max_new_tokens", 1)):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name} must be a whole number from {low}, found {value!r}.")
    heat = config.watch_temperature
    if not (isinstance(heat, (int, float)) and 0 <= heat <= 2):
        raise ConfigError(f"watch_temperature must be from 0 to 2, found {heat!r}.")
    if config.watch_path and not config.watch_prompts:
        raise ConfigError("watch_path is given and watch_prompts is 0: say how many are to be answered.")


def check_stopping(config: RunConfig) -> None:
    """Best model, early stopping, KL budget: what could never act is refused."""
    patience = config.early_stopping_patience
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 0:
        raise ConfigError(
            f"early_stopping_patience must be 0 (off) or a number of evaluations, found {patience!r}."
        )
    for name in ("early_stopping_threshold", "kl_budget"):
        value = getattr(config, name)
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name} must be 0 or a number above it, found {value!r}.")
    if config.early_stopping_threshold and not patience:
        raise ConfigError(
            "early_stopping_threshold needs early_stopping_patience: set that, or leave both at 0."
        )
    if config.kl_budget and not uses_reference(config.method, config.simpo_gamma):
        raise ConfigError("kl_budget needs a reference, and this loss has none: set it to 0.")
    for name in ("early_stopping_patience", "kl_budget"):
        if getattr(config, name) and not (config.eval_path and config.eval_steps):
            raise ConfigError(
                f"{name} looks at evaluations during the run: choose validation data and eval_steps, or set it to 0."
            )
    _check_metric(config)


def _check_metric(config: RunConfig) -> None:
    key, known = config.metric_for_best_model, evaluation_keys()
    if key not in known:
        raise ConfigError(f"metric_for_best_model {key!r} is not known: use one of {', '.join(known)}.")
    if key in (EVAL_PREFIX + name for name in undefined_metrics(config)):
        raise ConfigError(f"metric_for_best_model {key} is not defined under these settings: use eval_loss.")
    if config.greater_is_better is None and is_greater_better(key) is None:
        raise ConfigError(f"Nobody can say which {key} is better: set greater_is_better to true or false.")
    if config.greater_is_better not in (None, True, False):
        raise ConfigError("greater_is_better must be true, false or null.")


def undefined_metrics(config: RunConfig) -> set[str]:
    """Keys that are null, or not there, under these settings."""
    missing = set()
    if not uses_reference(config.method, config.simpo_gamma):
        missing |= {Metric.KL, Metric.KL_SAMPLED, Metric.KL_SAMPLED_K1}
    if config.watch_temperature != 1.0:
        missing |= {Metric.KL_SAMPLED, Metric.KL_SAMPLED_K1}
    if not config.watch_prompts:
        missing |= OF_WATCHING
    if config.method != "orpo":
        missing |= {Metric.LOG_ODDS_CHOSEN, Metric.LOG_ODDS_RATIO}
    if config.method == "dpo" and not config.rpo_alpha:
        missing |= {Metric.NLL_LOSS}
    if config.method == "sft":
        missing |= {
            Metric.REWARDS_CHOSEN, Metric.REWARDS_REJECTED, Metric.REWARDS_MARGINS, Metric.REWARDS_ACCURACIES,
            Metric.LOGPS_REJECTED,
        }  # fmt: skip
    return missing


# Settings that only an adapter reads.
ADAPTER_ONLY = (
    "lora_r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules", "quantization",
)  # fmt: skip


def check_finetuning(config: RunConfig) -> None:
    """What is trained, and which model it is compared with."""
    for name in ("use_dora", "use_rslora"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} must be true or false.")
    if config.finetuning_type == "full":
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        ignored = [name for name in ADAPTER_ONLY if getattr(config, name) != defaults[name]]
        if ignored:
            raise ConfigError(
                f"{' and '.join(ignored)} belong to an adapter: leave them out, or set finetuning_type to lora."
            )
    if "all-linear" in config.target_modules and len(config.target_modules) > 1:
        raise ConfigError("target_modules already has every layer with all-linear: name it alone.")
    wants_reference = config.reference_model_path or config.reference_adapter_path
    if wants_reference and not uses_reference(config.method, config.simpo_gamma):
        raise ConfigError(
            "This loss uses no reference: leave reference_model_path and reference_adapter_path out."
        )
