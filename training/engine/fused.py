"""Fewer passes over memory for stock Llama-like blocks: LoRA beside its frozen layer, gated MLPs, RMS norms.

Each function computes what peft and transformers compute, keeps less for the backward pass and leaves no
temporary tensors behind; of low weights it rounds less than they do. A module is taken over only when its parts
are the plain ones and a trial gives the same; everything else stays as it is.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from training.engine.cpu_products import multiply
from training.engine.products import LOW, operand_dtype, product

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
FINE, COARSE_TOLERANCE = 1e-5, 0.05  # low weights: what only multiplies by them, and products
TRIAL_ROWS = 3


@dataclasses.dataclass(frozen=True)
class Lora:
    """What a forward of one LoRA layer needs: y = x W^T + bias + scale * dropout(x) A^T B^T."""

    weight: torch.Tensor  # [out, in], frozen
    bias: torch.Tensor | None
    scale: float
    dropout: float  # probability, 0 outside training


def _dropped(x: torch.Tensor, keep: torch.Tensor | None, dropout: float) -> torch.Tensor:
    return x if keep is None else (x * keep).mul_(1 / (1 - dropout))


def _draw(x: torch.Tensor, dropout: float) -> torch.Tensor | None:
    """A byte an element: autograd's dropout would keep four, and a dropped copy of x beside them."""
    return None if dropout == 0 else torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)


def _forward(
    x: torch.Tensor, keep: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, lora: Lora
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in] -> y [T, out] and h = dropout(x) A^T [T, r], in float32 where the frozen weight is lower."""
    y = product(x, lora.weight)
    if lora.bias is not None:
        y += lora.bias
    h = product(_dropped(x, keep, lora.dropout), a)
    if b.dtype == y.dtype:
        y.addmm_(h, b.T, alpha=lora.scale)
    else:
        y.add_(product(h, b), alpha=lora.scale)
    return y, h


def _backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    keep: torch.Tensor | None,
    h: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    lora: Lora,
    *,
    wants_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients of x [T, in], A [r, in] and B [out, r] from that of y [T, out]."""
    inner = multiply(gradient, b.T).mul_(lora.scale)
    grad_b = multiply(h.T, gradient.T).mul_(lora.scale).T
    grad_a = multiply(inner.T, _dropped(x, keep, lora.dropout).T)
    if not wants_x:
        return None, grad_a, grad_b
    grad_x = multiply(gradient, lora.weight.T)
    if keep is None:
        grad_x.addmm_(inner, a)
    else:
        grad_x += _dropped(inner @ a, keep, lora.dropout)
    return grad_x, grad_a, grad_b


class _LoraLinear(torch.autograd.Function):
    """Keeps x and h; peft keeps x (with dropout: a noise and a copy of it) and two products of y's size."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, lora: Lora) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        keep = _draw(flat, lora.dropout)
        with torch.autocast(x.device.type, enabled=False):
            y, h = _forward(flat, keep, *_operands(lora, a, b), lora)
        ctx.save_for_backward(*_in_dtype_of(lora, flat, h), keep, a, b)
        ctx.lora, ctx.shape, ctx.dtype = lora, x.shape, x.dtype
        return torch.Tensor.view(y, *x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, keep, a, b = ctx.saved_tensors
        (gradient,) = _in_dtype_of(ctx.lora, gradients[0].reshape(-1, gradients[0].shape[-1]))
        low, high = _in_dtype_of(ctx.lora, a, b)
        grad_x, grad_a, grad_b = _backward(
            gradient, x, keep, h, low, high, ctx.lora, wants_x=ctx.needs_input_grad[0]
        )
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
        return grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype), None


class _GatedLoraLinear(torch.autograd.Function):
    """down(silu(gate) * up) with LoRA on down: keeps gate and up, and multiplies them again."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, a: torch.Tensor, b: torch.Tensor, lora: Lora
    ) -> torch.Tensor:
        active = functional.silu(gate).mul_(up)
        flat = active.reshape(-1, active.shape[-1])
        keep = _draw(flat, lora.dropout)
        with torch.autocast(gate.device.type, enabled=False):
            y, h = _forward(flat, keep, *_operands(lora, a, b), lora)
        ctx.save_for_backward(*_in_dtype_of(lora, gate, up, h), keep, a, b)
        ctx.lora, ctx.dtype = lora, gate.dtype
        return torch.Tensor.view(y, *gate.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, h, keep, a, b = ctx.saved_tensors
        (gradient,) = _in_dtype_of(ctx.lora, gradients[0].reshape(-1, gradients[0].shape[-1]))
        active = functional.silu(gate)
        flat = (active * up).reshape(-1, up.shape[-1])
        low, high = _in_dtype_of(ctx.lora, a, b)
        grad, grad_a, grad_b = _backward(gradient, flat, keep, h, low, high, ctx.lora, wants_x=True)
        assert grad is not None  # noqa: S101
        grad = grad.view(gate.shape)
        grad_up = active.mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad.mul_(up), gate)
        grad_gate, grad_up = grad_gate.to(ctx.dtype), grad_up.to(ctx.dtype)
        return grad_gate, grad_up, grad_a.to(a.dtype), grad_b.to(b.dtype), None


