"""One JSON array cut into the raw bytes of its elements, as a stream: no element is ever parsed here."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

CHUNK = 256 * 1024
_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'["\\]')


@dataclass(frozen=True, slots=True)
class Element:
    """Raw bytes of one record and the line it begins on; `raw` is None when it was longer than allowed."""

    line: int
    item: int
    raw: bytes | None
    found: str


class _Cutter:
    """Where in the array the stream is, and the element collected so far."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.depth = 0  # 0: before or after the array, 1: between its elements
        self.in_string = False
        self.escaped = False  # the last byte of a chunk was a backslash inside a string
        self.closed = False
        self.line = 1  # of the byte that is looked at
        self.items = 0
        self._start_line = 0  # 0: only white space so far
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[Element]:
        position = 0
        if self.escaped:
            position, self.escaped = 1, False
            self._keep(chunk[:1])
        while position < len(chunk):
            match = (_INSIDE if self.in_string else _OUTSIDE).search(chunk, position)
            if match is None:
                self._keep(chunk[position:])
                return
            self._keep(chunk[position : match.start()])
            position = match.end()
            byte = match.group()
            if byte == b"\\":
                self._keep(chunk[match.start() : position + 1])
                self.escaped = position >= len(chunk)
                position += 1
            else:
                yield from self._structure(byte)

    def _structure(self, byte: bytes) -> Iterator[Element]:
        if byte == b'"':
            self.in_string = not self.in_string
        elif byte in b"[{":
            self.depth += 1
            if self.depth == 1 and not self.closed:
                return  # the array itself
        elif byte in b"]}":
            self.depth -= 1
            if self.depth == 0 and not self.closed:
                self.closed = True
                yield from self.take()
                return
        elif self.depth == 1 and not self.closed:
            yield from self.take()
            return
        self._keep(byte)

    def _keep(self, piece: bytes) -> None:
        if self._start_line == 0:
            rest = piece.lstrip()
            self.line += piece.count(b"\n", 0, len(piece) - len(rest))
            if not rest:
                return
            self._start_line, piece = self.line, rest
        self.line += piece.count(b"\n")
        self._size += len(piece)
        if self._size <= self.max_bytes:
            self._parts.append(piece)
        else:
            self._parts.clear()

    def take(self) -> Iterator[Element]:
        """The element collected so far, if there is one."""
        if self._start_line:
            self.items += 1
            fits = self._size <= self.max_bytes
            found = "" if fits else f"a record of {self._size / 1048576:.1f} MB"
            yield Element(self._start_line, self.items, b"".join(self._parts) if fits else None, found)
        self._parts, self._size, self._start_line = [], 0, 0


def elements(buffer: io.BufferedReader, max_bytes: int) -> Iterator[Element]:
    """Every element in turn; what stands after the array, or was cut off at the end, comes as one more."""
    cutter = _Cutter(max_bytes)
    while chunk := buffer.read1(CHUNK):
        yield from cutter.feed(chunk)
    cut_inside = (
        cutter.in_string or cutter.depth > 1
    )  # the element itself will not parse: one error is enough
    yield from cutter.take()
    if not cutter.closed and not cut_inside:
        yield Element(cutter.line, cutter.items + 1, b"[", "")
