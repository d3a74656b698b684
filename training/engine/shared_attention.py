"""Attention over packed pairs, as transformers' models call it: chosen and rejected cannot see each other.

Registered with transformers under one name. With a layout it is prefix sharing as in arXiv 2410.20305,
exact, without a T x T mask; a call without one (generation, the padded path) is plain attention. Windows,
soft-capped scores and sinks are what the layer asks for. `AttentionWatch` sees what else a model asks for.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from training.engine.attention_kernels import Scoring, attend_by_parts
from training.engine.attention_varlen import attend_varlen, fits
from training.engine.pair_layout import PairLayout
from training.engine.products import computes_low

NAME = "shared_prefix"


class LayoutError(RuntimeError):
    """This model asks something of attention that packed pairs do not give; the padded path must run."""


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
    """query [1, H, T, D], key [1, G, T, D], value [1, G, T, E] (H a multiple of G) -> [1, T, H, E]."""
    watch = _watching.get()
    if watch is not None:
        watch.called(attention_mask, dropout, kwargs)
    if pair_layout is None:
        return _plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout or kwargs.get("position_bias") is not None:
        raise LayoutError("attention with dropout or a bias of positions")
    query, key, value = _of_one_dtype(query, key, value)
    scoring = Scoring(
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap=float(kwargs.get("softcap") or 0.0),
        window=int(kwargs.get("sliding_window") or 0),
    )
    sinks = kwargs.get("s_aux")
    if fits(query, value) and not scoring.softcap and sinks is None:
        window = scoring.window if scoring.window < pair_layout.longest_side else 0
        return attend_varlen(query, key, value, pair_layout, scale=scoring.scale, window=window), None
    return attend_by_parts(query, key, value, pair_layout, scoring, sinks), None


def _of_one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast: on a GPU what that makes of torch's own attention, on a CPU float32, as of all products."""
    device = tensors[0].device
    if not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type) if computes_low(device) else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def _plain(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows without a layout: torch's attention, or scores written out where that cannot cap them."""
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    if softcap is None and sinks is None:
        result: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is None and query.shape[2] > 1:  # the mask of a full causal row is left out
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        attention_mask = ones.tril(key.shape[2] - query.shape[2])
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    shares = scores.float().softmax(dim=-1) if scores.dtype != torch.float64 else scores.softmax(dim=-1)
    shares = torch.nn.functional.dropout(shares[..., : key.shape[2]].to(value.dtype), p=dropout)
    return (shares @ value).transpose(1, 2).contiguous(), None


def shared_prefix_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """torch's mask for rows without a layout; rows with one bring their own and do not come here."""
    watch = _watching.get()
    if watch is None:
        return sdpa_mask(*args, **kwargs)
    mask = sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False}))
    watch.made(mask, kwargs["mask_function"])
    return mask


MaskFunction = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class AttentionWatch:
    """What a model asks of attention in a row without a layout: windows, masks, dropout.

    With a layout only what the layer hands to attention is known, so a mask that says more (chunks, a
    window that the layer does not name, a mask of the model's own) would be lost without a word.
    """

    dropout: float = 0.0
    biased: bool = False
    calls: int = 0
    _made: list[tuple[torch.Tensor | None, MaskFunction]] = dataclasses.field(default_factory=list)
    _used: list[tuple[MaskFunction | None, int]] = dataclasses.field(default_factory=list)

    def made(self, mask: torch.Tensor | None, function: MaskFunction) -> None:
        self._made.append((mask, function))

    def called(self, mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
        function = next((function for made, function in self._made if made is mask), None)
        use = function, int(kwargs.get("sliding_window") or 0)
        if use not in self._used:
            self._used.append(use)
        self.calls += 1
        self.dropout = max(self.dropout, dropout)
        self.biased |= kwargs.get("position_bias") is not None

    def reason(self, longest: int) -> str:
        """Why rows up to `longest` tokens cannot be packed; empty if nothing speaks against it."""
        if not self.calls:
            return "its attention is its own"
        if self.dropout:
            return "its attention has dropout"
        if self.biased:
            return "its attention has a bias of positions"
        for function, window in self._used:
            if function is None:
                return "it makes its attention masks itself"
            if not _is_causal(function, window, longest):
                reach = f"the last {window} tokens" if window else "all tokens"
                return f"its attention mask is not causal over {reach} before each, as its layers say"
        return ""


def _is_causal(function: MaskFunction, window: int, longest: int) -> bool:
    """Does the mask allow, at each of these positions, exactly what comes before and the window reaches?"""
    sample = sorted({*range(min(longest, 64)), *range(0, longest, max(1, longest // 64)), longest - 1})
    queries = torch.tensor(sample)[:, None]
    keys = torch.arange(longest)[None]
    expected = keys <= queries
    if window:
        expected &= keys > queries - window
    zero = torch.tensor(0)
    try:
        found = function(zero, zero, queries, keys)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False
    return torch.equal(found.expand_as(expected), expected)


_watching: contextvars.ContextVar[AttentionWatch | None] = contextvars.ContextVar("watching", default=None)


@contextlib.contextmanager
def watching() -> Iterator[AttentionWatch]:
    watch = AttentionWatch()
    token = _watching.set(watch)
    try:
        yield watch
    finally:
        _watching.reset(token)


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, shared_prefix_mask)
