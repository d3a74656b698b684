"""From the bytes of a file as it came to UTF-8: byte order marks, UTF-16, gzip, and what is no text.

Everything is streamed. What cannot be read as text at all raises `FileRefused` with a sentence.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from typing import IO

HEAD_BYTES = 4096
CHUNK = 256 * 1024
GZIP_MAX_RATIO = 100  # checked after GZIP_GRACE: 100 MB of zeros is 97 kB of gzip
GZIP_GRACE = 10 * 1024 * 1024

_SAVE_AS = "Save or export it as JSONL: plain text, one record on each line."
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x89PNG", "a PNG image", _SAVE_AS),
    (b"\xff\xd8\xff", "a JPEG image", _SAVE_AS),
    (b"GIF8", "a GIF image", _SAVE_AS),
    (b"PK\x03\x04", "a zip archive (or an Office document)", "Unpack it and upload the .jsonl file inside."),
    (b"PK\x05\x06", "an empty zip archive", "Upload the .jsonl file itself."),
    (b"PAR1", "a Parquet file", "Convert it to JSONL first (pandas: to_json, lines=True)."),
    (b"%PDF", "a PDF document", _SAVE_AS),
    (b"\xfd7zXZ\x00", "an xz archive", "Unpack it, or pack it with gzip."),
    (b"BZh", "a bzip2 archive", "Unpack it, or pack it with gzip."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it, or pack it with gzip."),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "Unpack it, or pack it with gzip."),
    (b"SQLite format 3", "an SQLite database", _SAVE_AS),
    (b"ARROW1", "an Arrow file", "Convert it first, for example with the datasets library: to_json(…)."),
    (b"\x7fELF", "a program", _SAVE_AS),
)  # fmt: skip


class FileRefused(Exception):
    """The file as a whole cannot be read; `code`, `found` and `next_step` are for the person."""

    def __init__(self, code: str, found: str, next_step: str) -> None:
        super().__init__(f"{found} {next_step}")
        self.code, self.found, self.next_step = code, found, next_step


def refuse_if_not_text(head: bytes) -> None:
    """Raises `FileRefused` when the first bytes belong to a known kind of file that is not text."""
    if not head:
        raise FileRefused(
            "empty_file", "The file is empty.", "Choose a file with one preference pair on each line."
        )
    for magic, kind, advice in _KINDS:
        if head.startswith(magic):
            raise FileRefused("not_text", f"This is {kind}, not a text file.", advice)
    if head[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        raise FileRefused("utf32", "The file is encoded as UTF-32.", "Save it again with the encoding UTF-8.")
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or head.startswith(b"\x1f\x8b"):
        return
    if 0 in head:
        raise FileRefused(
            "not_text",
            "The file holds zero bytes: it is not text, or it is UTF-16 without a byte order mark.",
            "Save or export it as JSONL with the encoding UTF-8.",
        )


class Utf8Stream(io.RawIOBase):
    """UTF-8 bytes of a file that may begin with a mark, be UTF-16, or be packed with gzip.

    `notes` says in words what was converted; `consumed()` is the position in the file as it came.
    """

    def __init__(self, source: IO[bytes], *, max_bytes: int) -> None:
        super().__init__()
        self.notes: list[str] = []
        self._source, self._max_bytes = source, max_bytes
        self._given = 0
        self._decoder: codecs.IncrementalDecoder | None = None
        self._plain: IO[bytes] | gzip.GzipFile = source
        head = self._head(source)
        if head.startswith(b"\x1f\x8b"):
            # GzipFile reads its source itself; the position of `source` stays the one in the packed file.
            self._plain = gzip.GzipFile(fileobj=source, mode="rb")
            self.notes.append("The file was packed with gzip and has been unpacked.")
            head = self._read_plain(HEAD_BYTES)
            refuse_if_not_text(head)
            if head.startswith(b"\x1f\x8b"):
                raise FileRefused(
                    "nested_archive", "The gzip file holds another gzip file.", "Pack it only once."
                )
        else:
            source.read(len(head))
        self._pending = self._without_mark(head)

    def _head(self, source: IO[bytes]) -> bytes:
        head = source.read(HEAD_BYTES)
        source.seek(0)
        refuse_if_not_text(head)
        return head

    def _without_mark(self, head: bytes) -> bytes:
        for mark, name in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
            if head.startswith(mark):
                self.notes.append("The file was encoded as UTF-16 and has been read as such.")
                self._decoder = codecs.getincrementaldecoder(name)("strict")
                return self._decode(head[2:])
        return head.removeprefix(codecs.BOM_UTF8)

    def consumed(self) -> int:
        return self._source.tell()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._pending:
            chunk = self._read_plain(CHUNK)
            if not chunk:
                self._pending = self._decode(b"", final=True)
                if not self._pending:
                    return 0
                break
            self._pending = self._decode(chunk)
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size

    def _read_plain(self, size: int) -> bytes:
        try:
            chunk = self._plain.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise FileRefused(
                "broken_gzip", "The gzip file is damaged or was cut off.", "Pack it again and upload it anew."
            ) from None
        if self._plain is self._source:
            return chunk
        self._given += len(chunk)
        ratio = self._given / max(self._source.tell(), 1)
        if self._given > self._max_bytes or (self._given > GZIP_GRACE and ratio > GZIP_MAX_RATIO):
            raise FileRefused(
                "gzip_too_large",
                "The gzip file unpacks to far more than a dataset may hold.",
                "Upload a smaller file, or the file itself without gzip.",
            )
        return chunk

    def _decode(self, chunk: bytes, *, final: bool = False) -> bytes:
        if self._decoder is None:
            return chunk
        try:
            return self._decoder.decode(chunk, final).encode("utf-8")
        except UnicodeError:
            raise FileRefused(
                "broken_utf16",
                "The file begins as UTF-16 but holds bytes that are not.",
                "Save it again with the encoding UTF-8.",
            ) from None


def open_text(source: IO[bytes], *, max_bytes: int) -> tuple[Utf8Stream, io.BufferedReader]:
    stream = Utf8Stream(source, max_bytes=max_bytes)
    return stream, io.BufferedReader(stream, CHUNK)
