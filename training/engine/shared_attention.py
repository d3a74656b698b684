"""Attention over packed pairs: chosen and rejected both follow the one prompt and cannot see each other.

Registered with transformers under one name; a call without a layout (generation, the padded path) is plain
SDPA. For a pair of prompt p, chosen c, rejected r lying as [p c r]: p and c are one causal sequence; r looks
at p and, causally, at itself. This is prefix sharing as in arXiv 2410.20305, exact, without a T x T mask.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"


class LayoutError(RuntimeError):
    """This model asks something of attention that packed pairs do not give; the padded path must run."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Where a pair lies in the row: prompt from start, chosen from prompt_end, rejected from chosen_end.

    An SFT example has no rejected side: chosen_end == end.
    """

    start: int
    prompt_end: int
    chosen_end: int
    end: int

    @property
    def longest_side(self) -> int:
        prompt = self.prompt_end - self.start
        return prompt + max(self.chosen_end - self.prompt_end, self.end - self.chosen_end)


@dataclasses.dataclass(frozen=True, eq=False)
class PairLayout:
    """The segments of one packed row, and what the kernels need of them, made once for all layers."""

    segments: tuple[Segment, ...]
    device: torch.device

    @property
    def longest_side(self) -> int:
        return max(segment.longest_side for segment in self.segments)

    @functools.cached_property
    def masks(self) -> dict[tuple[int, torch.dtype], torch.Tensor]:
        return {}

    def rejected_mask(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive [R, P + R]: all of the prompt, and the rejected side causally."""
        found = self.masks.get((index, dtype))
        if found is None:
            segment = self.segments[index]
            rejected = segment.end - segment.chosen_end
            prompt = segment.prompt_end - segment.start
            blocked = torch.full((rejected, rejected), float("-inf"), dtype=dtype, device=self.device).triu_(
                1
            )
            free = torch.zeros(rejected, prompt, dtype=dtype, device=self.device)
            found = self.masks[index, dtype] = torch.cat([free, blocked], dim=1)
        return found

    @functools.cached_property
    def varlen(self) -> VarlenIndex:
        return VarlenIndex.of(self)


@dataclasses.dataclass(frozen=True, eq=False)
class VarlenIndex:
    """Two variable-length calls: [p c] causal on itself, then r over [p r] aligned at the bottom right.

    Without any rejected side (`queries_max` 0) there is no second call.
    """

    first: torch.Tensor  # token indices of all [p c]
    first_cu: torch.Tensor  # cumulative lengths, int32
    first_max: int
    queries: torch.Tensor  # token indices of all r
    queries_cu: torch.Tensor
    queries_max: int
    keys: torch.Tensor  # token indices of all [p r]
    keys_cu: torch.Tensor
    keys_max: int
    back: torch.Tensor  # order of the row in cat(first, queries)

    @classmethod
    def of(cls, layout: PairLayout) -> VarlenIndex:
        device = layout.device

        def gathered(ranges: list[list[range]]) -> tuple[torch.Tensor, torch.Tensor, int]:
            lengths = [sum(len(part) for part in parts) for parts in ranges]
            tokens = [i for parts in ranges for part in parts for i in part]
            index = torch.tensor(tokens, dtype=torch.int64, device=device)
            ends = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
            return index, ends, max(lengths, default=0)

        first = gathered([[range(s.start, s.chosen_end)] for s in layout.segments])
        segments = [s for s in layout.segments if s.end > s.chosen_end]
        queries = gathered([[range(s.chosen_end, s.end)] for s in segments])
        keys = gathered([[range(s.start, s.prompt_end), range(s.chosen_end, s.end)] for s in segments])
        back = torch.argsort(torch.cat([first[0], queries[0]]))
        return cls(*first, *queries, *keys, back)


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pair_layout: PairLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query [1, H, T, D], key and value [1, G, T, D] (H a multiple of G) -> [1, T, H, D]."""
    if pair_layout is None:
        result: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    window = kwargs.get("sliding_window")
    if window is not None and pair_layout.longest_side > window:
        raise LayoutError("a sliding window shorter than the pair")
    if dropout or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise LayoutError("attention with dropout, soft-capping or sinks")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if query.device.type == "cpu" and query.dtype == key.dtype == value.dtype:
        output = _CpuAttention.apply(query, key, value, pair_layout, scale)  # type: ignore[no-untyped-call]
    elif query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16):
        output = _varlen(query, key, value, pair_layout.varlen, scale)
    else:
        output = _by_sdpa(query, key, value, pair_layout, scale)
    return output, None


class _CpuAttention(torch.autograd.Function):
    """Pair by pair through the flash kernel of the CPU, gradients written into one buffer each.

    Slices and `cat` under autograd would cost a full-size gradient per slice: O(pairs x T) instead of O(T).
    Grouped heads need no copy of the keys: groups are the batch, a group's heads share keys by a stride of 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: PairLayout,
        scale: float,
    ) -> torch.Tensor:
        heads, length, width = query.shape[1:]
        groups = key.shape[1]
        output = query.new_empty(1, length, heads, width)
        target = _by_group(output, groups)  # [G, H/G, T, D]
        q, (k, v) = query[0].view(groups, -1, *query.shape[2:]), (key[0][:, None], value[0][:, None])
        sums = []
        for index in range(len(layout.segments)):
            for queries, keys, mask in _parts(layout, index, query.dtype):
                part, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q[:, :, queries], _shared(k, keys, q), _shared(v, keys, q), 0.0, mask is None,
                    attn_mask=mask, scale=scale,
                )  # fmt: skip
                target[:, :, queries] = part
                sums.append(total)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        query, key, value, output, *sums = ctx.saved_tensors
        groups = key.shape[1]
        q, (k, v) = query[0].view(groups, -1, *query.shape[2:]), (key[0][:, None], value[0][:, None])
        out, grad = (_by_group(x, groups) for x in (output, gradients[0]))
        grad_query, grad_key, grad_value = (
            torch.empty_like(query),
            torch.zeros_like(key),
            torch.zeros_like(value),
        )
        target = grad_query[0].view(groups, -1, *query.shape[2:])
        remaining = iter(sums)
        for index in range(len(ctx.layout.segments)):
            for queries, keys, mask in _parts(ctx.layout, index, query.dtype):
                dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad[:, :, queries], q[:, :, queries], _shared(k, keys, q), _shared(v, keys, q),
                    out[:, :, queries], next(remaining), 0.0, mask is None, attn_mask=mask, scale=ctx.scale,
                )  # fmt: skip
                target[:, :, queries] = dq
                _add(grad_key, keys, dk)
                _add(grad_value, keys, dv)
        return grad_query, grad_key, grad_value, None, None


