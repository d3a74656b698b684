"""Checkpoints: tensors as safetensors, state as JSON, a sealed manifest of hashes. Complete or not there.

A checkpoint is written beside, flushed, renamed into place and read back before an older one goes. Loading
takes the newest that verifies; a damaged one of this run is set aside as `.bad`. No resume without
optimizer state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.contract import (
    CHECKPOINT_FILES,
    CHECKPOINTS_DIR,
    MANIFEST_FILE,
    checkpoint_name,
    file_sha256,
    manifest_seal,
    read_manifest,
    verify_checkpoint,
)

KEEP = 2
REPLACED = ".replaced-"  # before the name of a checkpoint that a newer one of the same step replaces
ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE = CHECKPOINT_FILES
Tensors = dict[str, torch.Tensor]
logger = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """Tensors with NaN or Inf are not worth keeping."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """What makes two runs the same trajectory: a checkpoint goes on only under the same one."""

    config_sha256: str
    data_sha256: str
    weights_sha256: str


@dataclasses.dataclass(frozen=True)
class Loaded:
    path: Path
    step: int
    state: dict[str, Any]
    fingerprint: dict[str, str]


def save_checkpoint(
    run_dir: Path,
    *,
    step: int,
    run_id: str,
    identity: Identity,
    fingerprint: Mapping[str, str],
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    spare: int = 0,
    extra_files: Mapping[str, str] | None = None,
) -> Path:
    """Write, verify, then prune. Raises `NonFiniteError` before touching the disk."""
    from safetensors.torch import save_file

    adapter = {name: tensor.detach().cpu().contiguous() for name, tensor in trainable.items()}
    moments = _optimizer_tensors(trainable, optimizer)
    require_finite(adapter | moments)
    folder = run_dir / CHECKPOINTS_DIR
    folder.mkdir(exist_ok=True)
    final = folder / checkpoint_name(step)
    temporary, replaced = folder / f".tmp-{uuid.uuid4().hex}", folder / f"{REPLACED}{final.name}"
    temporary.mkdir()
    try:
        save_file(adapter, temporary / ADAPTER_FILE)
        save_file(moments, temporary / OPTIMIZER_FILE)
        texts = {STATE_FILE: json.dumps(state, sort_keys=True)} | dict(extra_files or {})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        manifest = {
            "format": 1,
            "run_id": run_id,
            "step": step,
            **dataclasses.asdict(identity),
            "fingerprint": dict(fingerprint),
            "files": {name: _facts(temporary / name) for name in (ADAPTER_FILE, OPTIMIZER_FILE, *texts)},
        }
        sealed = manifest | {"seal": manifest_seal(manifest)}
        (temporary / MANIFEST_FILE).write_text(json.dumps(sealed, indent=1, sort_keys=True), encoding="utf-8")
        for path in temporary.iterdir():
            flush_to_disk(path)
        flush_to_disk(temporary)
        if final.exists():  # it may be the only one: out of the way, but not gone before the new one is there
            shutil.rmtree(replaced, ignore_errors=True)
            final.replace(replaced)
        temporary.replace(final)
        flush_to_disk(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(folder)
        raise
    verify_checkpoint(final)
    shutil.rmtree(replaced, ignore_errors=True)
    prune_checkpoints(run_dir, spare=spare)
    return final


def prune_checkpoints(run_dir: Path, *, spare: int) -> None:
    """Down to the newest KEEP and that of the step `spare`."""
    for old in _newest_first(run_dir / CHECKPOINTS_DIR)[KEEP:]:
        if old.name != checkpoint_name(spare):
            remove_tree(old)


def find_checkpoint(
    run_dir: Path, resume_from: str, identity: Identity, *, say: Callable[[str], None]
) -> Loaded | None:
    """The newest verified checkpoint of this trajectory: of this run, or where `resume_from` lies."""
    for path in _candidates(run_dir, resume_from):
        own = path.parent == run_dir / CHECKPOINTS_DIR
        try:
            step = verify_checkpoint(path)
            manifest = read_manifest(path)
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError) as error:
            say(f"The checkpoint {path.name} cannot be used, the one before it is taken: {error}")
            if own:
                path.replace(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.bad"))
            continue
        if any(manifest.get(key) != value for key, value in dataclasses.asdict(identity).items()):
            say(f"The checkpoint {path.name} belongs to other settings, data or weights and is left alone.")
            continue
        return Loaded(path, step, state, manifest["fingerprint"])
    return None


def restore(loaded: Loaded, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimizer state back, by name; every name must be there."""
    from safetensors.torch import load_file

    restore_weights(loaded.path, trainable)
    moments = load_file(loaded.path / OPTIMIZER_FILE)
    for name, parameter in trainable.items():
        found = {
            key.rpartition("/")[2]: value for key, value in moments.items() if key.startswith(f"{name}/")
        }
        if set(found) != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"the checkpoint has no optimizer state for {name}")
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in found.items()}


