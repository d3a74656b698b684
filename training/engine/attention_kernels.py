"""Attention of a packed row, call by call: two kernels with their gradients, and which of them runs.

`flash` is the CPU's fused kernel. `matmul` writes scores out: it runs anywhere, for any dtype, and knows
soft-capped scores and sinks. Neither knows pairs or models.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from training.engine.pair_layout import PairLayout, Part, Span

Kernel = Literal["flash", "matmul"]
MATMUL_BLOCK = 512  # queries of one matmul call: bounds its scores to heads x 512 x keys


@dataclasses.dataclass(frozen=True)
class Scoring:
    """score = cap * tanh(scale * q.k / cap), or scale * q.k without a cap; a window of positions (0 = none)."""

    scale: float
    softcap: float = 0.0
    window: int = 0


def attend_by_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PairLayout,
    scoring: Scoring,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [1, H, T, D], key [1, G, T, D], value [1, G, T, E] of one dtype; sinks [H] -> [1, T, H, E].

    H is a multiple of G. A sink is one more score in each query's softmax, of a key without a value.
    """
    output: torch.Tensor = _AttentionByParts.apply(query, key, value, sinks, layout, scoring)  # type: ignore[no-untyped-call]
    return output


def choose_kernel(query: torch.Tensor, value: torch.Tensor, scoring: Scoring, *, sinks: bool) -> Kernel:
    plain = not (scoring.softcap or sinks) and query.shape[-1] == value.shape[-1]
    return "flash" if plain and query.device.type == "cpu" else "matmul"


class _AttentionByParts(torch.autograd.Function):
    """Gradients are written into one buffer each.

    Slices and `cat` under autograd would cost a full-size gradient per slice: O(pairs x T) instead of O(T).
    Grouped heads need no copy of the keys: groups are the batch, a group's heads share keys by a stride of 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        layout: PairLayout,
        scoring: Scoring,
    ) -> torch.Tensor:
        heads, length = query.shape[1:3]
        groups = key.shape[1]
        kernel = choose_kernel(query, value, scoring, sinks=sinks is not None)
        output = query.new_empty(1, length, heads, value.shape[-1])
        target = _by_group(output, groups)  # [G, H/G, T, E]
        q = query[0].view(groups, -1, length, query.shape[-1])
        totals = []
        for part in _parts(layout, scoring, kernel):
            mask = layout.mask(part, _working_dtype(query.dtype, kernel))
            k, v = _seen(key, part), _seen(value, part)
            tokens = part.queries.tokens
            run = _flash if kernel == "flash" else _matmul
            result, total = run(q[:, :, tokens], k, v, mask, scoring, _grouped(sinks, groups))
            target[:, :, tokens] = result
            totals.append(total)
        ctx.save_for_backward(query, key, value, sinks, output, *totals)
        ctx.layout, ctx.scoring, ctx.kernel = layout, scoring, kernel
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, output, *totals = ctx.saved_tensors
        groups, length = key.shape[1:3]
        q = query[0].view(groups, -1, length, query.shape[-1])
        out, grad = _by_group(output, groups), _by_group(gradients[0], groups)
        grad_query, grad_key, grad_value = torch.empty_like(q), torch.zeros_like(key), torch.zeros_like(value)
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
        run = _flash_backward if ctx.kernel == "flash" else _matmul_backward
        for part, total in zip(_parts(ctx.layout, ctx.scoring, ctx.kernel), totals, strict=True):
            mask = ctx.layout.mask(part, _working_dtype(query.dtype, ctx.kernel))
            tokens = part.queries.tokens
            dq, dk, dv = run(
                grad[:, :, tokens], q[:, :, tokens], _seen(key, part), _seen(value, part),
                out[:, :, tokens], total, mask, ctx.scoring,
            )  # fmt: skip
            grad_query[:, :, tokens] = dq
            _add(grad_key, part.keys, dk)
            _add(grad_value, part.keys, dv)
            if grad_sinks is not None:
                # The sink's value is nothing, so d L / d sink = -p(sink) * sum(out * d L / d out).
                shares = (_grouped(sinks, groups) - total).exp()
                slopes = (out[:, :, tokens] * grad[:, :, tokens]).sum(-1)
                grad_sinks -= (shares * slopes).sum(-1).flatten().to(grad_sinks.dtype)
        return grad_query.view_as(query), grad_key, grad_value, grad_sinks, None, None


def _parts(layout: PairLayout, scoring: Scoring, kernel: Kernel) -> tuple[Part, ...]:
    return layout.parts(scoring.window, MATMUL_BLOCK if kernel == "matmul" else 0)


def _working_dtype(dtype: torch.dtype, kernel: Kernel) -> torch.dtype:
    """What a call computes its scores in; its mask is of the same."""
    return _precise(dtype) if kernel == "matmul" else dtype


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _by_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """A view: [1, T, H, D] -> [G, H / G, T, D]."""
    _, length, heads, width = tensor.shape
    return tensor[0].reshape(length, groups, heads // groups, width).permute(1, 2, 0, 3)


def _grouped(sinks: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    """[H] -> [G, H / G, 1]."""
    return None if sinks is None else sinks.view(groups, -1, 1)


def _seen(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """[1, G, T, D] -> [G, keys, D]."""
    pieces = [tensor[0, :, span.tokens] for span in part.keys]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _add(total: torch.Tensor, spans: tuple[Span, ...], gradient: torch.Tensor) -> None:
    """[G, keys, D] is added where the keys came from."""
    done = 0
    for span in spans:
        total[0, :, span.tokens] += gradient[:, done : done + span.length]
        done += span.length


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [G, h, n, D], k and v [G, m, D] -> [G, h, n, D] and log sum exp [G, h, n]."""
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, _for_heads(k, q), _for_heads(v, q), 0.0, mask is None, attn_mask=mask, scale=scoring.scale
    )
    return result


