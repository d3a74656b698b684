"""What validation found: one finding, its words, and the file that holds all of them. No Django."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from typing import IO, Any, Literal

from datasets_app.formats.pair import Problem
from datasets_app.offsets import Offsets

MAX_KEPT = 1_000_000  # findings in the file; beyond that they are counted only, and the last line says so

Level = Literal["error", "warning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`line` 0 is about the file as a whole; `item` counts the records of a JSON array, 0 in JSON Lines."""

    level: Level
    code: str
    line: int = 0
    item: int = 0
    field: str = ""
    found: str = ""
    expected: str = ""
    next_step: str = ""

    @property
    def place(self) -> str:
        if not self.line:
            return "Whole file"
        return f"Record {self.item:,} (line {self.line:,})" if self.item else f"Line {self.line:,}"

    @property
    def part(self) -> str:
        """The field meant; empty when it is the record as a whole."""
        return "" if self.field == "(record)" else self.field

    @property
    def statement(self) -> str:
        """What was found, without the next step. About a whole file it may be a sentence already."""
        if not self.line and self.found.endswith("."):
            return self.found
        expected = f"; expected {self.expected}" if self.expected else ""
        return f"{'found' if self.part else 'Found'} {self.found}{expected}."

    @property
    def sentence(self) -> str:
        where = f"{self.place}, {self.part}" if self.part else self.place
        expected = f"; expected {self.expected}" if self.expected else ""
        return f"{where}: found {self.found}{expected}. {self.next_step}".strip()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Finding:
        return cls(**json.loads(line))


def error(problem: Problem, *, line: int, item: int) -> Finding:
    """A line that was left out, and why."""
    return Finding(
        level="error",
        code=problem.code,
        line=line,
        item=item,
        field=problem.field,
        found=problem.found,
        expected=problem.expected,
        next_step=problem.next_step,
    )


class FindingsFile:
    """Writes findings as they come and counts them; those about the whole file are kept at hand as well."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self.counts: dict[str, int] = {"error": 0, "warning": 0}
        self.by_code: Counter[str] = Counter()
        self.whole_file: list[dict[str, Any]] = []
        self.offsets = Offsets()

    def add(self, finding: Finding) -> None:
        total = sum(self.counts.values())
        self.counts[finding.level] += 1
        self.by_code[finding.code] += 1
        if not finding.line:
            self.whole_file.append(dataclasses.asdict(finding))
        if total < MAX_KEPT:
            raw = finding.to_json().encode("utf-8", "replace") + b"\n"
            self.offsets.add(len(raw))
            self._out.write(raw)
        elif total == MAX_KEPT:
            last: dict[str, Any] = {
                "found": f"More than {MAX_KEPT:,} findings; the others are counted, not listed."
            }
            self._out.write(Finding(level="warning", code="too_many", **last).to_json().encode() + b"\n")
