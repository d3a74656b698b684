"""The forms of the wizard: numbers as people write them, refusals that name the usual range, names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

from studio.wizard.forms import DataStepForm, ModelStepForm, SettingsStepForm, written_number
from tests.studio.wizard_rows import data_post, dataset_of, settings_post, starter
from training import recipes
from training.models import BaseModel, TrainedModel, TrainingTask, WorkerHost
from training.services import drafts
from training.services.draft_checks import draft_problems

pytestmark = pytest.mark.django_db


@pytest.fixture
def draft(alice: Any, data_dir: Path) -> TrainingTask:
    return TrainingTask.objects.create(owner=alice, base_model=starter(), dataset=dataset_of(alice))


def settings_form(draft: TrainingTask, **changes: Any) -> SettingsStepForm:
    return SettingsStepForm(settings_post(draft, **changes), task=draft)


@pytest.mark.parametrize(
    ("text", "whole", "number"),
    [
        ("5e-6", False, 5e-6), (" 0.1 ", False, 0.1), ("5,5", False, 5.5), ("1,024", True, 1024),
        ("12,345,678", True, 12_345_678), ("1,024", False, 1.024), ("1e3", True, 1000),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text: str, whole: bool, number: float) -> None:
    assert written_number(text, whole=whole) == number


@pytest.mark.parametrize("text", ["", "ten", "1_000", "1 000", "5,5,5", "0x10", "--1"])
def test_what_is_no_number_is_not_guessed_at(text: str) -> None:
    with pytest.raises(ValueError, match=r"float|Python"):
        written_number(text)


def test_the_defaults_are_valid_and_kept_as_numbers(draft: TrainingTask) -> None:
    form = settings_form(draft)
    assert form.is_valid(), form.errors
    assert form.values()["parameters"] == {**recipes.resolve({}), "target_modules": []}


def test_scientific_and_decimal_comma_are_accepted(draft: TrainingTask) -> None:
    form = settings_form(draft, learning_rate="5e-5", num_train_epochs="1,5", max_length="2,048")
    assert form.is_valid(), form.errors
    values = form.values()["parameters"]
    assert (values["learning_rate"], values["num_train_epochs"], values["max_length"]) == (5e-5, 1.5, 2048)
    assert isinstance(values["max_length"], int)


@pytest.mark.parametrize(
    "written", ["", "-1", "nan", "inf", "1e400", "ten", "9" * 39, "9" * 60, "<script>", "1_0", "\x00"]
)
def test_nonsense_is_refused_with_the_usual_range_named(draft: TrainingTask, written: str) -> None:
    numbers = [parameter for parameter in recipes.PARAMETERS if parameter.kind != "modules"]
    form = settings_form(draft, **{parameter.name: written for parameter in numbers})
    assert set(form.errors) == {parameter.name for parameter in numbers}
    for parameter in numbers:
        sentence = form.errors[parameter.name][0]
        if not written:
            assert f"{recipes.number(parameter.default)} is the default" in sentence
        elif written != "\x00":
            assert f"the usual range is {parameter.usual}" in sentence


@pytest.mark.parametrize("field", ["name", "model_name"])
def test_a_name_of_300_characters_is_refused_and_the_limit_said(draft: TrainingTask, field: str) -> None:
    form = settings_form(draft, **{field: "x" * 300})
    assert form.errors == {field: ["Use at most 120 characters; these are 300."]}


def test_names_are_suggested_from_the_choices(draft: TrainingTask) -> None:
    form = SettingsStepForm(task=draft)
    assert form["model_name"].value() == "SmolLM2-135M-Instruct-aligned-v1"
    assert str(form["name"].value()).startswith("DPO Pairs ")


@pytest.mark.parametrize("name", ["x" * 200, "Example: " + "y" * 191])
def test_suggested_names_of_long_sources_are_short_enough(draft: TrainingTask, name: str) -> None:
    assert draft.base_model and draft.dataset
    draft.base_model.name = draft.dataset.name = name
    form = SettingsStepForm(task=draft)
    again = settings_form(draft, name=form["name"].value(), model_name=form["model_name"].value())
    assert again.is_valid(), again.errors


def test_all_layers_are_ticked_at_first_and_kept_as_the_default(draft: TrainingTask) -> None:
    form = SettingsStepForm(task=draft)
    assert form["target_modules"].value() == list(form.modules)
    posted = settings_form(draft)
    assert posted.is_valid()
    assert posted.values()["parameters"]["target_modules"] == []


def test_a_layer_of_another_model_is_refused(draft: TrainingTask) -> None:
    form = settings_form(draft, target_modules=["q_proj", "c_attn"])
    assert form.errors == {"target_modules": ["c_attn is not a layer of this model. Choose from the list."]}


def test_what_is_right_is_kept_beside_what_is_wrong(draft: TrainingTask) -> None:
    form = settings_form(draft, beta="0.3", learning_rate="fast", name="x" * 300, model_name="Kept")
    assert not form.is_valid()
    values = form.values()
    assert (values["model_name"], values["name"]) == ("Kept", "")
    assert values["parameters"]["beta"] == 0.3
    assert values["parameters"]["learning_rate"] == 5e-5


def test_an_adapter_to_start_from_decides_its_rank(draft: TrainingTask, alice: Any) -> None:
    draft.parent_model = TrainedModel.objects.create(
        owner=alice, name="First", base_model=draft.base_model, base_model_name="b", parameters={"lora_r": 4}
    )
    form = settings_form(draft, lora_r="64")
    assert form.is_valid(), form.errors
    assert form.values()["parameters"]["lora_r"] == 4


# --- step 2 ---------------------------------------------------------------------------------------------
def test_the_share_is_shown_without_noughts(draft: TrainingTask) -> None:
    assert DataStepForm(task=draft)["validation_percent"].value() == "10"
    draft.validation_share = 0.125
    assert DataStepForm(task=draft)["validation_percent"].value() == "12.5"


@pytest.mark.parametrize(("written", "share"), [("10", 0.1), ("12,5", 0.125), ("0.5", 0.005), ("50", 0.5)])
def test_a_share_is_read(draft: TrainingTask, written: str, share: float) -> None:
    assert draft.dataset
    form = DataStepForm(data_post(draft.dataset, validation_percent=written), task=draft)
    assert form.is_valid(), form.errors
    assert form.values()["validation_share"] == share


@pytest.mark.parametrize("written", ["", "0", "-5", "60", "nan", "inf", "a tenth"])
def test_a_share_that_cannot_be_is_refused_with_the_usual_one(draft: TrainingTask, written: str) -> None:
    assert draft.dataset
    form = DataStepForm(data_post(draft.dataset, validation_percent=written), task=draft)
    assert list(form.errors) == ["validation_percent"]
    assert "10" in form.errors["validation_percent"][0]


def test_a_share_that_is_not_used_need_not_be_right(draft: TrainingTask) -> None:
    assert draft.dataset
    form = DataStepForm(data_post(draft.dataset, evaluation="none", validation_percent="x"), task=draft)
    assert form.is_valid(), form.errors


@pytest.mark.parametrize("written", ["-1", "1.5", "often", "99999999"])
def test_an_interval_that_cannot_be_is_refused(draft: TrainingTask, written: str) -> None:
    assert draft.dataset
    form = DataStepForm(data_post(draft.dataset, eval_steps=written), task=draft)
    assert list(form.errors) == ["eval_steps"]


def test_somebody_elses_dataset_cannot_be_chosen(draft: TrainingTask, mallory: Any) -> None:
    theirs = dataset_of(mallory)
    form = DataStepForm(data_post(theirs, evaluation="file", validation_dataset=str(theirs.pk)), task=draft)
    assert set(form.errors) == {"dataset", "validation_dataset"}


# --- step 1 ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value", ["", "base:", "base:1", "/etc/passwd", "base:" + "0" * 32, "parent:" + "0" * 32]
)
def test_only_a_listed_model_can_be_chosen(draft: TrainingTask, value: str) -> None:
    assert list(ModelStepForm({"model": value}, task=draft).errors) == ["model"]


def test_somebody_elses_models_cannot_be_chosen(draft: TrainingTask, mallory: Any) -> None:
    folder = BaseModel.objects.create(
        owner=mallory, source="folder", name="theirs", path="/m", status="ready"
    )
    model = TrainedModel.objects.create(
        owner=mallory, name="T", base_model=draft.base_model, base_model_name="b"
    )
    for value in (f"base:{folder.pk}", f"parent:{model.pk}"):
        assert list(ModelStepForm({"model": value}, task=draft).errors) == ["model"]


def test_the_number_of_gpus_is_asked_only_where_there_are_several(draft: TrainingTask) -> None:
    assert "num_devices" not in settings_form(draft).fields
    WorkerHost.objects.create(
        host="h", queue="gpu", boot_id="b", pid=1, last_seen=timezone.now(),
        gpus=[{"uuid": "GPU-0"}, {"uuid": "GPU-1"}],
    )  # fmt: skip
    form = settings_form(draft, num_devices="2")
    assert form.is_valid(), form.errors
    assert form.values()["num_devices"] == 2
    drafts.draft_save_settings(draft, **form.values())
    draft.refresh_from_db()
    assert draft.num_devices == 2
    assert settings_form(draft, num_devices="3").errors["num_devices"] == ["Choose from 1 to 2 GPUs."]
    WorkerHost.objects.update(gpus=[{"uuid": "GPU-0"}])
    assert any("num_devices is 2" in problem.text for problem in draft_problems(draft))
    assert "num_devices" in settings_form(draft).fields, "or it could not be corrected"
