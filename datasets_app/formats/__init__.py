"""The shapes of preference data the studio reads. To add one: a file in `shapes/` with a `FORMAT`, a test.

Pure: JSON and bytes in, canonical pairs out; no Django. The engine may import this too.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from datasets_app.formats import shapes
from datasets_app.formats.pair import Problem, shorten
from datasets_app.formats.shape import Format


def _load() -> dict[str, Format]:
    names = sorted(module.name for module in pkgutil.iter_modules(shapes.__path__))
    modules = [importlib.import_module(f"{shapes.__name__}.{name}") for name in names]
    return {module.FORMAT.key: module.FORMAT for module in modules}


FORMATS: dict[str, Format] = _load()


def detect(value: dict[str, Any]) -> Format | None:
    """The one format whose keys this record has."""
    return next((shape for shape in FORMATS.values() if shape.matches(value)), None)


def unknown_shape(value: dict[str, Any]) -> Problem:
    """Says which keys were found, and what the nearest format still lacks."""
    found = ", ".join(shorten(key, 24) for key in list(value)[:10]) or "none"
    nearest = min(FORMATS.values(), key=lambda shape: _distance(shape, value))
    missing = [f"`{key}`" for key in nearest.required if key not in value]
    advice = "Write every record in one of these shapes."
    if len(missing) < len(nearest.required):
        advice = f"The nearest shape is “{nearest.title}”: add {' and '.join(missing)}."
    if "label" in value and "messages" in value:
        advice = (
            "These are single answers with a thumbs up or down. Preference tuning needs two answers to the "
            "same prompt: pair one with thumbs up and one with thumbs down."
        )
    expected = f"one of the shapes on the upload page, such as “{FORMATS['prompt'].title}”"
    return Problem("unknown_shape", "(record)", f"the keys {found}", expected, advice)


def _distance(shape: Format, value: dict[str, Any]) -> tuple[float, int]:
    missing = sum(key not in value for key in shape.required)
    return missing / len(shape.required), missing
