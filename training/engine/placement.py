"""Where a run computes and in what precision: refuses what the machine does not have."""

from __future__ import annotations

import dataclasses

import torch

from training.contract import RunConfig
from training.engine.distributed import ALONE, World
from training.engine.errors import RefusedError
from training.engine.quantization import check_quantization


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the model computes and in what."""

    device: torch.device
    dtype: torch.dtype
    world: World = ALONE

    @classmethod
    def choose(cls, config: RunConfig, world: World = ALONE) -> Placement:
        cuda = torch.cuda.is_available()
        if config.device not in {"auto", "cpu", "cuda"}:
            raise RefusedError(f"The device {config.device!r} is not known.", "Use auto, cpu or cuda.")
        if config.device == "cuda" and not cuda:
            raise RefusedError("This machine has no usable CUDA device.", "Choose the device auto or cpu.")
        on_cuda = cuda and config.device != "cpu"
        bf16 = on_cuda and torch.cuda.is_bf16_supported()
        names = {"auto": "bfloat16" if bf16 else "float32", "float32": "float32", "bfloat16": "bfloat16"}
        if config.dtype not in names:
            raise RefusedError(f"The dtype {config.dtype!r} is not known.", "Use auto, float32 or bfloat16.")
        if config.dtype == "bfloat16" and on_cuda and not bf16:
            raise RefusedError("This GPU has no bfloat16.", "Choose the dtype auto or float32.")
        device = torch.device("cpu")
        if on_cuda:
            device = torch.device("cuda", world.local_rank)
            torch.cuda.set_device(device)
        check_quantization(config, device)
        return cls(device, getattr(torch, names[config.dtype]), world)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=not self.exact)
