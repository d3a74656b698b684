"""JSON read strictly: what Python's parser lets pass and a dataset must not hold raises `BadJson`."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 64
MAX_DIGITS = 100
_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


class BadJson(ValueError):
    """Not a JSON value that may be used. `code`, `found`, `next_step` are for the person."""

    def __init__(self, code: str, found: str, next_step: str) -> None:
        super().__init__(found)
        self.code, self.found, self.next_step = code, found, next_step


def loads(line: bytes) -> Any:
    """The value of one line. Raises only `BadJson`."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadJson(
            "not_utf8",
            f"byte {line[error.start]:#04x} at position {error.start + 1}, which is not UTF-8",
            "Save the file again with the encoding UTF-8.",
        ) from None
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
        raise _too_deep()
    try:
        return _DECODER.decode(text)
    except BadJson:
        raise
    except json.JSONDecodeError as error:
        raise _syntax(error, text) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # e.g. an integer longer than Python converts
        raise BadJson("bad_number", str(error)[:100], "Write a shorter number.") from None


def _depth(line: bytes) -> int:
    depth = deepest = 0
    for match in _BRACKETS.finditer(line):
        first = match.group()[:1]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in b"]}":
            depth -= 1
    return deepest


def _too_deep() -> BadJson:
    return BadJson(
        "too_deep",
        f"values nested more than {MAX_DEPTH} levels deep",
        "Flatten the record to one of the shapes shown on the upload page.",
    )


def _syntax(error: json.JSONDecodeError, text: str) -> BadJson:
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return BadJson(
            "truncated",
            "a record that ends before it is complete",
            "Complete the record; if it is the last line, the file was probably cut off: export it again.",
        )
    if error.msg.startswith("Extra data"):
        found = f"more text after the record, at character {error.pos + 1}"
        return BadJson("extra_data", found, "Put every record on a line of its own.")
    around = text[max(0, error.pos - 12) : error.pos + 12]
    shown = "".join(char if char.isprintable() else " " for char in around)
    found = f"{error.msg} at character {error.pos + 1}, near “{shown}”"
    return BadJson("not_json", found, "Write the record as JSON: keys and texts in double quotes.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        shown = double[:40].encode("utf-8", "replace").decode()
        raise BadJson("duplicate_key", f"the key “{shown}” twice in one object", "Keep one of the two.")
    return value


def _constant(name: str) -> Any:
    raise BadJson(
        "not_a_number", f"{name}, which JSON does not have", "Write null, a number or a text instead."
    )


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BadJson(
            "bad_number", f"a number of {len(digits)} digits", "Write a shorter number, or text in quotes."
        )
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadJson(
            "bad_number", "a number too large to hold", "Write a smaller number, or text in quotes."
        )
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float
)
