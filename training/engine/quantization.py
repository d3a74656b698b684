"""QLoRA: frozen base weights in four bits. Where it cannot work, a sentence before anything is loaded."""

from __future__ import annotations

from typing import Any

import torch

from training.contract import RunConfig
from training.engine.errors import RefusedError


def check_quantization(config: RunConfig, device: torch.device) -> None:
    """Raises `RefusedError` where the weights cannot be quantised on this device."""
    if config.quantization == "none":
        return
    next_step = "Choose a machine with a CUDA device, or set quantization to none."
    if device.type != "cuda":
        raise RefusedError(
            f"The quantization {config.quantization} works on a CUDA device only, and this run computes on the CPU.",
            next_step,
        )
    try:
        import bitsandbytes  # type: ignore[import-not-found]  # noqa: F401
    except Exception as error:  # a build for another CUDA raises more than ImportError
        reason = str(error).strip().split("\n")[0][:200]
        raise RefusedError(
            f"bitsandbytes, which the quantization {config.quantization} needs, does not load: {reason}",
            "Install the bitsandbytes that fits this CUDA, or set quantization to none.",
        ) from error


def quantization_settings(config: RunConfig, compute: torch.dtype) -> Any:
    """NF4 with doubly quantised constants (Dettmers et al. 2023, arXiv 2305.14314, section 3); None for none."""
    if config.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
