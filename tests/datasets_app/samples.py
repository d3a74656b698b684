"""Small dataset files made in code, and the ways to bring them in that the tests share."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from datasets_app.findings import Finding
from datasets_app.formats.pair import Pair
from datasets_app.validation import Report, Validation


def record(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A good record in the shape prompt + chosen + rejected."""
    good = {"prompt": f"Question {number}?", "chosen": f"Answer {number}.", "rejected": f"No idea {number}."}
    return {key: value for key, value in {**good, **changes}.items() if value is not ...}


def jsonl(*records: Any) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in records)


def validate(data: bytes | Path) -> tuple[Report, list[Pair], list[Finding]]:
    """The whole pass over a file in memory: report, pairs, findings."""
    source = io.BytesIO(data.read_bytes() if isinstance(data, Path) else data)
    pairs, issues = io.BytesIO(), io.BytesIO()
    report = Validation(source, pairs=pairs, issues=issues, progress=lambda lines, read: None).run()
    return (
        report,
        [json.loads(line) for line in pairs.getvalue().splitlines()],
        [Finding.from_json(line) for line in issues.getvalue().splitlines()],
    )


def errors(findings: list[Finding]) -> list[tuple[int, str, str]]:
    """Line, field and code of the errors."""
    return [(f.line, f.field, f.code) for f in findings if f.level == "error"]


def codes(findings: list[Finding]) -> set[str]:
    return {finding.code for finding in findings}
