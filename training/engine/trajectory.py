"""Which settings belong to a run's trajectory: a checkpoint goes on only under the same ones. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from training.contract import RunConfig

# Settings that may differ between an attempt and the one it continues: where files are, when to save and
# look, and how a step's pairs are cut into micro-batches (their product is part of the identity).
NOT_IDENTITY = {
    "run_id", "model_path", "train_path", "eval_path", "adapter_path", "base_model_name", "chat_template_path",
    "reference_model_path", "reference_adapter_path", "reference_cache_dir",
    "reference_cache_bytes", "resume_from",
    "eval_steps", "save_steps", "save_seconds", "device", "dtype", "gradient_checkpointing",
    "per_device_train_batch_size", "gradient_accumulation_steps", "record_pairs",
    "watch_path", "watch_prompts", "watch_max_new_tokens", "watch_temperature",
    "num_devices", "parallelism",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_patience",
    "early_stopping_threshold", "kl_budget",
}  # fmt: skip

# Settings that were part of the identity from the start. A later one counts where it is not its default, so that
# the checkpoints of a task outlive a new setting.
FIRST_SETTINGS = {
    "method", "loss_type", "beta", "label_smoothing", "num_train_epochs", "learning_rate", "lr_scheduler_type",
    "warmup_ratio", "weight_decay", "max_grad_norm", "max_length", "seed", "max_steps", "lora_r", "lora_alpha",
    "lora_dropout", "target_modules",
}  # fmt: skip


def trajectory_settings(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint of this run belongs to; pairs of a step count, however micro-batches cut them."""
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    settings = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key not in NOT_IDENTITY and (key in FIRST_SETTINGS or value != defaults[key])
    }
    settings["pairs_per_step"] = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return settings
