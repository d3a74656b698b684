"""What a model folder says about itself: config.json and the headers of its safetensors files.

Pure and suspicious: a folder may be anybody's. Nothing is executed or unpickled, no weight is read, every
file is
limited in size and must lie inside the allowed roots after following links. A folder that needs code, pickled
weights or special loaders is refused with a sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG_LIMIT = 1024 * 1024
TOKENIZER_CONFIG_LIMIT = 8 * 1024 * 1024
TOKENIZER_LIMIT = 64 * 1024 * 1024
HEADER_LIMIT = 32 * 1024 * 1024
MAX_WEIGHT_FILES = 256
MAX_ENTRIES = 4096
# Keys that name code to be run when a model is loaded.
CODE_KEYS = ("auto_map", "model_file", "custom_pipelines")
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# Two-dimensional weights inside a numbered block that are no linear layer of the model's own.
NOT_LINEAR = re.compile(r"embed|wte|wpe|norm|lm_head|score|rotary|relative_attention_bias", re.IGNORECASE)
ORDER = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "o_proj", "c_proj", "dense",
    "gate_proj", "up_proj", "gate_up_proj", "down_proj",
)  # fmt: skip
BLOCK = re.compile(r"\.\d+\.")
LICENCE = re.compile(r"^license(?:_name)?:\s*([\w.+-]{1,60})\s*$", re.MULTILINE)


class FolderProblem(ValueError):
    """This folder cannot be used as a base model. The message is a sentence with what to do."""


def read_folder(folder: Path, *, roots: Sequence[Path]) -> dict[str, Any]:
    """Facts in the shape of `training.base_models.CatalogueModel.facts`; raises `FolderProblem`."""
    folder = _inside(folder, roots, what="This folder")
    if not folder.is_dir():
        raise FolderProblem(
            "There is no such folder. Check the path; the folder is the one that holds config.json."
        )
    files = _list(folder)
    _refuse_code(files)
    config = load_json(_file(folder, "config.json", roots), limit=CONFIG_LIMIT, what="config.json")
    check_config(config)
    weights = _weight_files(files)
    _require_tokenizer(files, folder, roots)
    tensors: dict[str, tuple[int, ...]] = {}
    size = 0
    for name in weights:
        path = _file(folder, name, roots)
        size += path.stat().st_size
        tensors |= read_header(path)
    facts = _numbers(config)
    facts |= _modules(tensors, num_experts=facts["num_experts"])
    facts["num_parameters"] = sum(_count(shape) for shape in tensors.values())
    facts["active_parameters"] = _active(tensors, facts)
    facts["weights_bytes"] = size
    facts["has_chat_template"] = _has_chat_template(folder, files, roots)
    facts["licence"] = _licence(folder, files, roots)
    return facts


# --- the folder -------------------------------------------------------------------------------------
def _inside(path: Path, roots: Sequence[Path], *, what: str) -> Path:
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError):
        raise FolderProblem(f"{what} cannot be followed to a real place on disk. Check its links.") from None
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        raise FolderProblem(
            f"{what} lies outside the folders that are allowed. Put the model inside one of them, or let the "
            "administrator add its place to STUDIO_MODEL_ROOTS."
        )
    return real


def _file(folder: Path, name: str, roots: Sequence[Path]) -> Path:
    path = folder / name
    if not path.exists():
        raise FolderProblem(
            f"{name} is missing. A model folder holds config.json, *.safetensors and tokenizer files."
        )
    real = _inside(path, roots, what=f"{name} is a link that")
    if not real.is_file():
        raise FolderProblem(f"{name} is not a file. Copy the model folder again.")
    return real


def _list(folder: Path) -> list[str]:
    names: list[str] = []
    try:
        for entry in folder.iterdir():
            names.append(entry.name)
            if len(names) > MAX_ENTRIES:
                raise FolderProblem("The folder holds thousands of files; name the folder of one model.")
    except OSError as error:
        raise FolderProblem(f"The folder cannot be read ({error.strerror}). Check its rights.") from None
    return sorted(names)


def _refuse_code(files: Iterable[str]) -> None:
    code = [name for name in files if name.endswith((".py", ".pyc", ".so"))]
    if code:
        raise FolderProblem(
            f"The folder holds code ({code[0][:80]}), which the studio never runs. Use a model that needs "
            f"no code "
            "of its own, or remove the file if the model works without it."
        )


def _weight_files(files: Iterable[str]) -> list[str]:
    names = [
        name
        for name in files
        if name.endswith(".safetensors") and not name.startswith(("consolidated", "adapter"))
    ]
    if len(names) > MAX_WEIGHT_FILES:
        raise FolderProblem(
            f"The folder holds {len(names)} weight files; at most {MAX_WEIGHT_FILES} are read."
        )
    if names:
        return names
    if any(name.startswith("adapter") for name in files):
        raise FolderProblem(
            "This is an adapter, not a whole model. Name the folder of the model it was trained on."
        )
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for name in files):
        raise FolderProblem(
            "The weights are pickled (.bin or .pt), and a pickle can run code. Convert them to "
            "safetensors first."
        )
    if any(name.endswith(".gguf") for name in files):
        raise FolderProblem(
            "This is a GGUF file, made for inference. Name a folder with the safetensors weights."
        )
    raise FolderProblem("The folder holds no *.safetensors weights. Name the folder of a complete model.")


def _require_tokenizer(files: Sequence[str], folder: Path, roots: Sequence[Path]) -> None:
    if "tokenizer.json" in files:
        if _file(folder, "tokenizer.json", roots).stat().st_size > TOKENIZER_LIMIT:
            raise FolderProblem("tokenizer.json is larger than 64 MB, which no honest tokenizer needs.")
    elif not {"vocab.json", "merges.txt"} <= set(files):
        raise FolderProblem(
            "The tokenizer is missing: tokenizer.json. Copy it from where the model came from."
        )


def _has_chat_template(folder: Path, files: Sequence[str], roots: Sequence[Path]) -> bool:
    if "chat_template.jinja" in files or "chat_template.json" in files:
        return True
    if "tokenizer_config.json" not in files:
        return False
    path = _file(folder, "tokenizer_config.json", roots)
    config = load_json(path, limit=TOKENIZER_CONFIG_LIMIT, what="tokenizer_config.json")
    if any(key in config for key in CODE_KEYS):
        raise FolderProblem(
            "tokenizer_config.json names code to run, which the studio never does. Use another model."
        )
    return bool(config.get("chat_template"))


def _licence(folder: Path, files: Sequence[str], roots: Sequence[Path]) -> str:
    """What the README's front matter states, if it states one."""
    if "README.md" not in files:
        return ""
    with _file(folder, "README.md", roots).open("rb") as file:
        match = LICENCE.search(file.read(65536).decode("utf-8", "replace"))
    return match.group(1) if match else ""


