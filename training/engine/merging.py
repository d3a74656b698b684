"""The `merge` command: base + adapter as one model folder, complete or not there.

A checkpoint of full fine-tuning has nothing to be added to, but is no folder yet: it is written as one.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from pathlib import Path
from typing import Any, TypedDict

import torch

from training.contract import ADAPTER_DIR, MODEL_DIR, RunConfig, file_sha256
from training.engine.adapters import POLICY
from training.engine.checkpoints import flush_to_disk, remove_tree
from training.engine.errors import RefusedError
from training.engine.finished import Kept, find_kept, greeting, load_config, load_kept
from training.engine.outputs import WEIGHTS_FILE, versions
from training.engine.policy import Placement, Policy, load_tokenizer
from training.engine.preflight import check_config
from training.engine.training_run import make_quiet_and_deterministic

MERGED_DIR = "merged"
DTYPES = ("float32", "bfloat16", "float16")


class MergeReport(TypedDict):
    """What `merge` prints and returns."""

    path: str
    weights: str  # "adapter", or the checkpoint's name
    step: int | None
    dtype: str
    bytes: int  # of all weight files
    sha256: dict[str, str]  # by weight file
    base: str
    adapter_sha256: str
    weights_sha256: str  # of base weights and the adapter started from
    versions: dict[str, str]


def merge(
    run_dir: Path, *, checkpoint: str = "", dtype: str = "auto", out_dir: Path | None = None
) -> MergeReport:
    """See `training.engine.merge`."""
    trained = load_config(run_dir)
    config = dataclasses.replace(trained, device="cpu", dtype="float32", quantization="none")
    kept = find_kept(run_dir, checkpoint)
    final = out_dir or run_dir / MERGED_DIR
    check_config(config)
    _require_mergeable(config, final, run_dir, kept)
    dtype = _resolve_dtype(dtype, Path(config.model_path))
    make_quiet_and_deterministic()
    tokenizer = load_tokenizer(config)
    policy = load_kept(config, kept, Placement.choose(config), [greeting(tokenizer)])
    model = merged_model(policy, config, dtype)
    temporary = final.with_name(f".{final.name}-{uuid.uuid4().hex}.tmp")
    try:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(_readme(trained, kept, dtype), encoding="utf-8")
        for path in temporary.iterdir():
            flush_to_disk(path)
        flush_to_disk(temporary)
        if final.exists():
            remove_tree(final)
        temporary.replace(final)
        flush_to_disk(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _report(final, config, kept, dtype, policy)


def merged_model(policy: Policy, config: RunConfig, dtype: str) -> Any:
    """The base with the policy's adapter in its weights, rounded to `dtype`, as the base's own files describe it."""
    from transformers import AutoConfig

    model = policy.model
    if config.finetuning_type == "lora":
        try:
            model = model.merge_and_unload(safe_merge=True, adapter_names=[POLICY])
        except ValueError as error:
            raise RefusedError(
                f"The adapter cannot be merged: {str(error).splitlines()[0][:300]}",
                "Train again with a lower learning_rate, or choose an earlier checkpoint.",
            ) from error
    settings = AutoConfig.from_pretrained(config.model_path, local_files_only=True, trust_remote_code=False)
    model.config = settings  # the loaded one was changed for training
    model = model.to(getattr(torch, dtype))
    bad = [name for name, tensor in model.named_parameters() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise RefusedError(
            f"As {dtype}, {len(bad)} of the merged weights are no longer finite.",
            "Choose the dtype float32 or bfloat16.",
        )
    return model


def _require_mergeable(config: RunConfig, final: Path, run_dir: Path, kept: Kept) -> None:
    if kept.name == MODEL_DIR:
        raise RefusedError(
            "This run trained the whole model: there is no adapter to merge.",
            f"Take {run_dir.name}/{MODEL_DIR}, or name a checkpoint to be written as a model folder.",
        )
    settings = json.loads((Path(config.model_path) / "config.json").read_text(encoding="utf-8"))
    if settings.get("quantization_config"):
        raise RefusedError(
            "The base model's files are quantised: an adapter cannot be merged into rounded weights.",
            "Serve the adapter beside its base, or train on the model's unquantised files.",
        )
    protected = [
        run_dir,
        run_dir / ADAPTER_DIR,
        run_dir / MODEL_DIR,
        Path(config.model_path),
        Path(config.adapter_path or run_dir),
    ]
    if final.resolve() in [path.resolve() for path in protected]:
        raise RefusedError(f"{final} holds something else.", "Name another folder for the merged model.")
    if final.exists() and not (final / "config.json").is_file() and any(final.iterdir()):
        raise RefusedError(
            f"{final} is not empty and not a model.", "Name another folder for the merged model."
        )
    final.parent.mkdir(parents=True, exist_ok=True)


def _resolve_dtype(dtype: str, folder: Path) -> str:
    if dtype == "auto":
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype = str(settings.get("dtype") or settings.get("torch_dtype") or "float32")
    if dtype not in DTYPES:
        raise RefusedError(f"The dtype {dtype!r} is not known here.", f"Use {' or '.join(DTYPES)}.")
    return dtype


def _report(final: Path, config: RunConfig, kept: Kept, dtype: str, policy: Policy) -> MergeReport:
    files = sorted(final.glob("*.safetensors"))
    weights = kept.folder / ("adapter.safetensors" if kept.is_checkpoint else WEIGHTS_FILE)
    return {
        "path": str(final),
        "weights": kept.name,
        "step": kept.step,
        "dtype": dtype,
        "bytes": sum(path.stat().st_size for path in files),
        "sha256": {path.name: file_sha256(path) for path in files},
        "base": config.base_model_name or Path(config.model_path).name,
        "adapter_sha256": file_sha256(weights),
        "weights_sha256": policy.weights_sha256,
        "versions": versions(),
    }


def _readme(config: RunConfig, kept: Kept, dtype: str) -> str:
    base = config.base_model_name or Path(config.model_path).name
    note = " The adapter was trained over 4-bit weights, and merged into the unquantised ones."
    note = "" if config.quantization == "none" else note
    step = f" after {kept.step} steps" if kept.step is not None else ""
    what = (
        f"with an adapter trained by {config.method}{step} merged into its weights. Computed in float32 and"
    )
    if config.finetuning_type == "full":
        what = f"with all weights trained by {config.method}{step},"
    return (
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags:\n- {config.method}\n---\n\n"
        f"{base} {what} stored as {dtype}.{note}\n"
    )
