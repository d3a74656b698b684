"""Matrix products of a frozen model: operands may be low, what comes out of the forward is float32.

Autocast rounds what each linear layer gives to bfloat16. These roundings, carried from layer to layer, are most of
what a gradient is off by: without them its error was half (DECISIONS.md). Trained and quantised weights and stacked
experts are not concerned. A GPU accumulates in float32 anyway and gives that away for more memory traffic; a CPU has
no such product, so the forward is computed in float32 there, weight by weight. Backward products take bfloat16 and
give it: they were measured to add next to nothing. What is in float32 on a CPU goes through `cpu_products`.
"""

from __future__ import annotations

import functools
import logging
import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from training.engine.cpu_products import multiply, prefers_onednn

logger = logging.getLogger(__name__)
LOW = (torch.bfloat16, torch.float16)
FLOAT32_BETWEEN = "float32 between products"  # what numbers of a run in a low precision depend on


def computes_low(device: torch.device) -> bool:
    """Whether products of low operands are worth having there: in a CPU's there is little speed and much error."""
    return device.type != "cpu"


def operand_dtype(weight: torch.Tensor, wanted: torch.dtype | None = None) -> torch.dtype:
    """What `product` computes with where the weight is asked for in `wanted` (None: as it is kept)."""
    dtype = wanted or weight.dtype
    return torch.float32 if dtype in LOW and not computes_low(weight.device) else dtype


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, in] weight^T [in, out] -> [n, out] in float32, or in what the weight is kept in if that is not lower.

    x may be kept in more than the weight. Call it with autocast off.
    """
    dtype = operand_dtype(weight)
    x, weight = x.to(dtype), weight.to(dtype)
    return wide_product(x, weight) if dtype in LOW else multiply(x, weight)


def wide_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, in] weight^T [in, out] of low operands, summed and given in float32 where the device can."""
    return _mixed(x, weight.T) if gives_float32(x.device.type, x.dtype) else (x @ weight.T).float()


def _mixed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    wide: torch.Tensor = torch.ops.aten.mm.dtype(x, y, torch.float32)
    return wide


@functools.cache
def gives_float32(device: str, dtype: torch.dtype) -> bool:
    """Tried once: whether this device's products have an output of another type than their operands."""
    one = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return bool((_mixed(one, one) == 16).all())
    except torch.OutOfMemoryError:
        raise  # says nothing about the device
    except (RuntimeError, AttributeError):
        logger.info(
            "Products of %s on %s are rounded to it: none that give float32 are there.", dtype, device
        )
        return False


class _WideLinear(torch.autograd.Function):
    """x [..., in] -> [..., out] of a frozen weight: needs nothing of x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = product(x.reshape(-1, x.shape[-1]), weight)
            if bias is not None:
                y += bias
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        with torch.autocast(gradients[0].device.type, enabled=False):
            flat = gradients[0].reshape(-1, weight.shape[0]).to(weight.dtype)
            return multiply(flat, weight.T).view(ctx.shape).to(ctx.dtype), None, None


def widen(decoder: nn.Module) -> int:
    """Let frozen linear layers compute by `product` from now on, where that is better; returns how many do.

    Layers that are kept low give float32 then. Those in float32 give what they gave, faster.
    """
    count = 0
    for module in decoder.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad and _gains(module.weight):
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
            count += 1
    return count


def _gains(weight: torch.Tensor) -> bool:
    if weight.dtype in LOW:
        return True
    return weight.dtype is torch.float32 and weight.device.type == "cpu" and prefers_onednn()


def _forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if self.weight.dtype not in LOW and torch.is_autocast_enabled(x.device.type):
        return functional.linear(
            x, self.weight, self.bias
        )  # autocast rounds this one, as it does its neighbours
    result: torch.Tensor = _WideLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
    return result
