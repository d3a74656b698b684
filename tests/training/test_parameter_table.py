"""docs/parameters.md: every name of ours in it exists, none of ours is missing, and TRL's are TRL's."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from training import recipes
from training.contract import RunConfig

ROOT = Path(__file__).parents[2]
ONLY_LABELS = {"run_id", "base_model_name"}
NAME = re.compile(r"`([a-z][a-z0-9_.]*)`")


def sections() -> dict[str, list[list[str]]]:
    """Rows of cells, by the header of the section."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in (ROOT / "docs/parameters.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            title = line[3:]
        elif line.startswith("| ") and not line.startswith(("| Ours", "| Theirs", "| ---")):
            found.setdefault(title, []).append([cell.strip() for cell in line.strip("| ").split(" | ")])
    return found


TABLES = [
    row for title, rows in sections().items() if not title.startswith("What is not here") for row in rows
]
MISSING = sections()["What is not here, and why"]
FIELDS = {field.name for field in dataclasses.fields(RunConfig)}


def test_every_name_of_ours_exists_and_none_is_missing() -> None:
    ours = [name for row in TABLES for name in NAME.findall(row[0])]
    assert len(ours) == len(set(ours))
    assert set(ours) == FIELDS - ONLY_LABELS


def test_the_names_on_the_pages_are_those_of_the_recipes() -> None:
    for row in TABLES:
        (name,) = NAME.findall(row[0])
        shown = re.findall(r"\*([a-z_]+)\*", row[0])
        parameter = recipes.BY_NAME.get(name)
        expected = [parameter.label] if parameter and parameter.label != name else []
        assert shown == expected, name


def trl_names() -> set[str]:
    """Fields of TRL's and transformers' configurations, read without importing them."""
    files = []
    for package, pattern in (("trl", "**/*config.py"), ("transformers", "training_args.py")):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"{package} is not installed")
        files += Path(spec.submodule_search_locations[0]).glob(pattern)
    return {
        node.target.id
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_trl_s_names_are_those_of_the_installed_version() -> None:
    known = trl_names()
    named = {name for row in TABLES for name in NAME.findall(row[1])}
    for row in MISSING:
        for part in row[0].split(";"):
            if part.strip().startswith("TRL "):
                named |= set(NAME.findall(part))
    assert len(named) > 40
    assert not named - known
