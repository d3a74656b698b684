"""What a run leaves behind: the adapter in peft's format, whole or not there, and facts for the result."""

from __future__ import annotations

import json
import platform
import resource
import shutil
import sys
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from training.contract import ADAPTER_DIR, MODEL_DIR, AdapterFacts, Result, RunConfig, file_sha256
from training.engine.adapters import POLICY, REFERENCE, facts, settings_of
from training.engine.checkpoints import flush_to_disk, remove_tree, require_finite
from training.engine.cpu_products import BY_ONEDNN, prefers_onednn
from training.engine.objective import Objective
from training.engine.policy import Placement, Policy
from training.engine.starting_point import ADAPTER_SETTINGS, BASE_FILE, base_note, files_sha256

WEIGHTS_FILE = "adapter_model.safetensors"
METHODS = {
    "dpo": "direct preference optimisation",
    "sft": "supervised fine-tuning",
    "orpo": "odds-ratio preference optimisation",
}


def save_trained(policy: Policy, tokenizer: Any, config: RunConfig, run_dir: Path) -> Result:
    """Write `adapter/`, or with full fine-tuning `model/`. Returns hash and size of the weights, as results."""
    if config.finetuning_type == "full":
        sha256, size = save_model(policy, tokenizer, config, run_dir)
        return {"model_sha256": sha256, "model_bytes": size}
    sha256, size = save_adapter(policy, tokenizer, config, run_dir)
    return {"adapter_sha256": sha256, "adapter_bytes": size}


def save_model(policy: Policy, tokenizer: Any, config: RunConfig, run_dir: Path) -> tuple[str, int]:
    """Write `model/` beside, flush, rename: a model folder as the base's was, in the type the run computed in."""
    from transformers import GenerationConfig

    require_finite(policy.trainable)
    model, source = policy.base, Path(config.model_path)
    model.to(policy.scorer.placement.dtype)
    model.config.use_cache = True  # off while training
    kept = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # the base's own may be one that is refused on saving
    temporary = _beside(run_dir)
    model.save_pretrained(temporary, safe_serialization=True)
    model.generation_config = kept
    (temporary / "generation_config.json").unlink(missing_ok=True)
    if (source / "generation_config.json").is_file():
        shutil.copy(source / "generation_config.json", temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(_readme(_base_name(config), config, None), encoding="utf-8")
    final = _into_place(temporary, run_dir / MODEL_DIR)
    weights = sorted(final.glob("*.safetensors"))
    return files_sha256(weights), sum(path.stat().st_size for path in weights)


def save_adapter(policy: Policy, tokenizer: Any, config: RunConfig, run_dir: Path) -> tuple[str, int]:
    """Write `adapter/` beside, flush, rename. Returns SHA-256 and size of its weights."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(policy.model, adapter_name=POLICY, save_embedding_layers=False)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    require_finite(weights)
    temporary = _beside(run_dir)
    save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
    (temporary / BASE_FILE).write_text(base_note(policy.base_sha256), encoding="utf-8")
    base_name = _base_name(config)
    _write_adapter_config(policy, temporary, base_name)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(_readme(base_name, config, facts(policy.model)), encoding="utf-8")
    final = _into_place(temporary, run_dir / ADAPTER_DIR)
    return file_sha256(final / WEIGHTS_FILE), (final / WEIGHTS_FILE).stat().st_size


def weight_facts(policy: Policy, config: RunConfig) -> Result:
    """What a model card says of the weights."""
    return {
        "finetuning_type": config.finetuning_type,
        "adapter": facts(policy.model),
        "num_parameters": sum(
            tensor.numel() for name, tensor in policy.model.named_parameters() if f".{REFERENCE}" not in name
        ),
        "num_trainable_parameters": sum(tensor.numel() for tensor in policy.trainable.values()),
        "base_sha256": policy.base_sha256,
        "start_sha256": policy.start_sha256,
    }


def _beside(run_dir: Path) -> Path:
    temporary = run_dir / f".output-{uuid.uuid4().hex}"
    temporary.mkdir()
    return temporary


def _into_place(temporary: Path, final: Path) -> Path:
    """To disk, then under its name by one rename: it is whole or it is not there."""
    for path in temporary.iterdir():
        flush_to_disk(path)
    flush_to_disk(temporary)
    if final.exists():
        remove_tree(final)
    temporary.replace(final)
    flush_to_disk(final.parent)
    return final


def _base_name(config: RunConfig) -> str:
    return config.base_model_name or Path(config.model_path).name


def _write_adapter_config(policy: Policy, folder: Path, base_name: str) -> None:
    data = settings_of(policy.model) | {"base_model_name_or_path": base_name}
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_SETTINGS).write_text(text, encoding="utf-8")


def _readme(base_name: str, config: RunConfig, adapter: AdapterFacts | None) -> str:
    library, tag, what, rank = "transformers", "", f"{base_name} with all of its weights", ""
    if adapter is not None:
        kind = {"lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA", "rslora+dora": "rsLoRA and DoRA"}
        library, tag, rank = "peft", "- lora\n", f", rank {adapter['r']}"
        what = f"A {kind[adapter['kind']]} adapter for {base_name}"
    return (
        f"---\nbase_model: {json.dumps(base_name)}\nlibrary_name: {library}\npipeline_tag: text-generation\n"
        f"tags:\n- {config.method}\n{tag}---\n\n"
        f"{what}, trained by {METHODS[config.method]} (learning rate {config.learning_rate}{rank}). "
        f"{Objective(config).sentence}\n"
    )


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def fingerprint(placement: Placement, layout: str, config: RunConfig) -> dict[str, str]:
    """Under the same fingerprint a resumed run repeats every bit."""
    cuda = placement.device.type == "cuda"
    cpu = f"cpu {platform.machine()}" + (f", {BY_ONEDNN}" if prefers_onednn() else "")
    return {
        "device": torch.cuda.get_device_name(placement.device) if cuda else cpu,
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
    return resident_peak_bytes()


def resident_peak_bytes() -> int:
    """Of this program alone: Linux hands a parent's `ru_maxrss` on to what it starts."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
