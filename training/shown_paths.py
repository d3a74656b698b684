"""Paths inside sentences for people: what lies inside a known folder is called as it is called there."""

from __future__ import annotations

import os
import re
from pathlib import Path


def seen_from(folder: Path, text: str) -> str:
    """`text` with the paths inside `folder` relative to it; others, also those that only contain its name, stay."""
    begins = rf"(?<![\w./\\-]){re.escape(str(folder) + os.sep)}"
    return re.sub(begins, "", text)
