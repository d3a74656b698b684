"""Style sheets, scripts and pictures: collected once per version, named by their content, compressed.

A name that carries its content's hash can be cached for ever. Before they are collected (in tests, in
development, in a process started by hand) the files are served as they lie, under their plain names.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from django.conf import settings
from django.contrib.staticfiles import finders
from django.core.management import call_command
from whitenoise.storage import CompressedManifestStaticFilesStorage

# Parts of installed packages that no page asks for.
IGNORED = [
    "widgetbundle.js",
    "datasets/*.csv.gz",
    "templates/*.json",
    "ext/hx-*.js",
    "ext/htmx-*.js",
    "ht*x-4*.js",
]


class HashedStorage(CompressedManifestStaticFilesStorage):  # type: ignore[misc]
    manifest_strict = False
    # Style sheets of everybody; of scripts only our own modules: a package's may name files it does not ship.
    patterns = (
        *(rule for rule in CompressedManifestStaticFilesStorage.patterns if rule[0] == "*.css"),
        ("js/*.js", CompressedManifestStaticFilesStorage._js_module_import_aggregation_patterns[1]),
    )

    def stored_name(self, name: str) -> str:
        """The hashed name when the file was collected, else the plain one."""
        hashed: str | None = self.hashed_files.get(self.hash_key(self.clean_name(name)))
        return hashed or name


def _fingerprint() -> str:
    """Changes whenever a file's name, size or time of change does."""
    digest = hashlib.sha256(f"{settings.VERSION} {settings.PLOTLY_VERSION} {IGNORED}".encode())
    for finder in finders.get_finders():
        for name, storage in finder.list(IGNORED):
            facts = Path(storage.path(name)).stat()
            digest.update(f"{storage.location} {name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def collect_if_changed() -> bool:
    """Bring STATIC_ROOT up to date; True when there was something to do."""
    stamp = Path(settings.STATIC_ROOT) / "collected-from"
    fingerprint = _fingerprint()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == fingerprint:
        return False
    options: dict[str, Any] = {
        "interactive": False,
        "verbosity": 0,
        "clear": True,
        "ignore_patterns": IGNORED,
    }
    call_command("collectstatic", **options)
    stamp.write_text(fingerprint, encoding="utf-8")
    return True
