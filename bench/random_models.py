"""Model folders with random weights in the shape of well-known ones: speed and memory do not ask what they say."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

# Llama's shapes; the vocabulary is the tokenizer's own, so that both sides see the same tokens.
RANDOM_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8},
}  # fmt: skip
MOST_TOKENS = 32_768


def random_model(shape: str, tokenizer_folder: Path) -> Path:
    """Made once and kept in the folder for temporary files: weights in bfloat16, seed 0."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = Path(tempfile.gettempdir()) / f"bench-random-{shape}"
    if (folder / "tokenizer_config.json").is_file():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        **RANDOM_SHAPES[shape],
        vocab_size=len(tokenizer),
        max_position_embeddings=MOST_TOKENS,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
