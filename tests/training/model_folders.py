"""Model folders written by hand, without torch: the shape of a tiny Llama in the safetensors format."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def write_safetensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def make_model_folder(folder: Path, *, num_experts: int = 0) -> Path:
    """A folder that passes every check of `training.model_folder`; its weights are zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [64, 32]}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, out in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16), ("o_proj", 32)):
            shapes[f"{prefix}self_attn.{name}.weight"] = [out, 32]
        for part in [f"experts.{n}." for n in range(num_experts)] or [""]:
            shapes[f"{prefix}mlp.{part}gate_proj.weight"] = [64, 32]
            shapes[f"{prefix}mlp.{part}up_proj.weight"] = [64, 32]
            shapes[f"{prefix}mlp.{part}down_proj.weight"] = [32, 64]
        if num_experts:
            shapes[f"{prefix}mlp.gate.weight"] = [num_experts, 32]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = shape[0] * shape[1] * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    write_safetensors(folder / "model.safetensors", header, b"\x00" * end)
    config = dict(LLAMA_CONFIG)
    if num_experts:
        config |= {
            "architectures": ["OlmoeForCausalLM"],
            "num_experts": num_experts,
            "num_experts_per_tok": 2,
        }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return folder
