"""The variable-length flash kernel of CUDA for packed pairs: two calls, no mask, no padding."""

from __future__ import annotations

import dataclasses
import weakref

import torch

from training.engine.pair_layout import PairLayout

MAX_HEAD_WIDTH = 256
DTYPES = (torch.bfloat16, torch.float16)


def fits(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel takes these: CUDA, half precision, one head width up to 256 and a multiple of 8."""
    width = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in DTYPES
        and width == value.shape[-1]
        and width <= MAX_HEAD_WIDTH
        and width % 8 == 0
    )


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


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PairLayout,
    *,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    The prompt and either side are consecutive positions, so the kernel's window of indices is one of positions.
    """
    from torch.nn.attention.varlen import varlen_attn

    index = _index(layout)
    reach = (window - 1 if window else -1, 0)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    first = varlen_attn(
        q[index.first], k[index.first], v[index.first], index.first_cu, index.first_cu,
        index.first_max, index.first_max, scale=scale, window_size=reach, enable_gqa=True,
    )  # fmt: skip
    assert isinstance(first, torch.Tensor)  # noqa: S101
    if not index.queries_max:
        return first[index.back][None]
    second = varlen_attn(
        q[index.queries], k[index.keys], v[index.keys], index.queries_cu, index.keys_cu,
        index.queries_max, index.keys_max, scale=scale, window_size=reach, enable_gqa=True,
    )  # fmt: skip
    assert isinstance(second, torch.Tensor)  # noqa: S101
    return torch.cat([first, second])[index.back][None]


def _index(layout: PairLayout) -> VarlenIndex:
    """Made once for all layers of a row."""
    found = _INDICES.get(layout)
    if found is None:
        found = _INDICES[layout] = VarlenIndex.of(layout)
    return found


_INDICES: weakref.WeakKeyDictionary[PairLayout, VarlenIndex] = weakref.WeakKeyDictionary()