def _by_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """A view: [1, T, H, D] -> [G, H / G, T, D]."""
    _, length, heads, width = tensor.shape
    return tensor[0].reshape(length, groups, heads // groups, width).permute(1, 2, 0, 3)


Part = tuple[slice, tuple[slice, ...], torch.Tensor | None]


def _parts(layout: PairLayout, index: int, dtype: torch.dtype) -> tuple[Part, ...]:
    """The calls of a pair, two or one: which queries look at which keys, and the mask (None = causal)."""
    s = layout.segments[index]
    sequence, prompt = slice(s.start, s.chosen_end), slice(s.start, s.prompt_end)
    rejected = slice(s.chosen_end, s.end)
    first: Part = (sequence, (sequence,), None)
    if s.end == s.chosen_end:
        return (first,)
    return first, (rejected, (prompt, rejected), layout.rejected_mask(index, dtype))


def _shared(tensor: torch.Tensor, slices: tuple[slice, ...], like: torch.Tensor) -> torch.Tensor:
    """[G, 1, T, D] -> the tokens of `slices`, seen by every head of the group without a copy per head."""
    parts = [tensor[:, :, part] for part in slices]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return joined.expand(-1, like.shape[1], -1, -1)


def _add(total: torch.Tensor, slices: tuple[slice, ...], gradient: torch.Tensor) -> None:
    """Sum over the heads of a group and add where the keys came from."""
    summed, done = gradient.sum(dim=1), 0
    for part in slices:
        length = part.stop - part.start
        total[0, :, part] += summed[:, done : done + length]
        done += length


def _by_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PairLayout, scale: float
) -> torch.Tensor:
    """The same by torch's own attention, for any device and dtype."""
    rows = []
    for index in range(len(layout.segments)):
        for queries, keys, mask in _parts(layout, index, query.dtype):
            k, v = (torch.cat([x[:, :, part] for part in keys], dim=2) for x in (key, value))
            rows.append(
                functional.scaled_dot_product_attention(
                    query[:, :, queries],
                    k,
                    v,
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=scale,
                    enable_gqa=True,
                )
            )
    return torch.cat(rows, dim=2).transpose(1, 2)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: VarlenIndex, scale: float
) -> torch.Tensor:
    """Two calls of torch's variable-length flash attention; no mask, no padding."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    first = varlen_attn(
        q[index.first], k[index.first], v[index.first], index.first_cu, index.first_cu,
        index.first_max, index.first_max, scale=scale, window_size=(-1, 0), enable_gqa=True,
    )  # fmt: skip
    assert isinstance(first, torch.Tensor)  # noqa: S101
    if not index.queries_max:
        return first[index.back][None]
    second = varlen_attn(
        q[index.queries], k[index.keys], v[index.keys], index.queries_cu, index.keys_cu,
        index.queries_max, index.keys_max, scale=scale, window_size=(-1, 0), enable_gqa=True,
    )  # fmt: skip
    assert isinstance(second, torch.Tensor)  # noqa: S101
    return torch.cat([first, second])[index.back][None]


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
