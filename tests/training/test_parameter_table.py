"""docs/parameters.md: every name of ours in it exists, none of ours is missing, and TRL's are TRL's."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from training import recipes
from training.contract import ConfigError, RunConfig
from training.engine.errors import RefusedError
from training.engine.preflight import check_config
from training.setting_names import NOT_HERE, OURS

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


def backticked(cell: str) -> set[str]:
    """Whole names, and of `a.b` both: a is the key that stands in a file."""
    return {part for name in NAME.findall(cell) for part in (name.partition(".")[0], name.rpartition(".")[2])}


def test_the_engine_translates_every_name_of_the_table() -> None:
    """What config.json is refused with names the setting of ours that the row is about."""
    theirs: dict[str, set[str]] = {}
    for row in TABLES:
        ours = NAME.findall(row[0])[0]
        names = backticked(" ".join(row[1:4])) | set(re.findall(r"\*([a-z_]+)\*", row[0]))
        for name in names - FIELDS - {"sigmoid", "sft", "type"}:
            theirs.setdefault(name, set()).add(ours)
    assert len(theirs) > 40
    assert set(theirs) - {"method"} == set(OURS)
    wrong = {name for name, ours in theirs.items() if OURS[name] not in ours}
    assert not wrong
    without = {name for row in MISSING for name in backticked(row[0])} - FIELDS - set(OURS)
    assert without == NOT_HERE


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("n_epochs", "n_epochs (here: num_train_epochs)"),
        ("dpo_beta", "dpo_beta (here: beta)"),
        ("lerning_rate", "lerning_rate (did you mean learning_rate?)"),
        ("Max_Length", "Max_Length (did you mean max_length?)"),
        ("num_epochs", "num_epochs (did you mean num_train_epochs?)"),
        ("per_device_eval_batch_size", "per_device_eval_batch_size (has no counterpart here)"),
        ("banana", "banana."),
    ],
)
def test_a_setting_that_is_not_known_is_refused_with_the_one_that_is_meant(name: str, said: str) -> None:
    given = {"run_id": "a", "model_path": "/m", "train_path": "/t", name: 1}
    with pytest.raises(ConfigError, match=re.escape(f"Unknown settings in config.json: {said}")):
        RunConfig.from_mapping(given)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("simpo", "SimPO is the method dpo with simpo_gamma above 0"),
        ("SimPO", "SimPO is the method dpo with simpo_gamma above 0"),
        ("ipo", "ipo is a loss_type of the method dpo"),
        ("kto", "learns from pairs"),
        ("ppo", "learns from pairs"),
        ("grpo", "learns from pairs"),
        ("rlhf", "learns from pairs"),
        ("reward", "without a reward model"),
        ("lora", "finetuning_type"),
        ("banana", "Use dpo, sft or orpo."),
        (["dpo"], "Use dpo, sft or orpo."),
    ],
)
@pytest.mark.parametrize("others", [{}, {"simpo_gamma": 1.0}])
def test_a_method_of_another_name_is_refused_with_where_it_is(
    method: Any, words: str, others: dict[str, Any]
) -> None:
    given = {"run_id": "a", "model_path": "/m", "train_path": "/t", "method": method} | others
    with pytest.raises(RefusedError) as refused:
        check_config(RunConfig.from_mapping(given))
    assert refused.value.sentence == f"method {method!r} is not known here."
    assert words in refused.value.next_step
    assert refused.value.next_step.endswith("Use dpo, sft or orpo.")
