"""The parameters: defaults that hold together, refusals that name the usual range, and no input that
raises."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import recipes
from training.contract import RunConfig

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def test_the_defaults_have_no_problem_no_warning_and_no_difference() -> None:
    defaults = recipes.resolve({})
    assert recipes.problems(defaults) == {}
    assert recipes.warnings(defaults) == {}
    assert recipes.differences(defaults) == []


def test_the_defaults_are_those_of_the_engine() -> None:
    """Somebody who runs the engine by hand gets what the page promises."""
    config = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    for parameter in recipes.PARAMETERS:
        assert parameter.default == config[parameter.name], parameter.name


def test_every_parameter_explains_itself_and_its_default_lies_in_the_usual_range() -> None:
    for parameter in recipes.PARAMETERS:
        assert parameter.help and parameter.increase and parameter.decrease, parameter.name
        if parameter.kind != "modules":
            assert (
                parameter.low
                <= parameter.usual_low
                <= parameter.default
                <= parameter.usual_high
                <= parameter.high
            )


def test_the_labels_are_the_ones_people_know() -> None:
    labels = [parameter.label for parameter in recipes.PARAMETERS]
    assert labels[:4] == ["epoch", "batch_size", "learning_rate", "lora_rank"]
    assert [p.name for p in recipes.PARAMETERS if p.group == "basic"] == [
        "num_train_epochs", "per_device_train_batch_size", "learning_rate", "lora_r",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("learning_rate", 0, "learning_rate must be above 0; the usual range is 1e-6 to 0.0001."),
        ("learning_rate", -1.0, "learning_rate must be above 0; the usual range is 1e-6 to 0.0001."),
        ("num_train_epochs", 10**6, "epoch must be at most 100; the usual range is 1 to 3."),
        ("lora_r", 10**9, "lora_rank must be at most 1024; the usual range is 4 to 64."),
        ("lora_r", 1.5, "lora_rank must be a whole number; the usual range is 4 to 64."),
        ("lora_r", True, "lora_rank must be a whole number; the usual range is 4 to 64."),
        ("beta", float("nan"), "beta must be a number, not infinite or NaN; the usual range is 0.01 to 1."),
        ("beta", 10**400, "beta must be at most 100; the usual range is 0.01 to 1."),
        ("seed", "42", "seed must be a whole number; the usual range is 0 to 2147483647."),
        ("warmup_ratio", -0.1, "warmup_ratio must be at least 0; the usual range is 0.03 to 0.1."),
    ],
)
def test_nonsense_is_refused_with_the_usual_range_named(name: str, value: Any, sentence: str) -> None:
    sentence = sentence.replace("0.0001", recipes.number(1e-4))
    assert recipes.problems({name: value}) == {name: sentence}


def test_an_unknown_name_is_refused_and_known_ones_are_listed() -> None:
    found = recipes.problems({"owner": 2})
    assert "owner is not a parameter" in found["owner"] and "learning_rate" in found["owner"]


@pytest.mark.parametrize("modules", ["q_proj", [1], ["../x"], [""], ["a" * 200], ["q_proj"] * 65, {"q": 1}])
def test_target_modules_that_no_layer_can_have_are_refused(modules: Any) -> None:
    assert "target_modules" in recipes.problems({"target_modules": modules})


@given(JSON_VALUES)
def test_problems_never_raises_on_anything(value: Any) -> None:
    assert isinstance(recipes.problems(value), dict)


@given(st.dictionaries(st.sampled_from([p.name for p in recipes.PARAMETERS]), JSON_VALUES, max_size=6))
def test_what_passes_problems_can_be_resolved_warned_about_and_run(values: dict[str, Any]) -> None:
    found = recipes.problems(values)
    assert set(found) <= set(values)
    if not found:
        resolved = recipes.resolve(values)
        assert all(isinstance(sentence, str) for sentence in recipes.warnings(values).values())
        recipes.differences(values)
        config = {**resolved, "target_modules": list(resolved["target_modules"])}
        RunConfig.from_mapping({**config, "run_id": "r", "model_path": "m", "train_path": "t"})


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_shown_so_that_it_can_be_read_back(value: float) -> None:
    assert math.isclose(float(recipes.number(value)), value, rel_tol=1e-5, abs_tol=1e-300)


def test_high_learning_rate_and_many_epochs_are_warned_about_not_refused() -> None:
    values = {"learning_rate": 2e-4, "num_train_epochs": 4.0, "beta": 0.02, "lora_alpha": 128}
    assert recipes.problems(values) == {}
    assert set(recipes.warnings(values)) == {"learning_rate", "num_train_epochs", "beta", "lora_alpha"}


@pytest.mark.parametrize(("rate", "warned"), [(1e-6, False), (1e-4, False), (2e-4, True)])
def test_a_learning_rate_called_usual_is_not_warned_about(rate: float, warned: bool) -> None:
    assert ("learning_rate" in recipes.warnings({"learning_rate": rate})) is warned


@pytest.mark.parametrize(
    ("beta", "band"), [(0.01, "aggressive"), (0.05, "standard"), (0.1, "standard"), (0.5, "conservative")]
)
def test_beta_bands_are_named(beta: float, band: str) -> None:
    assert recipes.beta_band(beta)[0] == band


def test_differences_say_both_values() -> None:
    (found,) = recipes.differences({"learning_rate": 5e-6, "lora_r": 16})
    assert (found.parameter.label, found.value, found.default) == ("learning_rate", "5e-6", "5e-5")
    (found,) = recipes.differences({"target_modules": ["q_proj", "v_proj"]})
    assert (found.value, found.default) == ("q_proj, v_proj", "all linear layers")


def test_parameters_survive_json() -> None:
    values = recipes.resolve({"target_modules": ["q_proj"]})
    assert recipes.resolve(json.loads(json.dumps(values))) == values
