"""Nothing here reads or writes pickles: they can run code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORBIDDEN = re.compile(
    r"torch\.(load|save)\b|\bimport pickle|\bfrom pickle|trust_remote_code=True|\bjoblib\b|shelve"
)


def test_no_pickle_and_no_remote_code() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("training", "datasets_app", "studio")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if FORBIDDEN.search(line)
    ]
    assert found == []
