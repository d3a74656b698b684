"""What a run leaves behind: the adapter in peft's format, whole or not there, and facts for the result."""

from __future__ import annotations

import json
import platform
import resource
import sys
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from training.contract import ADAPTER_DIR, RunConfig, file_sha256
from training.engine.checkpoints import flush_to_disk, remove_tree, require_finite
from training.engine.objective import Objective
from training.engine.policy import POLICY, Placement, Policy

WEIGHTS_FILE = "adapter_model.safetensors"
METHODS = {
    "dpo": "direct preference optimisation",
    "sft": "supervised fine-tuning",
    "orpo": "odds-ratio preference optimisation",
}


def save_adapter(policy: Policy, tokenizer: Any, config: RunConfig, run_dir: Path) -> tuple[str, int]:
    """Write `adapter/` beside, flush, rename. Returns SHA-256 and size of its weights."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(policy.model, adapter_name=POLICY, save_embedding_layers=False)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    require_finite(weights)
    temporary = run_dir / f".adapter-{uuid.uuid4().hex}"
    temporary.mkdir()
    save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
    base_name = config.base_model_name or Path(config.model_path).name
    _write_adapter_config(policy, temporary, base_name)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(_readme(base_name, config), encoding="utf-8")
    for path in temporary.iterdir():
        flush_to_disk(path)
    flush_to_disk(temporary)
    final = run_dir / ADAPTER_DIR
    if final.exists():
        remove_tree(final)
    temporary.replace(final)
    flush_to_disk(run_dir)
    return file_sha256(final / WEIGHTS_FILE), (final / WEIGHTS_FILE).stat().st_size


def _write_adapter_config(policy: Policy, folder: Path, base_name: str) -> None:
    settings = policy.model.peft_config[POLICY]
    settings.save_pretrained(folder)
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data |= {"base_model_name_or_path": base_name, "inference_mode": True}
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _readme(base_name: str, config: RunConfig) -> str:
    return (
        f"---\nbase_model: {json.dumps(base_name)}\nlibrary_name: peft\npipeline_tag: text-generation\n"
        f"tags:\n- {config.method}\n- lora\n---\n\n"
        f"A LoRA adapter for {base_name}, trained by {METHODS[config.method]} "
        f"(learning rate {config.learning_rate}, rank {config.lora_r}). {Objective(config).sentence}\n"
    )


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def fingerprint(placement: Placement, layout: str, config: RunConfig) -> dict[str, str]:
    """Under the same fingerprint a resumed run repeats every bit."""
    cuda = placement.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(placement.device) if cuda else f"cpu {platform.machine()}",
        "dtype": placement.dtype_name,
        "threads": str(torch.get_num_threads()),
        "layout": layout,
        "num_devices": str(placement.world.size),
        "parallelism": config.parallelism,
        **versions(),
    }


def peak_memory_bytes(placement: Placement) -> int:
    if placement.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(placement.device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