class _RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4), weight frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        scaled = gradients[0] * weight
        along = (scaled * x).mean(-1, keepdim=True).mul_(inverse.square())
        return scaled.addcmul_(x, along, value=-1).mul_(inverse), None, None


def _operands(lora: Lora, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in what the forward pass computes with."""
    dtype = operand_dtype(lora.weight)
    return a.to(dtype), b.to(dtype)


def _in_dtype_of(lora: Lora, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is kept for the backward pass, and what it multiplies, is in the dtype of the frozen weight."""
    return tuple(tensor.to(lora.weight.dtype) for tensor in tensors)


# --- taking over modules ----------------------------------------------------------------------------------
def fuse(model: nn.Module, adapter: str) -> int:
    """Take over what can be; returns how many modules were. `adapter` is the one that is trained."""
    count = 0
    for module in model.modules():
        count += _fuse_mlp(module, adapter) or _fuse_norm(module)
    for module in model.modules():
        if _is_plain_lora(module, adapter):
            _take_over(module, _lora_forward(module))
            count += 1
    return count


def _plain_adapters(module: Any) -> frozenset[str]:
    """Found out once: a forward pass asks of each of hundreds of layers."""
    return frozenset(name for name in module.lora_A if _is_plain_lora(module, name))


def _is_plain_lora(module: nn.Module, adapter: str) -> bool:
    from peft.tuners.lora import Linear

    if type(module) is not Linear or adapter not in module.lora_A or adapter in module.lora_variant:
        return False
    base, a, b = module.get_base_layer(), module.lora_A[adapter], module.lora_B[adapter]
    dropout = module.lora_dropout[adapter]
    plain = type(base) is nn.Linear and type(a) is nn.Linear and type(b) is nn.Linear
    frozen = plain and not any(parameter.requires_grad for parameter in base.parameters())
    return (
        frozen and a.bias is None and b.bias is None and type(dropout) in (nn.Dropout, nn.Identity)
        and not module.fan_in_fan_out and not module.merged
    )  # fmt: skip


Call = tuple[torch.Tensor, torch.Tensor, Lora]  # A, B, and the rest


def _call(module: Any, x: torch.Tensor, plain: frozenset[str]) -> Call | None:
    """None where this call is not one `plain` adapter's alone, or its dtypes are not what is computed here.

    Without gradient peft's own way is kept, whose last digits others know, unless weights are low: there it rounds
    more, and policy, evaluation and reference must round alike.
    """
    active = module.active_adapters
    if module.disable_adapters or module.merged or len(active) != 1 or active[0] not in plain:
        return None
    name = active[0]
    base, dropout = module.get_base_layer(), module.lora_dropout[name]
    kind = x.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if base.weight.dtype != computed or not (torch.is_grad_enabled() or computed in LOW):
        return None
    share = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
    lora = Lora(base.weight, base.bias, module.scaling[name], share)
    return module.lora_A[name].weight, module.lora_B[name].weight, lora


def _lora_forward(module: Any) -> Callable[..., torch.Tensor]:
    original, plain = module.forward, _plain_adapters(module)

    def forward(self: Any, x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        call = None if arguments or keywords else _call(self, x, plain)
        if call is None:
            result: torch.Tensor = original(x, *arguments, **keywords)
            return result
        result = _LoraLinear.apply(x, *call)  # type: ignore[no-untyped-call]
        return result

    return forward


def _fuse_mlp(module: Any, adapter: str) -> bool:
    """down(silu(gate(x)) * up(x)), recognised by its parts' names and by trying."""
    down: Any = getattr(module, "down_proj", None)
    parts = (getattr(module, "gate_proj", None), getattr(module, "up_proj", None), down)
    if not all(isinstance(part, nn.Module) for part in parts) or not _is_plain_lora(down, adapter):
        return False
    activation = getattr(module, "act_fn", None)
    original, plain = module.forward, _plain_adapters(down)
    hidden = down.get_base_layer().out_features

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        call = _call(self.down_proj, gate, plain)
        if call is None:
            result: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
            return result
        result = _GatedLoraLinear.apply(gate, up, *call)  # type: ignore[no-untyped-call]
        return result

    if activation is None or not _takes_one(module) or not _is_silu(activation):
        return False
    if not _same(module, original, forward, hidden):
        return False
    _take_over(module, forward)
    return True


def _fuse_norm(module: Any) -> bool:
    """Any module that is an RMS norm by what it has and by what it gives."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, nn.Parameter) or weight.requires_grad:
        return False
    if not isinstance(epsilon, float) or weight.dtype not in (*TOLERANCE, *LOW) or not _takes_one(module):
        return False
    original = module.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        # A weight kept lower than the residual stream takes part in float32, as transformers' norms do it.
        if torch.promote_types(x.dtype, self.weight.dtype) != x.dtype or not torch.is_grad_enabled():
            kept: torch.Tensor = original(x)
            return kept
        result: torch.Tensor = _RmsNorm.apply(x, self.weight, epsilon)  # type: ignore[no-untyped-call]
        return result

    if not _same(module, original, forward, weight.shape[0], limit=TOLERANCE.get(weight.dtype, FINE)):
        return False
    _take_over(module, forward)
    return True


def _takes_one(module: nn.Module) -> bool:
    """x and nothing else: a gated norm takes a gate beside it."""
    return len(inspect.signature(module.forward).parameters) == 1


def _is_silu(activation: nn.Module) -> bool:
    """On a line, in float32: near 0 many functions look alike."""
    line = torch.linspace(-6, 6, 25)
    try:
        return bool(torch.allclose(activation(line), functional.silu(line), atol=1e-6))
    except (TypeError, RuntimeError):
        return False


def _take_over(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    module.forward = types.MethodType(forward, module)


def _same(
    module: nn.Module, theirs: Callable[..., Any], ours: Callable[..., Any], width: int, *, limit: float = 0
) -> bool:
    """Both on random rows of the width that the module takes, without dropout; low weights as in a run."""
    weight = next(module.parameters())
    low = weight.dtype in LOW
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, TRIAL_ROWS, width, generator=draw)
    x = x.to(weight.device, torch.float32 if low else weight.dtype)
    was_training = module.training
    module.eval()
    try:
        with (
            torch.enable_grad(),
            torch.autocast(x.device.type, dtype=weight.dtype if low else None, enabled=low),
        ):
            expected, found = theirs(x).double(), ours(module, x).double()
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return False
    finally:
        module.train(was_training)
    limit = limit or TOLERANCE.get(weight.dtype, COARSE_TOLERANCE)
    return bool((expected - found).norm() <= limit * expected.norm())