def _flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, _for_heads(k, q), _for_heads(v, q), out, total, 0.0, mask is None,
        attn_mask=mask, scale=scoring.scale,
    )  # fmt: skip
    return dq, dk.sum(dim=1), dv.sum(dim=1)


def _for_heads(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[G, m, D] -> [G, h, m, D], the same memory for every head of a group."""
    return tensor[:, None].expand(-1, like.shape[1], -1, -1)


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores before and after the mask, [G, h, n, m], in float32 or better."""
    dtype = _precise(q.dtype)
    groups, heads, rows, width = q.shape
    flat = q.reshape(groups, heads * rows, width).to(dtype)
    scores = torch.bmm(flat, k.to(dtype).transpose(1, 2)).view(groups, heads, rows, -1)
    scores = scores.mul_(scoring.scale)
    if scoring.softcap:
        scores = scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    return scores, scores + (_causal(rows, dtype, q.device) if mask is None else mask)


def _causal(rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((rows, rows), float("-inf"), dtype=dtype, device=device).triu_(1)


def _matmul(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_flash`; v may have its own width. With sinks the log sum exp has them in it."""
    _, scores = _scores(q, k, mask, scoring)
    total = scores.logsumexp(dim=-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(total.dtype))
    shares = scores.sub_(total[..., None]).exp_().to(v.dtype)
    groups, heads, rows, keys = shares.shape
    result = torch.bmm(shares.view(groups, heads * rows, keys), v)
    return result.view(groups, heads, rows, -1), total


def _matmul_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With p = softmax: dv = p^T g; ds = p (g v^T - sum(out g)); through the cap times 1 - (s / cap)^2."""
    dtype = _precise(q.dtype)
    capped, scores = _scores(q, k, mask, scoring)
    shares = scores.sub_(total[..., None]).exp_()
    groups, heads, rows, keys = shares.shape

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(groups, heads * rows, -1)

    g = flat(grad)
    dv = torch.bmm(flat(shares).to(v.dtype).transpose(1, 2), g)
    slopes = torch.bmm(g.to(dtype), v.to(dtype).transpose(1, 2))
    slopes = slopes.view(groups, heads, rows, keys)
    slopes -= (out.to(dtype) * grad.to(dtype)).sum(dim=-1, keepdim=True)
    slopes *= shares
    if scoring.softcap:
        slopes *= 1 - (capped / scoring.softcap) ** 2
    slopes = flat(slopes.mul_(scoring.scale)).to(q.dtype)
    dq = torch.bmm(slopes, k).view(q.shape)
    dk = torch.bmm(slopes.transpose(1, 2), flat(q))
    return dq, dk, dv
