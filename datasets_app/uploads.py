"""Uploads streamed to disk: counted, hashed and limited while they arrive; nothing stays behind when refused.

Installed for every request in `settings.FILE_UPLOAD_HANDLERS`, because the CSRF check reads the body before a
view could choose. Knows nothing of datasets' rows.
"""

from __future__ import annotations

import errno
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.core.files.uploadhandler import FileUploadHandler, StopUpload
from django.http import HttpRequest

REFUSAL_KEY = "studio.upload_refusal"  # in request.META
DISK_RESERVE_BYTES = 200 * 1024 * 1024  # so that the database and the broker can still write
DISK_CHECK_EVERY = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an upload ended early: the answer's status, and a sentence."""

    status: int
    text: str


def refusal_of(request: HttpRequest) -> Refusal | None:
    refusal = request.META.get(REFUSAL_KEY)
    return refusal if isinstance(refusal, Refusal) else None


def readable_size(size: float) -> str:
    """In the units of the upload limit's setting: 1 MB = 1024 * 1024 bytes."""
    unit = "bytes"
    for larger in ("KB", "MB", "GB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if size >= 10 or size == int(size) else f"{size:.1f} {unit}"


def too_large() -> Refusal:
    limit = readable_size(settings.UPLOAD_MAX_BYTES)
    text = f"The file is larger than {limit}, the limit of this studio. Upload a part of it, or gzip it."
    return Refusal(413, text)


def disk_full() -> Refusal:
    return Refusal(
        507,
        "The disk of this studio is almost full, so the file was not kept. Delete datasets, models or tasks "
        "you no longer need, or ask whoever runs the studio for more room.",
    )


def disk_has_room(size: int) -> bool:
    return shutil.disk_usage(settings.FILE_UPLOAD_TEMP_DIR).free >= size + DISK_RESERVE_BYTES


class StoredUpload(UploadedFile):
    """A file complete in the upload folder; deleted at the end of the request unless it was taken."""

    def __init__(self, path: Path, digest: str, *, name: str, size: int, content_type: str | None) -> None:
        super().__init__(path.open("rb"), name, content_type, size, None)
        self.path, self.sha256 = path, digest

    def take(self, target: Path) -> None:
        """Move the file to where it stays."""
        try:
            self.path.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.move(self.path, target)

    def close(self) -> None:
        super().close()
        self.path.unlink(missing_ok=True)


class StreamingUploadHandler(FileUploadHandler):
    """One file after the other to `<upload folder>/<uuid>.part`."""

    chunk_size = 256 * 1024
    _out: IO[bytes] | None = None  # not named `file`: Django's parser would close that, also when it is None

    def new_file(self, field_name: str, file_name: str, *args: Any, **kwargs: Any) -> None:
        super().new_file(field_name, file_name, *args, **kwargs)
        user = getattr(self.request, "user", None)
        if user is None or not user.is_authenticated:
            raise StopUpload(connection_reset=True)
        folder = Path(settings.FILE_UPLOAD_TEMP_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{uuid.uuid4()}.part"
        self.size = 0
        self.digest = sha256()
        if not disk_has_room(0):
            self._refuse(disk_full())
        self._out = self.path.open("xb")
        self.path.chmod(0o600)

    def receive_data_chunk(self, raw_data: bytes, start: int) -> bytes | None:
        assert self._out is not None  # noqa: S101
        before = self.size
        self.size += len(raw_data)
        if self.size > settings.UPLOAD_MAX_BYTES:
            self._refuse(too_large())
        if before // DISK_CHECK_EVERY != self.size // DISK_CHECK_EVERY and not disk_has_room(0):
            self._refuse(disk_full())
        try:
            self._out.write(raw_data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._refuse(disk_full())
        self.digest.update(raw_data)
        return None

    def file_complete(self, file_size: int) -> StoredUpload:
        assert self._out is not None  # noqa: S101
        self._out.close()
        self._out = None
        return StoredUpload(
            self.path,
            self.digest.hexdigest(),
            name=self.file_name or "upload",
            size=self.size,
            content_type=self.content_type,
        )

    def upload_interrupted(self) -> None:
        self._drop()

    def _refuse(self, refusal: Refusal) -> None:
        self._drop()
        if self.request is not None:
            self.request.META[REFUSAL_KEY] = refusal
        raise StopUpload(connection_reset=True)

    def _drop(self) -> None:
        if self._out is not None:
            with suppress(OSError):  # on a full disk the last buffer finds no room either
                self._out.close()
            self._out = None
        self.path.unlink(missing_ok=True)
