"""Pages of what validation wrote: pairs as chats, findings, length histograms ready to draw."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from datasets_app.findings import MAX_KEPT, Finding
from datasets_app.formats.pair import Pair
from datasets_app.lengths import PARTS
from datasets_app.models import Dataset
from datasets_app.offsets import read_lines
from datasets_app.uploads import readable_size

BAR_HEIGHT = 120  # of a histogram, in its own units
BAR_WIDTH, GROUP_WIDTH = 15, 62


def read_pairs(dataset: Dataset, *, start: int = 0, count: int = 5) -> list[Pair]:
    lines = read_lines(
        dataset.pairs_path, start=start, count=count, offsets=dataset.stats.get("offsets") or {}
    )
    return [json.loads(line) for line in lines]


def read_findings(dataset: Dataset, *, start: int = 0, count: int = 50) -> list[Finding]:
    offsets = dataset.stats.get("issue_offsets") or {}
    lines = read_lines(dataset.issues_path, start=start, count=count, offsets=offsets)
    return [Finding.from_json(line) for line in lines]


class Pairs:
    """All pairs as a paginator wants them: counted without reading, sliced by reading only the slice."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return self._dataset.num_pairs if self._dataset.is_ready else 0

    def __getitem__(self, wanted: slice) -> list[Pair]:
        return read_pairs(self._dataset, start=wanted.start, count=wanted.stop - wanted.start)


class Findings:
    """The same for the findings that are listed in the file."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return min(int(self._dataset.stats.get("num_findings", 0)), MAX_KEPT)

    def __getitem__(self, wanted: slice) -> list[Finding]:
        return read_findings(self._dataset, start=wanted.start, count=wanted.stop - wanted.start)


def whole_file_findings(dataset: Dataset) -> list[Finding]:
    return [Finding(**values) for values in dataset.stats.get("whole_file") or []]


@dataclass(frozen=True, slots=True)
class Bar:
    part: str
    count: int
    x: int
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Group:
    """The three bars of one range of lengths."""

    label: str
    x: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    title: str
    unit: str
    width: int
    highest: int
    groups: tuple[Group, ...]


def histograms(dataset: Dataset) -> list[Histogram]:
    """Of characters and of estimated tokens; the groups beyond the longest text are left out."""
    stored = dataset.stats.get("histograms") or {}
    titles = {"characters": "Length in characters", "tokens": "Length in tokens, estimated"}
    return [_histogram(stored[unit], titles[unit], unit) for unit in titles if unit in stored]


def _histogram(stored: dict[str, list[int]], title: str, unit: str) -> Histogram:
    edges = stored["edges"]
    labels = [f"<{_short(edges[0])}"]
    labels += [f"{_short(low)}–{_short(high)}" for low, high in pairwise(edges)]
    labels.append(f"≥{_short(edges[-1])}")
    last = max((i for i in range(len(labels)) if any(stored[part][i] for part in PARTS)), default=0)
    highest = max(max(stored[part]) for part in PARTS) or 1
    groups = []
    for index, label in enumerate(labels[: last + 1]):
        x = index * GROUP_WIDTH
        bars = []
        for place, part in enumerate(PARTS):
            count = stored[part][index]
            height = round(count / highest * BAR_HEIGHT, 1)
            bars.append(Bar(part, count, x + 7 + place * (BAR_WIDTH + 1), BAR_HEIGHT - height, height))
        groups.append(Group(label, x + GROUP_WIDTH // 2, tuple(bars)))
    return Histogram(title, unit, GROUP_WIDTH * len(groups), highest, tuple(groups))


def _short(number: int) -> str:
    if number < 1000:
        return str(number)
    return f"{number // 1024}k" if number % 1024 == 0 else f"{number / 1000:g}k"


def length_bias(dataset: Dataset) -> str:
    """A hint in words when the preferred answers are nearly always the longer (or shorter) ones."""
    stats, count = dataset.stats, dataset.num_pairs
    if not count or "num_chosen_longer" not in stats:
        return ""
    longer = stats["num_chosen_longer"] / count
    shorter = 1 - longer - stats["num_same_length"] / count
    if max(longer, shorter) < 0.8 or count < 20:
        return ""
    word, share = ("longer", longer) if longer >= shorter else ("shorter", shorter)
    return (
        f"In {share:.0%} of the pairs the chosen answer is the {word} one. The model may learn the length "
        "instead of what makes the answer better; add pairs where it is the other way round."
    )


def summary(dataset: Dataset) -> dict[str, Any]:
    """The figures of the facts list, in words."""
    stats, count = dataset.stats, max(dataset.num_pairs, 1)

    def share(key: str) -> str:
        return f"{stats.get(key, 0):,} ({stats.get(key, 0) / count:.0%})"

    difference = stats.get("mean_length_difference", 0.0)
    tokens = stats.get("tokens_estimate", {})
    return {
        "kinds": [(code.replace("_", " "), number) for code, number in stats.get("by_code", {}).items()],
        "size": readable_size(dataset.size_bytes),
        "multi_turn": share("num_multi_turn"),
        "system": share("num_system"),
        "chosen_longer": share("num_chosen_longer"),
        "difference": f"{difference:+,.0f} characters on average",
        "tokens": " · ".join(f"{part} {tokens.get(part, 0):,.0f}" for part in PARTS),
        "longest": f"about {tokens.get('total_max', 0):,} tokens",
    }
