"""The four steps as pages: each works, is refused with words, and is nobody else's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from datasets_app.models import Dataset
from tests.studio.made_drafts import make_dataset, make_draft, make_parent, make_starter
from training import recipes
from training.models import BaseModel, TrainingTask

pytestmark = pytest.mark.django_db
HTMX = {"HTTP_HX_REQUEST": "true"}
STEPS = ("model", "data", "settings", "review")


@pytest.fixture
def starter(db: None, data_dir: Path) -> BaseModel:
    return make_starter()


@pytest.fixture
def draft(alice: Any, starter: BaseModel) -> TrainingTask:
    return make_draft(alice, starter)


def at(task: TrainingTask, step: str, name: str = "step") -> str:
    return reverse(f"setup:{name}", args=[task.pk, step])


def reload(task: TrainingTask) -> TrainingTask:
    return TrainingTask.objects.get(pk=task.pk)


def settings_data(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"name": "My task", "model_name": "My model"}
    for parameter in recipes.PARAMETERS:
        if parameter.kind != "modules":
            data[parameter.name] = recipes.number(parameter.default)
    return (
        data
        | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
        | changes
    )


def data_data(task: TrainingTask, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": str(task.dataset_id), "evaluation": "split", "validation_percent": "10", "eval_steps": "0",
    } | changes  # fmt: skip


def post_step(client: Client, task: TrainingTask, step: str) -> Any:
    data = {
        "model": {"model": f"base:{task.base_model_id}"},
        "data": data_data(task),
        "settings": settings_data(),
        "review": {},
    }[step]
    return client.post(at(task, step), data)


# --- every address ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", STEPS)
def test_each_step_opens_for_its_owner_and_is_404_for_a_stranger(
    alice_client: Client, mallory_client: Client, draft: TrainingTask, step: str
) -> None:
    page = alice_client.get(at(draft, step))
    assert page.status_code == 200 and b"summary" in page.content
    for response in (
        mallory_client.get(at(draft, step)),
        mallory_client.get(at(draft, step), **HTMX),
        mallory_client.post(at(draft, step)),
        mallory_client.post(at(draft, step, "summary")),
    ):
        assert response.status_code == 404
    assert reload(draft).status == "draft"


@pytest.mark.parametrize("name", ["download", "folder", "hub"])
def test_models_are_added_by_post_and_only_to_one_s_own_draft(
    alice_client: Client, mallory_client: Client, draft: TrainingTask, name: str
) -> None:
    url = reverse(f"setup:{name}", args=[draft.pk])
    assert alice_client.get(url).status_code == 405
    assert mallory_client.post(url).status_code == 404
    assert Client().post(url).status_code == 302


@pytest.mark.parametrize("step", STEPS)
def test_an_anonymous_visitor_is_sent_to_sign_in_and_other_methods_are_refused(
    alice_client: Client, draft: TrainingTask, step: str
) -> None:
    assert reverse("accounts:sign-in") in Client().get(at(draft, step))["Location"]
    assert alice_client.delete(at(draft, step)).status_code == 405
    assert alice_client.get(at(draft, step, "summary")).status_code == 405


def test_help_on_choosing_a_model_names_the_four_kinds(alice_client: Client, starter: BaseModel) -> None:
    page = alice_client.get("/tasks/help/choosing-a-model/").content.decode()
    assert "How to choose a model" in page and starter.name in page
    assert Client().get("/tasks/help/choosing-a-model/").status_code == 302


# --- a new draft -------------------------------------------------------------------------------------------
def test_a_new_draft_opens_at_the_first_step_with_the_starter_ticked(
    alice_client: Client, starter: BaseModel
) -> None:
    assert alice_client.get("/tasks/new/").status_code == 405
    response = alice_client.post("/tasks/new/")
    task = TrainingTask.objects.get()
    assert response["Location"] == at(task, "model")
    page = alice_client.get(at(task, "model")).content.decode()
    assert re.search(rf'value="base:{starter.pk}" checked', page)
    assert reload(task).base_model is None, "shown as chosen, but saved only when the person goes on"


def test_a_new_draft_may_bring_a_dataset_or_a_model_of_one_s_own(
    alice_client: Client, mallory_client: Client, alice: Any, starter: BaseModel
) -> None:
    dataset, parent = make_dataset(alice), make_parent(alice, starter)
    assert mallory_client.post("/tasks/new/", {"dataset": dataset.pk}).status_code == 404
    assert mallory_client.post("/tasks/new/", {"parent_model": parent.pk}).status_code == 404
    assert alice_client.post("/tasks/new/", {"dataset": "no-id"}).status_code == 404
    alice_client.post(
        "/tasks/new/", {"dataset": dataset.pk, "parent_model": parent.pk, "owner": 2, "status": "queued"}
    )
    (task,) = TrainingTask.objects.all()
    assert (task.owner, task.status, task.dataset, task.parent_model) == (alice, "draft", dataset, parent)


# --- order of the steps ---------------------------------------------------------------------------------------
def test_a_later_step_opens_only_when_the_earlier_ones_are_right(
    alice_client: Client, alice: Any, starter: BaseModel
) -> None:
    task = TrainingTask.objects.create(owner=alice)
    for step in STEPS[1:]:
        response = alice_client.get(at(task, step), follow=True)
        assert response.redirect_chain[-1][0] == at(task, "model")
        assert "First finish" in response.content.decode()
    TrainingTask.objects.update(base_model=starter, dataset=make_dataset(alice, status="validating"))
    response = alice_client.get(at(task, "settings"), follow=True)
    assert response.redirect_chain[-1][0] == at(task, "data")
    assert "still being validated" in response.content.decode()


def test_each_step_leads_to_the_next_and_the_draft_is_kept_between(
    alice_client: Client, alice: Any, starter: BaseModel
) -> None:
    """The whole road without JavaScript, each step in a browser of its own."""
    dataset = make_dataset(alice)
    task = TrainingTask.objects.create(owner=alice)
    other = Client()
    other.force_login(alice)
    assert alice_client.post(at(task, "model"), {"model": f"base:{starter.pk}"})["Location"] == at(
        task, "data"
    )
    data = {"dataset": str(dataset.pk), "evaluation": "split", "validation_percent": "20", "eval_steps": "3"}
    assert other.post(at(task, "data"), data)["Location"] == at(task, "settings")
    response = alice_client.post(
        at(task, "settings"), settings_data(learning_rate="2e-5", target_modules=["q_proj"])
    )
    assert response["Location"] == at(task, "review")
    assert other.post(at(task, "review"))["Location"] == reverse("tasks:detail", args=[task.pk])
    task = reload(task)
    assert (task.status, task.base_model, task.dataset) == ("queued", starter, dataset)
    assert (task.validation_share, task.eval_steps) == (0.2, 3)
    assert task.parameters == {"learning_rate": 2e-5, "target_modules": ["q_proj"]}


@pytest.mark.parametrize("step", STEPS)
def test_a_created_task_s_wizard_leads_to_its_page_and_changes_nothing(
    alice_client: Client, draft: TrainingTask, step: str
) -> None:
    TrainingTask.objects.update(status="queued")
    before = TrainingTask.objects.values().get()
    detail = reverse("tasks:detail", args=[draft.pk])
    assert alice_client.get(at(draft, step))["Location"] == detail
    assert post_step(alice_client, draft, step)["Location"] == detail
    assert alice_client.post(at(draft, step, "summary"), **HTMX)["HX-Redirect"] == detail
    assert TrainingTask.objects.values().get() == before


# --- step 2 ---------------------------------------------------------------------------------------------------
def test_the_chosen_dataset_is_shown_with_its_pairs_as_text(
    alice_client: Client, draft: TrainingTask
) -> None:
    page = alice_client.get(at(draft, "data")).content.decode()
    assert "Question 0?" in page and "&lt;script&gt;alert(1)" in page and "<script>alert(1)" not in page
    assert "Ensure clear quality differences" in page and "100–100,000" in page


def test_the_status_of_a_dataset_is_asked_for_until_it_is_ready(
    alice_client: Client, alice: Any, draft: TrainingTask
) -> None:
    busy = make_dataset(alice, status="validating", lines_done=41)
    query = {"dataset": str(busy.pk)}
    headers = HTMX | {"HTTP_HX_TARGET": "dataset-status"}
    part = alice_client.get(at(draft, "data"), query, **headers).content.decode()
    assert "<html" not in part and "41 lines" in part and "hx-trigger" in part
    Dataset.objects.update(status="ready")
    part = alice_client.get(at(draft, "data"), query, **headers).content.decode()
    assert "Question 0?" in part and "every 1s" not in part


def test_somebody_else_s_dataset_is_neither_shown_nor_taken(
    alice_client: Client, mallory: Any, draft: TrainingTask
) -> None:
    theirs = make_dataset(mallory, name="Secret pairs")
    page = alice_client.get(at(draft, "data"), {"dataset": str(theirs.pk)}).content.decode()
    assert "Secret pairs" not in page
    for name in ("dataset", "validation_dataset"):
        response = alice_client.post(
            at(draft, "data"), data_data(draft, evaluation="file", **{name: str(theirs.pk)})
        )
        assert response.status_code == 422 and "Secret pairs" not in response.content.decode()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": ""}, "Choose a dataset"),
        ({"dataset": "../../etc"}, "dataset"),
        ({"validation_percent": "-3"}, "more than 0 percent"),
        ({"validation_percent": "90"}, "at most 50 percent"),
        ({"validation_percent": "NaN"}, "10 is usual"),
        ({"validation_percent": "much"}, "10 is usual"),
        ({"validation_percent": ""}, "10 percent is usual"),
        ({"evaluation": "file"}, "Choose the dataset to validate on"),
        ({"evaluation": "magic"}, "magic"),
        ({"eval_steps": "-1"}, "0 lets the studio choose"),
        ({"eval_steps": "9e9"}, "whole number"),
        ({"eval_steps": "99999999"}, "0 lets the studio choose"),
    ],
)
def test_what_is_wrong_on_step_2_is_said_and_nothing_is_lost(
    alice_client: Client, draft: TrainingTask, changes: dict[str, str], words: str
) -> None:
    response = alice_client.post(at(draft, "data"), data_data(draft, **changes))
    assert response.status_code == 422 and words in response.content.decode()
    assert reload(draft).dataset_id == draft.dataset_id


def test_a_dataset_that_is_still_validated_keeps_step_2_open(
    alice_client: Client, draft: TrainingTask
) -> None:
    Dataset.objects.update(status="queued")
    response = alice_client.post(at(draft, "data"), data_data(draft))
    assert response.status_code == 422 and "still being validated" in response.content.decode()


# --- step 3 ---------------------------------------------------------------------------------------------------
def test_step_3_has_every_parameter_with_default_range_and_help(
    alice_client: Client, draft: TrainingTask
) -> None:
    page = alice_client.get(at(draft, "settings")).content.decode()
    for parameter in recipes.PARAMETERS:
        assert f"<code>{parameter.label}</code>" in page and f'name="{parameter.name}"' in page
    assert page.count("Increase") >= 11 and page.count("Decrease") >= 11
    assert "Custom Model Name" in page and "Task Display Name" in page
    assert 'value="gate_proj"' in page, "the real layers of the chosen model"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": "-1"}, "learning_rate must be above 0; the usual range is 1e-6 to 1e-4."),
        ({"learning_rate": "NaN"}, "learning_rate must be a number, not infinite or NaN"),
        ({"num_train_epochs": "1000000"}, "epoch must be at most 100; the usual range is 1 to 3."),
        ({"lora_r": "1e9"}, "lora_rank must be at most 1024; the usual range is 4 to 64."),
        ({"lora_r": "1.5"}, "lora_rank must be a whole number; the usual range is 4 to 64."),
        (
            {"per_device_train_batch_size": "two"},
            "batch_size must be a whole number; the usual range is 1 to 16.",
        ),
        ({"beta": ""}, "0.1 is the default"),
        ({"beta": "1" * 60}, "beta must be a number; the usual range is 0.01 to 1."),
        ({"target_modules": ["lm_head"]}, "lm_head is not a layer of this model"),
        ({"target_modules": []}, "Choose at least one layer"),
        ({"name": "x" * 300}, "Use at most 120 characters; these are 300."),
        ({"model_name": "x" * 300}, "Use at most 120 characters; these are 300."),
        ({"model_name": "  "}, "Give the model a name."),
    ],
)
def test_nonsense_is_refused_with_the_usual_range_and_nothing_is_lost(
    alice_client: Client, draft: TrainingTask, changes: dict[str, Any], words: str
) -> None:
    response = alice_client.post(at(draft, "settings"), settings_data(lora_alpha="48") | changes)
    page = response.content.decode()
    assert response.status_code == 422 and words in page
    assert 'value="48"' in page, "what was typed elsewhere stands"
    assert reload(draft).parameters == {"beta": 0.2}


def test_the_cursor_goes_to_the_value_to_mend_and_its_error_is_read_out(
    alice_client: Client, draft: TrainingTask
) -> None:
    page = alice_client.post(at(draft, "settings"), settings_data(lora_r="1.5")).content.decode()
    assert page.count(" autofocus") == 1
    field = next(tag for tag in page.split("<input") if 'name="lora_r"' in tag).split(">")[0]
    assert " autofocus" in field and 'aria-describedby="id_lora_r_error help-lora_r"' in field
    assert 'id="id_lora_r_error"' in page
    assert " autofocus" not in alice_client.get(at(draft, "settings")).content.decode()


def test_values_that_are_no_parameters_are_ignored(
    alice_client: Client, draft: TrainingTask, mallory: Any
) -> None:
    data = settings_data(owner=mallory.pk, status="succeeded", lease_epoch="9", max_steps="1", device="cuda")
    assert alice_client.post(at(draft, "settings"), data).status_code == 302
    task = reload(draft)
    assert (task.owner, task.status, task.lease_epoch, task.parameters) == (draft.owner, "draft", 0, {})


def test_an_adapter_to_start_from_decides_rank_and_layers(
    alice_client: Client, alice: Any, starter: BaseModel, draft: TrainingTask
) -> None:
    parent = make_parent(alice, starter, lora_r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    alice_client.post(at(draft, "model"), {"model": f"parent:{parent.pk}"})
    page = alice_client.get(at(draft, "settings")).content.decode()
    assert "Polite v1" in page and re.search(r'name="lora_r"[^>]*value="8"[^>]*disabled', page)
    alice_client.post(at(draft, "settings"), settings_data(lora_r="64", target_modules=["o_proj"]))
    assert reload(draft).parameters == {"lora_r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


# --- the live summary -------------------------------------------------------------------------------------------
def test_the_summary_follows_the_form_and_saves_nothing(alice_client: Client, draft: TrainingTask) -> None:
    before = TrainingTask.objects.values().get()
    data = settings_data(
        per_device_train_batch_size="1", gradient_accumulation_steps="4", learning_rate="3e-5"
    )
    part = alice_client.post(at(draft, "settings", "summary"), data, **HTMX).content.decode()
    assert "<html" not in part and "Ready" in part
    assert "4 pairs" in part and "45" in part, "180 pairs, 4 an update: 45 steps"
    assert "3e-5" in part and "instead of" in part
    assert TrainingTask.objects.values().get() == before


def test_the_summary_says_what_would_not_be_accepted(alice_client: Client, draft: TrainingTask) -> None:
    part = alice_client.post(
        at(draft, "settings", "summary"), settings_data(beta="0"), **HTMX
    ).content.decode()
    assert "beta must be above 0; the usual range is 0.01 to 1." in part and "Not ready" in part


def test_the_summary_counts_the_split_live(alice_client: Client, draft: TrainingTask) -> None:
    data = data_data(draft, validation_percent="25")
    part = alice_client.post(at(draft, "data", "summary"), data, **HTMX).content.decode()
    assert "150" in part and "50" in part


# --- step 4 ---------------------------------------------------------------------------------------------------
def test_review_shows_everything_with_a_way_back(alice_client: Client, draft: TrainingTask) -> None:
    page = alice_client.get(at(draft, "review")).content.decode()
    assert draft.base_model is not None
    for text in (
        "My task",
        "My model",
        draft.base_model.name,
        "Brief answers",
        "Create Task",
        "Trained parameters",
    ):
        assert text in page
    for step in STEPS[:3]:
        assert f'href="{at(draft, step)}"' in page
    for parameter in recipes.PARAMETERS:
        assert f"<code>{parameter.label}</code>" in page


def test_two_clicks_on_create_make_one_task(alice_client: Client, draft: TrainingTask) -> None:
    detail = reverse("tasks:detail", args=[draft.pk])
    assert alice_client.post(at(draft, "review"))["Location"] == detail
    queued_at = reload(draft).queued_at
    assert alice_client.post(at(draft, "review"))["Location"] == detail
    assert TrainingTask.objects.count() == 1
    assert (reload(draft).status, reload(draft).queued_at) == ("queued", queued_at)


def test_a_draft_that_went_bad_since_is_not_created_and_the_step_to_mend_is_linked(
    alice_client: Client, draft: TrainingTask
) -> None:
    Dataset.objects.update(status="failed", problem="The disk was full.")
    response = alice_client.post(at(draft, "review"), follow=True)
    assert response.redirect_chain[-1][0] == at(draft, "data")
    assert "The disk was full." in response.content.decode()
    assert reload(draft).status == "draft"


def test_warnings_stand_on_the_review_and_do_not_stop_it(alice_client: Client, draft: TrainingTask) -> None:
    TrainingTask.objects.update(parameters={"learning_rate": 1e-3, "num_train_epochs": 9.0})
    page = alice_client.get(at(draft, "review")).content.decode()
    assert "learning_rate 0.001 is high" in page and "9 passes" in page
    assert alice_client.post(at(draft, "review")).status_code == 302
    assert reload(draft).status == "queued"


def test_names_are_text_wherever_they_are_shown(alice_client: Client, draft: TrainingTask) -> None:
    name = "<img src=x onerror=alert(1)>"
    TrainingTask.objects.update(name=name, model_name=name)
    Dataset.objects.update(name=name)
    for step in STEPS:
        page = alice_client.get(at(draft, step)).content.decode()
        assert name not in page and "&lt;img src=x" in page
