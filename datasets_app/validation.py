"""One pass over a dataset file: every line becomes a canonical pair or a finding that says why not.

Pure: streams in and streams out, no Django, no database. Memory does not grow with the file but for hashes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import IO, Any

from datasets_app import findings
from datasets_app.checks import PairChecks
from datasets_app.findings import Finding, FindingsFile
from datasets_app.formats import FORMATS, detect, unknown_shape
from datasets_app.formats.encodings import FileRefused
from datasets_app.formats.pair import Pair, Problem, Record
from datasets_app.formats.reader import Line, Reader
from datasets_app.formats.shape import Format
from datasets_app.lengths import Statistics
from datasets_app.offsets import Offsets

GIVE_UP_AFTER = 1000  # lines without one usable pair: the file is something else


@dataclass(kw_only=True)
class Report:
    """What `Dataset` keeps of a validation. `problem` is one sentence when no pair could be used."""

    format: str = ""
    problem: str = ""
    num_lines: int = 0
    num_pairs: int = 0
    num_errors: int = 0  # lines left out
    num_warnings: int = 0
    pairs_sha256: str = ""
    stats: dict[str, Any] = field(default_factory=dict)


Progress = Callable[[int, int], None]  # lines read, bytes read; may raise to stop


class Validation:
    """The pass itself. `pairs` and `issues` are open binary files."""

    def __init__(self, source: IO[bytes], *, pairs: IO[bytes], issues: IO[bytes], progress: Progress) -> None:
        self._source, self._pairs, self._progress = source, pairs, progress
        self._findings = FindingsFile(issues)
        self._checks, self._statistics, self._offsets = PairChecks(), Statistics(), Offsets()
        self._hash = sha256()
        self._shape: Format | None = None
        self._bad_lines = 0
        self._first_error = ""  # in words, for the one sentence when nothing could be used

    def run(self) -> Report:
        """Reads to the end. Raises only what `progress` or the disk raises."""
        refused = ""
        reader: Reader | None = None
        try:
            reader = Reader(self._source)
            self._read(reader)
        except FileRefused as error:
            refused = f"{error.found} {error.next_step}"
            self._findings.add(
                Finding(level="error", code=error.code, found=error.found, next_step=error.next_step)
            )
        return self._report(reader, refused)

    def _read(self, reader: Reader) -> None:
        for line in reader:
            self._one(line)
            self._progress(reader.lines, reader.position())
            if self._bad_lines >= GIVE_UP_AFTER and not self._statistics.num_pairs:
                raise FileRefused(
                    "no_usable_record",
                    f"None of the first {GIVE_UP_AFTER:,} records could be used; the rest was not read.",
                    "Look at the findings of the first lines and compare them with the shapes shown.",
                )

    def _one(self, line: Line) -> None:
        problems, pair = self._convert(line)
        if pair is None:
            self._bad_lines += 1
            found = [findings.error(problem, line=line.number, item=line.item) for problem in problems]
            for finding in found:
                self._findings.add(finding)
            self._first_error = self._first_error or found[0].sentence
            return
        pair["id"] = f"record-{line.item}" if line.item else f"line-{line.number}"
        for finding in self._checks.of_pair(pair, line=line.number, item=line.item):
            self._findings.add(finding)
        raw = json.dumps(pair, ensure_ascii=False).encode() + b"\n"
        self._offsets.add(len(raw))
        self._pairs.write(raw)
        self._hash.update(raw)
        self._statistics.add(pair)

    def _convert(self, line: Line) -> tuple[list[Problem], Pair | None]:
        if line.value is None:
            return [line.problem] if line.problem else [], None
        shape = detect(line.value)
        if self._shape is None:
            if shape is None:
                return [unknown_shape(line.value)], None
            self._shape = shape
        elif shape is not None and shape is not self._shape:
            return [_other_shape(shape, self._shape)], None
        elif shape is None and not any(key in line.value for key in self._shape.required):
            return [unknown_shape(line.value)], None
        record = Record(line.value)
        pair = self._shape.read(record)
        if pair is not None:
            self._checks.notice_unknown(record.unknown)
        return record.problems, pair

    def _report(self, reader: Reader | None, refused: str) -> Report:
        count = self._statistics.num_pairs
        if reader is not None:
            for note in reader.notes:
                self._findings.add(Finding(level="warning", code="converted", found=note))
            if not count and not self._bad_lines and not refused:
                found, step = "The file holds no records.", "Write one preference pair on each line."
                refused = f"{found} {step}"
                self._findings.add(Finding(level="error", code="no_records", found=found, next_step=step))
        for finding in self._checks.of_all(count):
            self._findings.add(finding)
        if not count and not refused:
            refused = f"No record of the file could be used as a preference pair. {self._first_error}"
        stats = self._statistics.to_json(num_prompts=len(self._checks.prompts))
        stats["offsets"] = self._offsets.to_json()
        stats["issue_offsets"] = self._findings.offsets.to_json()
        stats["num_findings"] = sum(self._findings.counts.values())
        stats["by_code"] = dict(self._findings.by_code.most_common())
        stats["whole_file"] = self._findings.whole_file
        return Report(
            format=self._shape.key if self._shape else "",
            problem="" if count else refused,
            num_lines=reader.lines if reader else 0,
            num_pairs=count,
            num_errors=max(self._bad_lines, 1 if refused else 0),
            num_warnings=self._findings.counts["warning"],
            pairs_sha256=self._hash.hexdigest(),
            stats=stats,
        )


def _other_shape(found: Format, expected: Format) -> Problem:
    return Problem(
        "other_shape",
        "(record)",
        f"the shape “{found.title}”",
        f"the shape of the first usable record, “{expected.title}”",
        "Write all records of a file in one shape, or upload two files.",
    )


def format_title(key: str) -> str:
    """For people; an unknown key is shown as it is."""
    return FORMATS[key].title if key in FORMATS else key
