"""Models of the architectures that people bring, built from configurations: one to four layers, random weights.

The weights are larger than a fresh model's: flat predictions would hide errors.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tiny import VOCABULARY_SPECIALS, build_tiny_tokenizer
from training.engine.data import TokenizedPair

SHAPE: dict[str, Any] = {
    "vocab_size": 256 + len(VOCABULARY_SPECIALS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"]
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """`packed`: the packed layout must be chosen; else `reason` is what the log must say."""

    config: str  # the class in transformers
    settings: dict[str, Any]
    packed: bool = True
    reason: str = ""

    def build(self, folder: Path, **changes: Any) -> Path:
        import transformers

        folder.mkdir(parents=True, exist_ok=True)
        build_tiny_tokenizer(folder)
        config = getattr(transformers, self.config)(**(SHAPE | self.settings | changes))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for name, tensor in model.named_parameters():
                if "norm" in name or "sinks" in name:  # constants at birth
                    tensor.data += 0.3 * torch.randn(tensor.shape)
        model.save_pretrained(folder)
        return folder


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaConfig", {}),
    "llama 3 rope": Architecture(
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "smollm2": Architecture(
        "LlamaConfig",
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "smollm3 with layers without rope": Architecture(
        "SmolLM3Config", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}
    ),
    "qwen2": Architecture("Qwen2Config", {}),
    "qwen2 with windows": Architecture(
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen3": Architecture("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": Architecture("MistralConfig", {"sliding_window": None}),
    "mistral, window longer than the pairs": Architecture("MistralConfig", {"sliding_window": 300}),
    "mistral, window shorter than the pairs": Architecture("MistralConfig", {"sliding_window": 9}),
    "gemma": Architecture("GemmaConfig", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": Architecture(
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 16,
            "layer_types": LOCAL_AND_GLOBAL,
        },
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 4,
            "layer_types": LOCAL_AND_GLOBAL * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
            },
        },
    ),
    "phi": Architecture("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": Architecture("Phi3Config", {}),
    "phi3 with a window": Architecture("Phi3Config", {"sliding_window": 8}),
    "phi3, pairs beyond the short rope": Architecture(
        "Phi3Config",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0, 1.0, 1.0, 1.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
        packed=False,
        reason="position embeddings change with the longest row beyond 32 tokens",
    ),
    "granite": Architecture(
        "GraniteConfig",
        {
            "logits_scaling": 3.0,
            "embedding_multiplier": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "cohere2": Architecture(
        "Cohere2Config", {"sliding_window": 8, "layer_types": LOCAL_AND_GLOBAL, "logit_scale": 0.5}
    ),
    "olmo2": Architecture("Olmo2Config", {}),
    "gpt-oss": Architecture(
        "GptOssConfig", MOE | {"head_dim": 8, "sliding_window": 8, "layer_types": LOCAL_AND_GLOBAL}
    ),
    "qwen3-moe": Architecture("Qwen3MoeConfig", MOE | {"head_dim": 8, "moe_intermediate_size": 16}),
    "mixtral": Architecture("MixtralConfig", MOE),
    "llama with dropout in attention": Architecture(
        "LlamaConfig", {"attention_dropout": 0.1}, packed=False, reason="attention has dropout"
    ),
    "falcon, its own masks": Architecture(
        "FalconConfig",
        {"alibi": True, "num_kv_heads": 4, "new_decoder_architecture": True},
        packed=False,
        reason="attention is its own",
    ),
}


def uneven_pairs(count: int = 4, longest: int = 34) -> list[TokenizedPair]:
    """Random ids; the longest side has some 60 tokens, beyond every window of `ARCHITECTURES` but one."""
    draw = np.random.default_rng(3)

    def ids(low: int = 2) -> Any:
        return draw.integers(3, 250, size=int(draw.integers(low, longest))).astype(np.int32)

    pairs = [TokenizedPair(str(number), ids(), ids(), ids()) for number in range(count - 1)]
    return [*pairs, TokenizedPair("long", ids(longest - 2), ids(longest - 2), ids(longest - 2))]
