"""A reference that is a model of its own: which one, loaded when it is asked for, given up when room is short.

An adapter's run has its reference within it (the base, or a second adapter). A model of its own is needed
with full fine-tuning, whose weights move, and where another model was chosen as the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch

from training.contract import RunConfig
from training.engine.errors import RefusedError
from training.engine.starting_point import StartingPoint, open_starting_point, same_tokens

Model = TypeVar("Model")
# A parameter in training has a gradient and two moments of AdamW, in float32.
TRAINING_BYTES = 12
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class ReferenceChoice:
    """Which model the log-probabilities are compared with."""

    model_path: Path
    start: StartingPoint | None
    is_start: bool  # the model that training starts from
    within: bool  # computed by the policy's own weights, its adapter set aside
    sentence: str

    @classmethod
    def of(cls, config: RunConfig, start: StartingPoint | None) -> ReferenceChoice:
        own = Path(config.model_path)
        chosen = bool(config.reference_model_path or config.reference_adapter_path)
        path = Path(config.reference_model_path or own)
        same_base = path.resolve() == own.resolve()
        if not same_tokens(path, own):
            raise other_vocabulary(path)
        adapter = open_starting_point(config.reference_adapter_path) if chosen else start
        name = config.base_model_name or own.name
        sentence = f"The reference is {name if same_base else path.name}"
        if not chosen and start is not None:
            kind = "adapter" if start.is_adapter else "checkpoint"
            sentence += f" with the {kind} that training starts from"
        elif adapter is not None:
            sentence += f" with the adapter {adapter.folder.name}"
        return cls(path, adapter, not chosen, same_base and config.finetuning_type != "full", f"{sentence}.")


def other_vocabulary(path: Path) -> RefusedError:
    return RefusedError(
        f"The reference {path} has another vocabulary than the base model.",
        "Choose a reference of the same family as the base model, or none.",
    )


class SeparateReference(Generic[Model]):
    """Loaded at the first use; kept where it fits beside the training, else loaded again at each evaluation."""

    def __init__(self, load: Callable[[], Model], *, num_bytes: int, num_trainable: int) -> None:
        self._load, self._bytes, self._trainable = load, num_bytes, num_trainable
        self._loaded: Model | None = None
        self._keep: bool | None = None

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    def get(self) -> Model:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def rest(self, device: torch.device, agree: Callable[[bool], bool] = bool) -> None:
        """It is not needed for a while. Decided once, before the optimizer has its memory, by all ranks together."""
        if self._keep is None:
            needed = self._trainable * TRAINING_BYTES + self._bytes  # as much again for what a step computes
            self._keep = agree(free_memory(device) >= needed)
        if not self._keep:
            self._loaded = None
            if device.type == "cuda":
                torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the device, or of the machine and the container on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    if MEMINFO.is_file():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        found.append(int(text) - int(used.read_text()))
    return min(found, default=0)
