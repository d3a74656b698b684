"""The pages of My Models: the owner's way through them, the stranger's 404, and what deleting does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from tests.studio.made_models import make_base, make_model
from training.models import TrainedModel, TrainingTask
from training.services.trained_models import lineage, trained_model_delete

pytestmark = pytest.mark.django_db
HX = {"headers": {"HX-Request": "true"}}
PAGES = ["detail", "rename", "delete", "download"]


@pytest.fixture
def model(alice: Any, data_dir: Path) -> TrainedModel:
    return make_model(alice)


def at(name: str, model: TrainedModel) -> str:
    return reverse(f"my_models:{name}", args=[model.pk])


@pytest.mark.parametrize("name", PAGES)
def test_a_stranger_gets_404_on_every_page_of_a_model(
    name: str, model: TrainedModel, mallory_client: Client
) -> None:
    assert mallory_client.get(at(name, model)).status_code == 404
    assert mallory_client.get(at(name, model), **HX).status_code == 404


@pytest.mark.parametrize("name", PAGES)
def test_an_anonymous_visitor_is_sent_to_sign_in(name: str, model: TrainedModel, client: Client) -> None:
    response = client.get(at(name, model))
    assert response.status_code == 302
    assert response.headers["Location"].startswith(reverse("accounts:sign-in"))


@pytest.mark.parametrize(
    ("name", "method"), [("detail", "post"), ("download", "post"), ("rename", "put"), ("delete", "put")]
)
def test_a_wrong_method_is_405(name: str, method: str, model: TrainedModel, alice_client: Client) -> None:
    assert getattr(alice_client, method)(at(name, model)).status_code == 405


def test_a_stranger_can_neither_rename_nor_delete(model: TrainedModel, mallory_client: Client) -> None:
    assert mallory_client.post(at("rename", model), {"name": "mine"}).status_code == 404
    assert mallory_client.post(at("delete", model)).status_code == 404
    model.refresh_from_db()
    assert model.name == "Brief answers v1"
    assert model.folder.exists()


def test_the_list_shows_what_matters_and_only_ones_own(
    model: TrainedModel, alice_client: Client, mallory_client: Client
) -> None:
    page = alice_client.get(reverse("my_models:list")).content.decode()
    for text in ("Brief answers v1", "org/tiny-base", "Example: brief", "87.5%", "18.7"):
        assert text in page, text
    assert "Brief answers v1" not in mallory_client.get(reverse("my_models:list")).content.decode()


def test_an_empty_list_shows_the_way_in(alice_client: Client) -> None:
    page = alice_client.get(reverse("my_models:list")).content.decode()
    assert "No models yet" in page
    assert f'action="{reverse("setup:new")}"' in page


def test_the_search_finds_by_every_word_and_answers_htmx_with_the_list_alone(
    alice: Any, alice_client: Client, data_dir: Path
) -> None:
    make_model(alice, name="Safety one", base=make_base(name="org/llama"))
    make_model(alice, name="Brief one", base=make_base(name="org/qwen"))
    page = alice_client.get(reverse("my_models:list"), {"q": "one qwen"}, **HX).content.decode()
    assert "Brief one" in page
    assert "Safety one" not in page
    assert "<html" not in page
    assert (
        "No model matches" in alice_client.get(reverse("my_models:list"), {"q": "nothing"}).content.decode()
    )
    assert alice_client.get(reverse("my_models:list"), {"q": "x" * 300}).status_code == 422


def test_the_list_does_not_ask_the_database_more_for_more_models(
    alice: Any, alice_client: Client, data_dir: Path, django_assert_max_num_queries: Any
) -> None:
    for number in range(6):
        make_model(alice, name=f"Model {number}")
    with django_assert_max_num_queries(7):
        alice_client.get(reverse("my_models:list"))


def test_the_page_of_a_model_shows_results_settings_curves_and_lineage(
    model: TrainedModel, alice_client: Client
) -> None:
    response = alice_client.get(at("detail", model))
    page = response.content.decode()
    for text in (
        "0.6931",
        "87.5%",
        "better",
        "5e-5",
        "q_proj, v_proj",
        "efefefef",
        "library_name: peft",
        "Task of Brief",
    ):
        assert text in page, text
    assert {figure["id"] for figure in response.context["figures"]} >= {"loss", "kl"}
    loss = next(figure for figure in response.context["figures"] if figure["id"] == "loss")
    assert loss["figure"]["data"][0]["x"] == [0, 3, 6, 9]
    assert f'name="parent_model" value="{model.pk}"' in page


def test_a_model_whose_task_and_base_are_gone_still_has_its_page(
    model: TrainedModel, alice_client: Client
) -> None:
    assert model.task and model.base_model
    model.task.delete()
    model.base_model.delete()
    page = alice_client.get(at("detail", model)).content.decode()
    assert "the curves went with it" in page
    assert "org/tiny-base" in page


def test_names_are_shown_as_text_everywhere(alice: Any, alice_client: Client, data_dir: Path) -> None:
    evil = "<script>alert(1)</script><b>x"
    model = make_model(
        alice, name=evil, dataset_name=evil, base=make_base(name="<img src=x onerror=alert(1)>")
    )
    pages = [reverse("my_models:list"), at("detail", model), at("rename", model), at("delete", model)]
    for address in [*pages, reverse("serving:try", args=[model.pk])]:
        page = alice_client.get(address).content.decode()
        assert "<script>alert" not in page, address
        assert "<img src=x" not in page, address
        assert "&lt;script&gt;" in page, address


# --- rename -----------------------------------------------------------------------------------------------
def test_a_rename_works_without_javascript_and_with_htmx(model: TrainedModel, alice_client: Client) -> None:
    assert alice_client.post(at("rename", model), {"name": "  New   name "}).headers["Location"] == at(
        "detail", model
    )
    model.refresh_from_db()
    assert model.name == "New name"
    partial = alice_client.post(at("rename", model), {"name": "Newer"}, **HX)
    assert partial.status_code == 200
    assert "<h1" in partial.content.decode() and "<html" not in partial.content.decode()
    field = alice_client.get(at("rename", model), **HX).content.decode()
    assert 'value="Newer"' in field
    assert "<form" not in alice_client.get(at("rename", model) + "?as=text", **HX).content.decode()


def test_a_rename_on_its_own_page_leads_back_to_the_model(model: TrainedModel, alice_client: Client) -> None:
    """A click before the scripts were there opens that page; saving with htmx must not leave one on it."""
    headers = {"HX-Request": "true", "HX-Current-URL": "http://testserver" + at("rename", model)}
    response = alice_client.post(at("rename", model), {"name": "Newer"}, headers=headers)
    assert response.headers["HX-Redirect"] == at("detail", model)


@pytest.mark.parametrize("name", ["", "   ", "x" * 300, "bell\a", "turn\u202earound"])
@pytest.mark.parametrize("headers", [{}, HX["headers"]])
def test_a_name_that_cannot_be_is_422_and_nothing_changes(
    name: str, headers: dict[str, str], model: TrainedModel, alice_client: Client
) -> None:
    response = alice_client.post(at("rename", model), {"name": name}, headers=headers)
    assert response.status_code == 422
    assert "errorlist" in response.content.decode()
    model.refresh_from_db()
    assert model.name == "Brief answers v1"


# --- delete -----------------------------------------------------------------------------------------------
def test_deleting_removes_the_row_the_files_and_the_trash(
    model: TrainedModel, alice_client: Client, settings: Any
) -> None:
    assert "cannot be undone" in alice_client.get(at("delete", model)).content.decode()
    assert model.folder.exists()
    response = alice_client.post(at("delete", model), follow=True)
    assert "was deleted" in response.content.decode()
    assert not TrainedModel.objects.exists()
    assert not model.folder.exists()
    assert not (Path(settings.MODELS_DIR) / ".trash").exists()
    assert TrainingTask.objects.count() == 1  # the task and its charts stay
    assert alice_client.post(at("delete", model)).status_code == 404


@pytest.fixture
def family(alice: Any, model: TrainedModel) -> dict[str, Any]:
    """A child model, and a draft and an ended task that start from `model`."""
    base = model.base_model
    child = make_model(alice, name="Child", base=base, parent=model)
    common = {"owner": alice, "base_model": base, "parent_model": model}
    return {
        "child": child,
        "draft": TrainingTask.objects.create(name="A draft", **common),
        "ended": TrainingTask.objects.create(name="Ended", status="failed", **common),
    }


def test_the_question_says_what_depends_on_the_model(
    family: dict[str, Any], model: TrainedModel, alice_client: Client
) -> None:
    page = alice_client.get(at("delete", model)).content.decode()
    for text in ("Child", "It keeps working", "A draft", "goes back to step 1", "Ended"):
        assert text in page, text


def test_what_started_from_a_deleted_model_never_goes_on_from_the_bare_base(
    family: dict[str, Any], model: TrainedModel, alice_client: Client
) -> None:
    alice_client.post(at("delete", model))
    for name in ("draft", "ended"):
        family[name].refresh_from_db()
        assert family[name].parent_model is None
        assert family[name].base_model is None  # else a retry would train another thing under the same name
        assert "deleted “Brief answers v1”" in family[name].events.get().text
    child = family["child"]
    child.refresh_from_db()
    assert (child.parent, child.parent_name) == (None, "Brief answers v1")
    assert "Brief answers v1" in alice_client.get(at("detail", child)).content.decode()
    assert child.folder.exists()


@pytest.mark.parametrize("status", ["queued", "running", "cancelling"])
def test_a_model_is_kept_while_a_task_needs_its_files(
    status: str, alice: Any, model: TrainedModel, alice_client: Client
) -> None:
    task = TrainingTask.objects.create(owner=alice, name="Needs it", parent_model=model, status=status)
    assert "cannot be deleted now" in alice_client.get(at("delete", model)).content.decode()
    response = alice_client.post(at("delete", model), follow=True)
    assert "“Needs it” starts from this model" in response.content.decode()
    assert TrainedModel.objects.filter(pk=model.pk).exists()
    assert model.folder.exists()
    task.refresh_from_db()
    assert task.parent_model_id == model.pk


def test_deleting_twice_is_told_and_a_missing_folder_is_no_obstacle(alice: Any, model: TrainedModel) -> None:
    import shutil

    shutil.rmtree(model.folder)
    assert trained_model_delete(model, by=alice).ok
    assert "already" in trained_model_delete(model, by=alice).text


def test_the_lineage_goes_from_the_oldest_ancestor_to_the_last_descendant(
    family: dict[str, Any], model: TrainedModel, alice: Any
) -> None:
    grandchild = make_model(alice, name="Grandchild", base=model.base_model, parent=family["child"])
    expected = [(0, "Brief answers v1"), (1, "Child"), (2, "Grandchild")]
    for start in (model, family["child"], grandchild):
        assert [(depth, each.name) for depth, each in lineage(start)] == expected


def test_the_figures_in_the_page_cannot_end_their_script_element(
    model: TrainedModel, alice_client: Client
) -> None:
    page = alice_client.get(at("detail", model)).content.decode()
    start = page.index('<script id="model-figures" type="application/json">') + len(
        '<script id="model-figures" type="application/json">'
    )
    assert json.loads(page[start : page.index("</script>", start)])
