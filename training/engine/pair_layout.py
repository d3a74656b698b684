"""Where packed pairs lie in their row, and which tokens look at which: everything by position in the text.

For a pair of prompt p, chosen c, rejected r lying as [p c r]: p and c are one causal sequence; r looks at p
and, causally, at itself. A layer may also have a window: a token then sees that many positions, itself
included. Knows no kernel and no model.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

# A window far shorter than this would make many calls that each do next to nothing.
MIN_BLOCK = 128


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


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive tokens: `start` in the row, `position` of the first in its text, and how many."""

    start: int
    position: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.length)

    def cut(self, first: int, end: int) -> Span | None:
        """What of it lies at positions from `first` up to, without, `end`."""
        low, high = max(first, self.position), min(end, self.position + self.length)
        return Span(self.start + low - self.position, low, high - low) if low < high else None


@dataclasses.dataclass(frozen=True)
class Part:
    """One call of a kernel: the tokens of `queries` look at those of `keys`.

    `causal`: both are the same tokens, and each sees itself and all before it; no mask is needed.
    """

    queries: Span
    keys: tuple[Span, ...]
    window: int  # 0 = none
    causal: bool

    @property
    def num_keys(self) -> int:
        return sum(span.length for span in self.keys)


@dataclasses.dataclass(frozen=True, eq=False)
class PairLayout:
    """The segments of one packed row, and what the kernels need of them, made once for all layers."""

    segments: tuple[Segment, ...]
    device: torch.device

    @property
    def longest_side(self) -> int:
        return max(segment.longest_side for segment in self.segments)

    @functools.cached_property
    def _parts(self) -> dict[tuple[int, int], tuple[Part, ...]]:
        return {}

    @functools.cached_property
    def _masks(self) -> dict[tuple[Part, torch.dtype], torch.Tensor]:
        return {}

    def parts(self, window: int = 0, block: int = 0) -> tuple[Part, ...]:
        """The calls that make up the row's attention. `block`: no more queries in a call (0 = no limit).

        With a window, queries go in blocks of its size, so that a call sees few keys outside it.
        """
        found = self._parts.get((window, block))
        if found is None:
            parts = [part for segment in self.segments for part in _parts(segment, window, block)]
            found = self._parts[window, block] = tuple(parts)
        return found

    def mask(self, part: Part, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive [queries, keys], 0 or -inf; None where the part is causal."""
        if part.causal:
            return None
        found = self._masks.get((part, dtype))
        if found is None:
            found = self._masks[part, dtype] = _mask(part, dtype, self.device)
        return found


def _parts(segment: Segment, window: int, block: int) -> list[Part]:
    prompt = Span(segment.start, 0, segment.prompt_end - segment.start)
    sequence = Span(segment.start, 0, segment.chosen_end - segment.start)
    rejected = Span(segment.chosen_end, prompt.length, segment.end - segment.chosen_end)
    sides: list[tuple[Span, tuple[Span, ...]]] = [(sequence, (sequence,))]
    if rejected.length:
        sides.append((rejected, (prompt, rejected)))
    parts = []
    for queries, keys in sides:
        bites = 0 < window < queries.position + queries.length
        size = min(block or queries.length, max(MIN_BLOCK, window) if bites else queries.length)
        for first in range(queries.position, queries.position + queries.length, size):
            some = queries.cut(first, first + size)
            assert some is not None  # noqa: S101
            oldest = max(0, first - window + 1) if bites else 0
            seen = [key.cut(oldest, some.position + some.length) for key in keys]
            spans = tuple(span for span in seen if span is not None)
            causal = spans == (some,) and not (bites and some.length > window)
            parts.append(Part(some, spans, window if bites else 0, causal))
    return parts


def _mask(part: Part, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    queries = _positions(part.queries, device)[:, None]
    keys = torch.cat([_positions(span, device) for span in part.keys])[None]
    blocked = keys > queries
    if part.window:
        blocked |= keys <= queries - part.window
    return torch.zeros(blocked.shape, dtype=dtype, device=device).masked_fill_(blocked, float("-inf"))


def _positions(span: Span, device: torch.device) -> torch.Tensor:
    return torch.arange(span.position, span.position + span.length, device=device)
