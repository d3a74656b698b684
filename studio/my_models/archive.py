"""A model as one download: a zip that is made while it is sent, so neither memory nor disk holds a copy.

Stored, not compressed: weights do not get smaller. Only files with known names are taken, from folders that
rows of the database name; never a path from a request.
"""

from __future__ import annotations

import asyncio
import zipfile
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path

CHUNK = 1024 * 1024
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


class ArchiveError(Exception):
    """There is nothing to send. The message is a sentence."""


def files_of(folder: Path, *, tokenizer_from: Path | None = None) -> list[Path]:
    """The adapter and its tokenizer; a tokenizer that is not beside the adapter comes from the base model."""
    missing = [name for name in ADAPTER_FILES if not _is_plain(folder / name)]
    if missing:
        names = " and ".join(missing)
        raise ArchiveError(f"{names} of this model cannot be found on disk, so nothing can be sent.")
    homes = [folder, tokenizer_from] if tokenizer_from else [folder]
    home = next((home for home in homes if _is_plain(home / "tokenizer_config.json")), folder)
    tokenizer = [home / name for name in TOKENIZER_FILES if _is_plain(home / name)]
    return [folder / name for name in ADAPTER_FILES] + tokenizer


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


class _Outbox:
    """What the zip writer has written and nobody has sent yet. It cannot seek."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def zip_chunks(files: list[Path], *, prefix: str, readme: str, written: datetime) -> Iterator[bytes]:
    """The archive piece by piece; every file lies under the folder `prefix`."""
    outbox = _Outbox()
    stamp = written.timetuple()[:6]
    with zipfile.ZipFile(outbox, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry(f"{prefix}/README.md", stamp), readme.encode())
        for path in files:
            entry = _entry(f"{prefix}/{path.name}", stamp)
            with archive.open(entry, "w", force_zip64=True) as target, path.open("rb") as source:
                while data := source.read(CHUNK):
                    target.write(data)
                    yield outbox.take()
    yield outbox.take()


def _entry(name: str, stamp: tuple[int, ...]) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, stamp)  # type: ignore[arg-type]
    entry.external_attr = 0o644 << 16
    return entry


async def in_threads(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Reads beside the event loop: a slow disk must not stop other pages."""
    while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
        yield chunk
