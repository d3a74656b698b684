"""A base model's folder: its tokenizer, its weights, its decoder and vocabulary projection. Knows no adapters."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.contract import RunConfig
from training.engine.errors import RefusedError
from training.engine.file_hashes import known_sha256
from training.engine.logps import Head
from training.engine.placement import Placement
from training.engine.precision import loading_dtype, lower, projection_weight
from training.engine.quantization import quantization_settings
from training.engine.starting_point import ADAPTER_SETTINGS, StartingPoint


def load_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of the model folder; refuses one without a chat template."""
    from transformers import AutoTokenizer

    folder = Path(config.model_path)
    if not (folder / "config.json").is_file():
        raise RefusedError(
            f"The base model's folder {folder} has no config.json.", "Choose the base model again."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise RefusedError(
            f"The tokenizer of the base model in {folder} cannot be read: {_first_line(error)}",
            "Download the base model again, or choose another.",
        ) from error
    if config.chat_template_path:
        tokenizer.chat_template = Path(config.chat_template_path).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise RefusedError(
            f"The base model in {folder} has no chat template, so its conversations cannot be written the way it "
            "expects.",
            "Choose an instruct model, or put a chat_template.jinja file into the model's folder.",
        )
    return tokenizer


def load_base(config: RunConfig, placement: Placement) -> Any:
    """Frozen, on its way to the device, attention as plain as the architecture allows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.from_pretrained(
            config.model_path, local_files_only=True, trust_remote_code=False
        )
        plain = config.quantization == "none"
        dtype = loading_dtype(settings, placement.dtype) if plain else placement.dtype
        capped = getattr(settings.get_text_config(), "attn_logit_softcapping", None) is not None
        base = AutoModelForCausalLM.from_pretrained(
            config.model_path,
            config=settings,
            # Weights that are trained stay in float32: in bfloat16 a small update would be rounded away.
            dtype=torch.float32 if config.finetuning_type == "full" else dtype,
            quantization_config=quantization_settings(config, placement.dtype),
            device_map=None if config.quantization == "none" else {"": placement.device},
            attn_implementation="eager" if capped else None,  # SDPA cannot cap; None: SDPA where it is right
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except MemoryError:
        raise
    except Exception as error:
        raise RefusedError(
            f"The base model in {config.model_path} cannot be loaded: {_first_line(error)}",
            "Download the base model again, or choose another.",
        ) from error
    base.requires_grad_(False)
    base.config.use_cache = False
    if plain and config.finetuning_type != "full" and dtype != placement.dtype:
        lower(base, placement.dtype)
    if not placement.exact:
        for module in base.modules():  # a CPU's kernel refuses float32 rows beside bfloat16 weights
            if isinstance(module, nn.LayerNorm):
                module.float()
        # Frozen weights in bfloat16 halve the memory; a float32 residual stream keeps most of the exactness.
        base.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.float())
    return base


def parts(base: Any) -> tuple[nn.Module, Head]:
    """The decoder without its projection, and the projection with what the architecture does to logits."""
    decoder = getattr(base, base.base_model_prefix, None)
    output = base.get_output_embeddings()
    if decoder is None or decoder is base or not isinstance(output, nn.Linear):
        raise unknown_head(base)
    text = base.config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(
        getattr(text, "logits_scaling", None) or 1.0
    )
    softcap = float(getattr(text, "final_logit_softcapping", None) or 0.0)
    return decoder, Head(projection_weight(decoder, output.weight), output.bias, scale, softcap)


def unknown_head(base: Any) -> RefusedError:
    return RefusedError(
        f"Models of the type {base.config.model_type!r} have an output layer that is not known here.",
        "Choose a decoder model such as Llama, Qwen, Mistral, Gemma or SmolLM.",
    )


def weights_sha256(model_path: Path, start: StartingPoint | None) -> str:
    """One hash over everything that makes a model: base weights, configuration, adapter or checkpoint."""
    total = hashlib.sha256()
    parts = [[*model_path.glob("*.safetensors"), *model_path.glob("config.json")]]
    if start is not None:
        parts.append([start.weights_path, start.folder / ADAPTER_SETTINGS])
    for paths in parts:
        for path in sorted(path for path in paths if path.is_file()):
            total.update(f"{path.name} {known_sha256(path)}\n".encode())
        total.update(b"--\n")
    return total.hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
