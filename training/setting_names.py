"""Settings and values that people write and that are not ours: which of ours they mean, in words. Knows no files.

Standard library only. docs/parameters.md is the table for people; a test holds the two together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

# What TRL, AITraining, Together and the studio's own pages call a setting of `RunConfig`.
OURS: dict[str, str] = {
    "model": "model_path", "model_name_or_path": "model_path",
    "from_checkpoint": "adapter_path",
    "data_path": "train_path", "training_file": "train_path",
    "valid_split": "eval_path", "eval_dataset_path": "eval_path", "validation_file": "eval_path",
    "model_ref": "reference_model_path",
    "chat_template": "chat_template_path", "chat_format": "chat_template_path",
    "trainer": "method", "training_method": "method",
    "dpo_beta": "beta", "loss_weights": "rpo_alpha",
    "max_context_length": "max_length", "block_size": "max_length", "model_max_length": "max_length",
    "max_seq_length": "max_length",
    "epoch": "num_train_epochs", "epochs": "num_train_epochs", "n_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lr": "learning_rate", "scheduler": "lr_scheduler_type", "lr_scheduler": "lr_scheduler_type",
    "warmup_steps": "warmup_ratio", "random_seed": "seed",
    "use_peft": "finetuning_type", "peft": "finetuning_type", "training_type": "finetuning_type",
    "load_in_4bit": "quantization", "bnb_4bit_quant_type": "quantization",
    "lora_rank": "lora_r", "lora_target_modules": "target_modules", "lora_trainable_modules": "target_modules",
    "eval_strategy": "eval_steps", "n_evals": "eval_steps", "n_checkpoints": "save_steps",
    "resume_from_checkpoint": "resume_from",
    "use_cpu": "device", "bf16": "dtype", "mixed_precision": "dtype",
    "activation_checkpointing": "gradient_checkpointing",
    "disable_gradient_checkpointing": "gradient_checkpointing",
    "fsdp": "parallelism", "distributed_backend": "parallelism",
    "precompute_ref_log_probs": "reference_cache_dir",
}  # fmt: skip
# Settings of theirs that have no counterpart; docs/parameters.md says why.
NOT_HERE = frozenset((
    "padding_free", "pad_to_multiple_of", "pad_token", "packing", "precompute_ref_batch_size",
    "per_device_eval_batch_size", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "ld_alpha",
    "discopop_tau", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "activation_offloading",
    "use_liger_kernel", "torch_compile", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "trust_remote_code",
    "report_to", "push_to_hub", "hub_token", "log", "wandb_api_key", "unsloth", "use_flash_attention_2",
    "attn_implementation", "prompt_text_column", "text_column", "rejected_text_column", "merge_adapter",
    "auto_find_batch_size", "train_on_inputs", "dpo_reference_free", "suffix",
))  # fmt: skip
LIKENESS = 0.8  # of difflib, 0 to 1: one letter wrong in six is still the same word, another word is not


def unknown_settings(unknown: Sequence[str], known: Iterable[str], file: str) -> str:
    """A sentence with every unknown name, and beside it the name of ours that it means or is near to."""
    ours = sorted(known)
    named = ", ".join(f"{name}{_meant(name, ours)}" for name in unknown)
    return f"Unknown settings in {file}: {named}. docs/parameters.md translates other programs' names."


def _meant(name: str, ours: Sequence[str]) -> str:
    if name in OURS:
        return f" (here: {OURS[name]})"
    if name in NOT_HERE:
        return " (has no counterpart here)"
    found = difflib.get_close_matches(name.lower(), [*ours, *OURS], n=1, cutoff=LIKENESS)
    return f" (did you mean {OURS.get(found[0], found[0])}?)" if found else ""


FROM_PAIRS = "This engine learns from pairs, without a reward model and without ratings of single answers"
METHOD_HINTS: dict[str, str] = {
    "simpo": "SimPO is the method dpo with simpo_gamma above 0, and usually a beta from 2 to 10",
    "cpo": "The nearest is SimPO: the method dpo with simpo_gamma above 0",
    "rpo": "RPO is the method dpo with rpo_alpha above 0",
    "cdpo": "cDPO is the method dpo with label_smoothing above 0",
    **dict.fromkeys(("kto", "bco", "ppo", "grpo", "rloo", "rlhf", "reward", "online_dpo"), FROM_PAIRS),
    **dict.fromkeys(
        ("lora", "qlora", "full"), "What is trained is the setting finetuning_type, with quantization"
    ),
}


def method_hint(value: object, loss_types: Sequence[str]) -> str:
    """What a `method` that is not one means here: a sentence without its full stop, or ""."""
    name = str(value).strip().lower().replace("-", "_")
    if name in loss_types:
        return f"{name} is a loss_type of the method dpo"
    return METHOD_HINTS.get(name, "")
