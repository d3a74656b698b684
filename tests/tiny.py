"""A language model small enough for a test: two Llama layers and a byte-level tokenizer, built from a config.

Nothing is downloaded and every call writes the same weights. Any text tokenises (one token a byte).
"""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARY_SPECIALS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tiny_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Byte-level BPE without merges: 256 bytes and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*VOCABULARY_SPECIALS, *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    fast.model_max_length = 4096
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)


def build_tiny_model(
    folder: Path, *, hidden_size: int = 32, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """A model folder as a person would have it: config.json, model.safetensors, tokenizer, chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    build_tiny_tokenizer(folder, chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=256 + len(VOCABULARY_SPECIALS),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,  # a flat model hides errors: let its predictions differ from token to token
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def tiny_pairs(count: int) -> list[dict[str, object]]:
    """Canonical pairs with one contrast: chosen short and lower case, rejected long and upper."""
    pairs: list[dict[str, object]] = []
    for index in range(count):
        prompt: list[dict[str, str]] = []
        if index % 4 == 0:
            prompt.append({"role": "system", "content": "Be brief."})
        if index % 5 == 0:
            prompt.append({"role": "user", "content": f"Hello number {index}."})
            prompt.append({"role": "assistant", "content": "Hello."})
        prompt.append({"role": "user", "content": f"What is {index} plus {index % 7}?"})
        pairs.append(
            {
                "id": f"pair-{index:04d}",
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": f"it is {index + index % 7}."}],
                "rejected": [
                    {
                        "role": "assistant",
                        "content": f"WELL, LET ME THINK ABOUT {index}! " + "HM " * (index % 5),
                    }
                ],
            }
        )
    return pairs


def build_tiny_pairs(path: Path, count: int) -> Path:
    """Write `count` canonical pairs, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for pair in tiny_pairs(count):
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    return path
