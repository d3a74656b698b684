"""What a dataset format is: the keys that give it away, and how one record becomes a pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets_app.formats.pair import Pair, Record


@dataclass(frozen=True, kw_only=True)
class Format:
    """One shape of record. `example` stands on the upload page and is converted by a test."""

    key: str  # kept in Dataset.format
    title: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()  # keys that belong to another shape with the same required ones
    convert: Callable[[Record], Pair | None] = field(repr=False)
    example: str = field(repr=False)

    def matches(self, value: dict[str, Any]) -> bool:
        return all(key in value for key in self.required) and not any(key in value for key in self.excluded)

    def read(self, record: Record) -> Pair | None:
        """The pair, or None with `record.problems` filled."""
        known = {*self.required, *self.optional, "id"}
        record.unknown.update(key for key in record.value if key not in known)
        return self.convert(record)
