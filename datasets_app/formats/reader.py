"""A file to its records, one after the other, in constant memory: JSON Lines, or one JSON array of records.

Raises `FileRefused` when the file as a whole cannot be read, and nothing else; a bad line is a `Line` that
carries its problem.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from datasets_app.formats import strict_json
from datasets_app.formats.array import Element, elements
from datasets_app.formats.encodings import FileRefused, Utf8Stream, open_text
from datasets_app.formats.pair import Problem, describe

MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_FILE_BYTES = 64 * 1024**3  # of an unpacked gzip; the size of an upload is limited elsewhere
PARTS = "one JSON object"


@dataclass(frozen=True, slots=True)
class Line:
    """One record as found. `item` counts the records of a JSON array, 0 in JSON Lines."""

    number: int
    item: int
    value: dict[str, Any] | None
    problem: Problem | None


class Reader:
    """Iterate it once. `notes` says what was converted, `position()` how many bytes of the file are read."""

    def __init__(self, source: IO[bytes], *, max_bytes: int = MAX_FILE_BYTES) -> None:
        self._stream: Utf8Stream
        self._stream, self._buffer = open_text(source, max_bytes=max_bytes)
        self.is_array = _first_byte(self._buffer) == b"["
        self.lines = 0  # lines seen so far, blank ones too

    @property
    def notes(self) -> list[str]:
        return self._stream.notes

    def position(self) -> int:
        return self._stream.consumed()

    def __iter__(self) -> Iterator[Line]:
        for element in self._elements():
            if element.raw is None:
                problem = Problem(
                    "too_long", "(record)", element.found, f"at most {MAX_LINE_BYTES >> 20} MB", _SPLIT
                )
                yield Line(element.line, element.item, None, problem)
            elif element.raw.strip():
                yield _line(element)

    def _elements(self) -> Iterator[Element]:
        source = elements(self._buffer, MAX_LINE_BYTES) if self.is_array else self._json_lines()
        for element in source:
            self.lines = max(self.lines, element.line)
            yield element

    def _json_lines(self) -> Iterator[Element]:
        number = 0
        while raw := self._buffer.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                size = len(raw) + self._skip_line()
                yield Element(number, 0, None, f"a line of {size / 1048576:.1f} MB")
                continue
            if number == 1 and raw.strip() == b"{":
                raise FileRefused(
                    "pretty_printed",
                    "The first line holds only “{”: the records are spread over several lines.",
                    "Write every record on one line (JSONL), or put all records into one JSON array.",
                )
            yield Element(number, 0, raw, "")

    def _skip_line(self) -> int:
        skipped = 0
        while piece := self._buffer.readline(1 << 20):
            skipped += len(piece)
            if piece.endswith(b"\n"):
                break
        return skipped


_SPLIT = "Shorten the texts of this record, or check that every record stands on a line of its own."


def _first_byte(buffer: io.BufferedReader) -> bytes:
    """The first byte that is not white space, looking a little way in; the buffer is left where it was."""
    return buffer.peek(1).lstrip()[:1]


def _line(element: Element) -> Line:
    assert element.raw is not None  # noqa: S101
    problem = None
    try:
        value = strict_json.loads(element.raw.strip())
    except strict_json.BadJson as error:
        problem = Problem(error.code, "(record)", error.found, PARTS, error.next_step)
        return Line(element.line, element.item, None, problem)
    if not isinstance(value, dict):
        advice = "Write every record in one of the shapes shown on the upload page."
        problem = Problem("not_an_object", "(record)", describe(value), PARTS, advice)
        return Line(element.line, element.item, None, problem)
    return Line(element.line, element.item, value, None)
