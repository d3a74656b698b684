"""The wizard as a road: by plain forms, back and forth, in two tabs, and in the parts that a page asks for again.

The single steps are in `test_wizard_steps`, the sources of models in `test_wizard_models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from django.test import Client
from django.urls import reverse

from datasets_app.models import Dataset
from studio.wizard import pages
from tests.studio.wizard_rows import HTMX, data_post, dataset_of, settings_post, starter, step_url
from training.models import BaseModel, TrainingTask
from training.services import drafts

pytestmark = pytest.mark.django_db
STEPS = ("model", "data", "settings", "review")


@pytest.fixture(autouse=True)
def _folders(data_dir: Path, settings: Any) -> None:
    settings.HUB_OFFLINE = True


@pytest.fixture
def base(db: None) -> BaseModel:
    return starter()


@pytest.fixture
def pairs(alice: Any) -> Dataset:
    return dataset_of(alice)


@pytest.fixture
def empty(alice: Any) -> TrainingTask:
    return drafts.draft_create(alice)


@pytest.fixture
def draft(alice: Any, base: BaseModel, pairs: Dataset) -> TrainingTask:
    """Valid in all its steps."""
    return TrainingTask.objects.create(
        owner=alice, base_model=base, dataset=pairs, name="Task", model_name="Model-v1"
    )


def reload(task: TrainingTask) -> TrainingTask:
    return TrainingTask.objects.get(pk=task.pk)


def addresses(task: TrainingTask) -> list[tuple[str, str]]:
    """(method, address) of everything that belongs to one draft."""
    found = [("get", step_url(task, step)) for step in STEPS]
    found += [("post", step_url(task, step)) for step in STEPS]
    found += [("post", reverse("setup:summary", args=[task.pk, step])) for step in STEPS]
    found += [("post", reverse(f"setup:{name}", args=[task.pk])) for name in ("download", "folder", "hub")]
    return found


# --- who ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, HTMX | {"HTTP_HX_TARGET": "models"}])
def test_a_stranger_gets_404_everywhere(
    draft: TrainingTask, mallory_client: Client, headers: dict[str, Any]
) -> None:
    for method, url in addresses(draft):
        assert getattr(mallory_client, method)(url, **headers).status_code == 404, (method, url)
    assert reload(draft).status == "draft"


def test_an_unknown_step_or_draft_is_404(draft: TrainingTask, alice_client: Client) -> None:
    assert alice_client.get(f"/tasks/{draft.pk}/setup/nothing/").status_code == 404
    assert alice_client.get(f"/tasks/{uuid4()}/setup/model/").status_code == 404


# --- the road without JavaScript ------------------------------------------------------------------------
def test_the_whole_road_by_plain_forms(
    alice: Any, alice_client: Client, base: BaseModel, pairs: Dataset
) -> None:
    url = alice_client.post(reverse("setup:new"))["Location"]
    task = TrainingTask.objects.get()
    url = alice_client.post(url, {"model": f"base:{base.pk}"})["Location"]
    assert url == step_url(task, "data")
    url = alice_client.post(url, data_post(pairs, validation_percent="20", eval_steps="3"))["Location"]
    assert url == step_url(task, "settings")
    task = reload(task)
    url = alice_client.post(url, settings_post(task, beta="0.2", target_modules=["q_proj"]))["Location"]
    assert url == step_url(task, "review")
    review = alice_client.get(url).text
    assert "Model-v1" in review
    assert "0.2" in review
    response = alice_client.post(url)
    task = reload(task)
    assert response["Location"] == reverse("tasks:detail", args=[task.pk])
    assert task.status == "queued"
    assert task.parameters == {"beta": 0.2, "target_modules": ["q_proj"]}
    assert (task.validation_share, task.eval_steps) == (0.2, 3)


def test_a_page_left_open_after_creation_leads_to_the_task_and_changes_nothing(
    draft: TrainingTask, alice_client: Client
) -> None:
    alice_client.post(step_url(draft, "review"))
    there = reverse("tasks:detail", args=[draft.pk])
    for step in STEPS:
        assert alice_client.get(step_url(draft, step))["Location"] == there
        assert (
            alice_client.post(step_url(draft, step), settings_post(draft, name="Other"))["Location"] == there
        )
        part = alice_client.post(reverse("setup:summary", args=[draft.pk, step]), **HTMX)
        assert part["HX-Redirect"] == there
    poll = alice_client.get(step_url(draft, "model"), **HTMX, HTTP_HX_TARGET="models")
    assert poll["HX-Redirect"] == there
    for name in ("download", "folder", "hub"):
        assert alice_client.post(reverse(f"setup:{name}", args=[draft.pk]))["Location"] == there
    assert reload(draft).name == "Task"


def test_create_with_a_dataset_that_went_bad_is_refused(
    draft: TrainingTask, pairs: Dataset, alice_client: Client
) -> None:
    Dataset.objects.filter(pk=pairs.pk).update(status="invalid", problem="It has no usable pair.")
    response = alice_client.post(step_url(draft, "review"), follow=True)
    assert reload(draft).status == "draft"
    assert response.redirect_chain[-1][0] == step_url(draft, "data")
    states = {link.key: link.state for link in pages.stepper(reload(draft), "data")}
    assert states == {"model": "done", "data": "problem", "settings": "closed", "review": "closed"}


# --- leaving a step -------------------------------------------------------------------------------------
def test_back_keeps_what_was_right(draft: TrainingTask, alice_client: Client) -> None:
    post = settings_post(draft, beta="0.4", learning_rate="fast", name="Renamed", go="data")
    response = alice_client.post(step_url(draft, "settings"), post)
    assert response["Location"] == step_url(draft, "data")
    assert (reload(draft).name, reload(draft).parameters) == ("Renamed", {"beta": 0.4})
    response = alice_client.post(step_url(draft, "data"), {"evaluation": "none", "go": "model"})
    assert response["Location"] == step_url(draft, "model")
    assert (reload(draft).evaluation, reload(draft).dataset_id) == ("none", draft.dataset_id)


def test_leaving_leads_only_to_steps(draft: TrainingTask, alice_client: Client) -> None:
    response = alice_client.post(step_url(draft, "settings"), settings_post(draft, go="//evil.example"))
    assert response["Location"] == step_url(draft, "review")


def test_a_dataset_still_being_validated_is_kept_and_continue_works_later(
    draft: TrainingTask, alice: Any, alice_client: Client
) -> None:
    fresh = dataset_of(alice, name="Fresh", status="validating")
    page = alice_client.get(step_url(draft, "data"), {"dataset": str(fresh.pk)}).text
    assert f'value="{fresh.pk}" checked' in " ".join(page.split())
    assert 'hx-trigger="every 1s"' in page
    response = alice_client.post(step_url(draft, "data"), data_post(fresh))
    assert response.status_code == 422
    assert "still being validated" in response.text
    assert reload(draft).dataset == fresh
    Dataset.objects.filter(pk=fresh.pk).update(status="ready")
    assert alice_client.post(step_url(draft, "data"), data_post(fresh))["Location"] == step_url(
        draft, "settings"
    )


# --- parts of pages -------------------------------------------------------------------------------------
def test_the_list_of_models_is_asked_for_again_only_while_something_loads(
    draft: TrainingTask, alice: Any, alice_client: Client
) -> None:
    part = {**HTMX, "HTTP_HX_TARGET": "models"}
    row = BaseModel.objects.create(
        owner=alice, source="hub", name="a/b", status="downloading", bytes_done=30, bytes_total=100
    )
    response = alice_client.get(step_url(draft, "model"), {"waiting": "1"}, **part)
    assert response.text.lstrip().startswith('<div id="models"')
    assert "<html" not in response.text
    assert "every 2s" in response.text
    assert "30 %" in response.text
    assert "HX-Trigger" not in response
    BaseModel.objects.filter(pk=row.pk).update(status="ready")
    response = alice_client.get(step_url(draft, "model"), {"waiting": "1"}, **part)
    assert "every 2s" not in response.text
    assert response["HX-Trigger"] == "draftchanged"


def test_a_choice_not_saved_yet_survives_the_list_being_drawn_again(
    draft: TrainingTask, alice: Any, alice_client: Client
) -> None:
    other = BaseModel.objects.create(owner=alice, source="folder", name="mine", path="/m", status="ready")
    response = alice_client.get(
        step_url(draft, "model"), {"model": f"base:{other.pk}"}, **HTMX, HTTP_HX_TARGET="models"
    )
    assert f'value="base:{other.pk}" checked' in response.text
    assert response.text.count(" checked") == 1


def test_the_chosen_dataset_is_a_part_and_says_when_it_is_ready(
    draft: TrainingTask, alice: Any, alice_client: Client
) -> None:
    fresh = dataset_of(alice, status="queued")
    part = {**HTMX, "HTTP_HX_TARGET": "dataset-status"}
    asked = {"dataset": str(fresh.pk), "waiting": "1"}
    response = alice_client.get(step_url(draft, "data"), asked, **part)
    assert response.text.lstrip().startswith('<div id="dataset-status"')
    assert "HX-Trigger" not in response
    Dataset.objects.filter(pk=fresh.pk).update(status="ready")
    response = alice_client.get(step_url(draft, "data"), asked, **part)
    assert response["HX-Trigger"] == "draftchanged"
    assert f'id="state-{fresh.pk}" hx-swap-oob="true"' in response.text
    assert "every 1s" not in response.text


# --- sources of models ----------------------------------------------------------------------------------


def test_a_download_that_cannot_be_says_so_and_a_strangers_model_is_404(
    draft: TrainingTask, alice_client: Client, mallory: Any
) -> None:
    url = reverse("setup:download", args=[draft.pk])
    row = BaseModel.objects.create(source="catalogue", name="a/b", kind="instruct", status="absent")
    response = alice_client.post(url, {"base_model": str(row.pk)}, follow=True)
    assert "cannot reach the Hub" in response.text
    theirs = BaseModel.objects.create(owner=mallory, source="hub", name="c/d", status="absent")
    for bad in (str(theirs.pk), str(uuid4()), "nonsense", ""):
        assert alice_client.post(url, {"base_model": bad}).status_code == 404


def test_a_duplicate_of_a_good_task_lands_on_the_review(draft: TrainingTask, alice_client: Client) -> None:
    alice_client.post(step_url(draft, "review"))
    response = alice_client.post(reverse("tasks:duplicate", args=[draft.pk]))
    copy = TrainingTask.objects.get(status="draft")
    assert response["Location"] == step_url(copy, "review")
    assert alice_client.get(response["Location"]).status_code == 200
