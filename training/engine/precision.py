"""Which weights of a frozen model are lowered to bfloat16: those that autocast would lower, and no other.

Matrix products take bfloat16 in either case. Embeddings and norms stay as the checkpoint has them: lowering
those of a float32 checkpoint made errors of gradients 10 to 20 % larger, and they are few.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def loading_dtype(settings: Any, wanted: torch.dtype) -> torch.dtype:
    """What to read the weights as: a float32 checkpoint is read whole before `lower` picks."""
    kept: Any = getattr(settings.get_text_config(), "dtype", None) or getattr(settings, "dtype", None)
    return torch.float32 if kept in (torch.float32, "float32") else wanted


def lower(base: Any, dtype: torch.dtype) -> None:
    """In place: linear layers and stacked experts. A head that shares the embeddings' weight stays."""
    embeddings = base.get_input_embeddings().weight
    for module in base.modules():
        if isinstance(module, nn.Linear) and module.weight is not embeddings:
            module.to(dtype)
    for parameter in base.parameters():
        if parameter.ndim == 3:
            parameter.data = parameter.data.to(dtype)


def projection_weight(decoder: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The head's weight in what the decoder's linear layers are kept in, if that is lower: else itself."""
    kept = [
        module.weight.dtype
        for module in decoder.modules()
        if isinstance(module, nn.Linear) and module.weight.is_floating_point()
    ]
    lowest = min(kept, key=lambda dtype: dtype.itemsize, default=weight.dtype)
    return weight.detach().to(lowest) if lowest.itemsize < weight.dtype.itemsize else weight