# --- config.json ------------------------------------------------------------------------------------
def load_json(path: Path, *, limit: int, what: str) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes; anything else is a `FolderProblem`."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise FolderProblem(f"{what} cannot be read ({error.strerror}). Check its rights.") from None
    if len(raw) > limit:
        raise FolderProblem(f"{what} is larger than {limit // 1024} kB, which no honest model needs.")
    return _object(raw, what)


def _object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise FolderProblem(f"{what} is not valid JSON. Copy the model folder again.") from None
    if not isinstance(value, dict):
        raise FolderProblem(f"{what} does not hold a JSON object. Copy the model folder again.")
    return value


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what needs code, is quantized, or does not generate text."""
    if any(key in config for key in CODE_KEYS):
        raise FolderProblem(
            "config.json names code to be run (auto_map), which the studio never does. Use a model whose "
            "architecture is built into the transformers library."
        )
    if config.get("quantization_config"):
        raise FolderProblem(
            "The weights are quantized. Use the unquantized model (bfloat16, float16 or float32)."
        )
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not isinstance(name, str) or not re.fullmatch(r"\w{1,80}ForCausalLM", name):
        raise FolderProblem(
            "config.json does not describe a text-generating model (an architecture that ends in "
            "ForCausalLM). "
            "Use a causal language model."
        )


def _whole(config: Mapping[str, Any], names: Sequence[str], *, high: int, default: int = 0) -> int:
    """The first of these keys as a whole number within sane bounds."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= high:
            raise FolderProblem(f"config.json says {name} = {str(value)[:40]}, which cannot be right.")
        return value
    if default:
        return default
    raise FolderProblem(f"config.json does not say {names[0]}. Copy the model folder again.")


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden = _whole(config, ("hidden_size", "n_embd", "d_model"), high=65_536)
    layers = _whole(config, ("num_hidden_layers", "n_layer", "num_layers"), high=512)
    heads = _whole(config, ("num_attention_heads", "n_head"), high=1024)
    experts = (
        config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0
    )
    experts = experts if isinstance(experts, int) and 0 < experts <= 4096 else 0
    wide = ("moe_intermediate_size",) if experts and config.get("moe_intermediate_size") else ()
    return {
        "architecture": config["architectures"][0],
        "model_type": str(config.get("model_type", ""))[:60],
        "hidden_size": hidden,
        "num_layers": layers,
        "intermediate_size": _whole(
            config, (*wide, "intermediate_size", "n_inner", "ffn_dim"), high=1_000_000, default=4 * hidden
        ),
        "attention_width": heads * _whole(config, ("head_dim",), high=4096, default=max(1, hidden // heads)),
        "vocab_size": _whole(config, ("vocab_size",), high=4_000_000),
        "context_length": _whole(
            config, ("max_position_embeddings", "n_positions", "n_ctx"), high=100_000_000, default=2048
        ),
        "num_experts": experts,
        "hidden_act": str(config.get("hidden_activation") or config.get("hidden_act") or "")[:60],
        "experts_per_token": _whole(config, ("num_experts_per_tok",), high=4096, default=1) if experts else 1,
    }


# --- safetensors headers ----------------------------------------------------------------------------
def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of one file. The format: 8 bytes of length, that much JSON, then the data;
    offsets must lie one after the other inside the file."""
    what = path.name[:100]
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise FolderProblem(f"{what} is not a safetensors file, or was cut off. Copy it again.")
        header = _object(file.read(length), f"The header of {what}")
    header.pop("__metadata__", None)
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        shape, span = _entry(entry, what)
        shapes[name] = shape
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise FolderProblem(f"{what} has overlapping or missing tensors. Copy it again.")
        end = stop
    if end != size - 8 - length:
        raise FolderProblem(f"{what} is not as long as its header says: it was cut off. Copy it again.")
    return shapes


def _entry(entry: object, what: str) -> tuple[tuple[int, ...], tuple[int, int]]:
    problem = FolderProblem(f"The header of {what} describes a tensor that cannot be. Copy the file again.")
    if not isinstance(entry, dict):
        raise problem
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPE_BYTES:
        raise FolderProblem(
            f"{what} holds {str(dtype)[:20]} numbers, which cannot be trained. Use bf16, f16 or f32."
        )
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2 or len(shape) > 8:
        raise problem
    for value in (*shape, *offsets):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**48:
            raise problem
    if _count(tuple(shape)) * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise problem
    return tuple(shape), (offsets[0], offsets[1])


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _modules(tensors: Mapping[str, tuple[int, ...]], *, num_experts: int) -> dict[str, Any]:
    """Names of the linear layers inside the blocks, with in + out features summed over all of them.

    Experts are left out: they are loaded as one fused tensor, which carries no adapter; so is their router.
    """
    units: dict[str, int] = {}
    for name, shape in tensors.items():
        if len(shape) != 2 or not name.endswith(".weight") or not BLOCK.search(name):
            continue
        module = name.split(".")[-2]
        if NOT_LINEAR.search(module) or ".experts." in name or (num_experts and module in {"gate", "router"}):
            continue
        units[module] = units.get(module, 0) + shape[0] + shape[1]
    if not units:
        raise FolderProblem("No linear layers were found in the weights, so LoRA has nothing to adapt.")
    # Weight files are sorted by name; people know the layers in the order of their work.
    names = sorted(units, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    return {"linear_modules": names, "lora_units": {name: units[name] for name in names}}


def _active(tensors: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any]) -> int:
    """Parameters at work on one token: all of a dense model, the chosen experts' share of a mixture."""
    total = sum(_count(shape) for shape in tensors.values())
    experts = sum(_count(shape) for name, shape in tensors.items() if ".experts." in name)
    if not facts["num_experts"]:
        return total
    return total - experts + experts * int(facts["experts_per_token"]) // int(facts["num_experts"])