def restore_weights(path: Path, trainable: Mapping[str, nn.Parameter]) -> None:
    """Put the weights of a checkpoint back; every name must be there."""
    from safetensors.torch import load_file

    adapter = load_file(path / ADAPTER_FILE)
    if set(adapter) != set(trainable):
        raise ValueError("the checkpoint's weights have other names than the model's")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(adapter[name])


def adopt_checkpoint(run_dir: Path, source: Path, step: int) -> Path | None:
    """Give this run a checkpoint of the run directory `source`, which may go; None when there is none."""
    found, own = (folder / CHECKPOINTS_DIR / checkpoint_name(step) for folder in (source, run_dir))
    if own.is_dir() or not found.is_dir():
        return None
    own.parent.mkdir(exist_ok=True)
    temporary = own.parent / f".tmp-{uuid.uuid4().hex}"
    shutil.copytree(found, temporary, copy_function=link_or_copy)
    temporary.replace(own)
    return own


def link_or_copy(source: str, target: str) -> None:
    """The same bytes under a second name, where the file system can; nobody writes into them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def require_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{name} has numbers that are not finite")


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """One hash over names and bytes."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def flush_to_disk(path: Path) -> None:
    """fsync of a file or a directory; a rename is durable only when the directory is flushed too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Out of sight by one rename first: a half-deleted directory is never taken for a whole one."""
    trash = path.with_name(f".trash-{uuid.uuid4().hex}")
    path.replace(trash)
    shutil.rmtree(trash, ignore_errors=True)


def clean_leftovers(run_dir: Path) -> None:
    """Temporary directories of an attempt that died, perhaps while it replaced a checkpoint."""
    folder = run_dir / CHECKPOINTS_DIR
    _put_back(folder)
    for path in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _put_back(folder: Path) -> None:
    for path in folder.glob(f"{REPLACED}*"):
        original = folder / path.name.removeprefix(REPLACED)
        if original.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.replace(original)


def _optimizer_tensors(trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensors:
    """AdamW's state, flattened to `<parameter>/<key>`; a parameter without state is an error."""
    flat: Tensors = {}
    for name, parameter in trainable.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            flat[f"{name}/{key}"] = (
                torch.as_tensor(optimizer.state[parameter][key]).detach().cpu().contiguous()
            )
    return flat


def _facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    """A folder of another name, a copy, is asked itself; -1 if it cannot say."""
    if path.name[:5] == "step-" and path.name[5:].isdigit():
        return int(path.name[5:])
    try:
        return int(read_manifest(path)["step"])
    except (ValueError, KeyError):
        return -1


def _candidates(run_dir: Path, resume_from: str) -> list[Path]:
    """The newest first, and of one step this run's before the other's.

    Not all of this run's first: a run that goes on from another takes along that one's best, which may be older.
    """
    found = _newest_first(run_dir / CHECKPOINTS_DIR)
    if resume_from:
        given = Path(resume_from)
        latest = _step(given)
        found += [given, *(path for path in _newest_first(given.parent) if _step(path) < latest)]
    return sorted(dict.fromkeys(found), key=_step, reverse=True)
