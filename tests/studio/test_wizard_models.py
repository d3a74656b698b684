"""Step 1: the catalogue, downloads, folders on the server, Hub ids, and models from My Models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from tests.studio.made_drafts import make_draft, make_parent, make_starter
from tests.training.model_folders import make_model_folder
from training.base_models import CATALOGUE, STARTER_FOLDER
from training.models import BaseModel, TrainingTask
from training.services import base_models

pytestmark = pytest.mark.django_db
Status = BaseModel.Status


@pytest.fixture
def catalogue(data_dir: Path) -> None:
    make_model_folder(data_dir / "base_models" / STARTER_FOLDER)
    base_models.catalogue_ensure()


@pytest.fixture
def draft(alice: Any, catalogue: None) -> TrainingTask:
    return TrainingTask.objects.create(owner=alice)


def url(task: TrainingTask, name: str = "") -> str:
    return (
        reverse(f"setup:{name}", args=[task.pk]) if name else reverse("setup:step", args=[task.pk, "model"])
    )


def named(name: str) -> BaseModel:
    return BaseModel.objects.get(name__endswith=name)


def reload(task: TrainingTask) -> TrainingTask:
    return TrainingTask.objects.get(pk=task.pk)


# --- the catalogue -----------------------------------------------------------------------------------------
def test_the_catalogue_is_made_once_and_follows_the_disk(data_dir: Path, db: None) -> None:
    assert base_models.catalogue_ensure() == 0
    starter = named(STARTER_FOLDER)
    assert (BaseModel.objects.count(), starter.status, starter.source) == (
        len(CATALOGUE),
        "absent",
        "starter",
    )
    folder = make_model_folder(data_dir / "base_models" / STARTER_FOLDER)
    assert base_models.catalogue_ensure() == 1
    starter.refresh_from_db()
    assert starter.is_ready and starter.path == str(folder)
    assert starter.facts["hidden_size"] == 32 and starter.facts["licence"] == "Apache-2.0"
    folder.rename(folder.with_name("moved"))
    assert base_models.catalogue_ensure() == 0
    starter.refresh_from_db()
    assert starter.status == "absent" and BaseModel.objects.count() == len(CATALOGUE)


def test_a_starter_whose_files_are_broken_says_so(data_dir: Path, db: None) -> None:
    folder = make_model_folder(data_dir / "base_models" / STARTER_FOLDER)
    (folder / "model.safetensors").write_bytes(b"half")
    assert base_models.catalogue_ensure() == 0
    assert named(STARTER_FOLDER).status == "failed" and "cut off" in named(STARTER_FOLDER).problem


def test_a_start_of_the_studio_does_not_disturb_a_download(data_dir: Path, catalogue: None) -> None:
    BaseModel.objects.filter(pk=named("Qwen3-0.6B").pk).update(status="downloading", bytes_done=7)
    base_models.catalogue_ensure()
    assert (named("Qwen3-0.6B").status, named("Qwen3-0.6B").bytes_done) == ("downloading", 7)


def test_step_1_shows_each_model_with_its_facts_and_the_four_kinds(
    alice_client: Client, draft: TrainingTask
) -> None:
    page = alice_client.get(url(draft)).content.decode()
    for text in (
        "Instruct",
        "Thinking",
        "Base (dense)",
        "MoE",
        "Qwen/Qwen3-30B-A3B",
        "30.5B parameters",
        "256k context",
    ):
        assert text in page
    assert "On disk" in page and "Not on disk" in page and "Apache-2.0" in page
    assert "Too large" in page and "Fits" in page
    assert "How to choose a model" in page


def test_the_same_models_fit_a_larger_machine(alice_client: Client, draft: TrainingTask) -> None:
    from django.utils import timezone

    from training.models import WorkerHost

    before = alice_client.get(url(draft)).content.decode().count("Too large")
    WorkerHost.objects.create(
        host="gpu", queue="gpu", boot_id="b", pid=1, last_seen=timezone.now(), ram_bytes=2**40,
        gpus=[{"uuid": "GPU-1", "name": "NVIDIA H200", "memory_bytes": 139 * 2**30}],
    )  # fmt: skip
    page = alice_client.get(url(draft)).content.decode()
    assert page.count("Too large") < before and "NVIDIA H200" in page


def test_a_model_of_somebody_else_is_neither_listed_nor_taken(
    alice_client: Client, mallory: Any, draft: TrainingTask
) -> None:
    theirs = BaseModel.objects.create(owner=mallory, source="folder", name="secret-model", status="ready")
    parent = make_parent(mallory, named(STARTER_FOLDER))
    page = alice_client.get(url(draft)).content.decode()
    assert "secret-model" not in page and "Polite v1" not in page
    for value in (f"base:{theirs.pk}", f"parent:{parent.pk}", "base:1", "../etc", "base:", ""):
        response = alice_client.post(url(draft), {"model": value})
        assert response.status_code == 422, value
    assert alice_client.post(url(draft, "download"), {"base_model": theirs.pk}).status_code == 404
    assert reload(draft).base_model is None


def test_a_model_from_my_models_is_the_reference_and_the_page_says_so(
    alice_client: Client, alice: Any, draft: TrainingTask
) -> None:
    parent = make_parent(alice, named(STARTER_FOLDER), lora_r=8)
    assert (
        "The reference is then that model, not the bare base" in alice_client.get(url(draft)).content.decode()
    )
    alice_client.post(url(draft), {"model": f"parent:{parent.pk}"})
    task = reload(draft)
    assert (task.parent_model, task.base_model) == (parent, named(STARTER_FOLDER))
    assert "Polite v1, not the bare base" in alice_client.get(url(draft)).content.decode()


def test_a_model_from_my_models_whose_base_is_gone_is_refused(
    alice_client: Client, alice: Any, draft: TrainingTask
) -> None:
    parent = make_parent(alice, None)
    response = alice_client.post(url(draft), {"model": f"parent:{parent.pk}"})
    assert response.status_code == 422 and "is gone" in response.content.decode()


def test_a_model_without_a_chat_template_is_refused_at_once(
    alice_client: Client, draft: TrainingTask
) -> None:
    starter = named(STARTER_FOLDER)
    BaseModel.objects.filter(pk=starter.pk).update(facts=starter.facts | {"has_chat_template": False})
    response = alice_client.post(url(draft), {"model": f"base:{starter.pk}"})
    assert response.status_code == 422 and "no chat template" in response.content.decode()


# --- downloads -----------------------------------------------------------------------------------------------
def test_download_asks_a_worker_and_the_page_shows_the_bytes(
    alice_client: Client,
    draft: TrainingTask,
    monkeypatch: pytest.MonkeyPatch,
    django_capture_on_commit_callbacks: Any,
) -> None:
    rung: list[Any] = []
    monkeypatch.setattr(base_models, "_ring", lambda pk: rung.append(pk) or True)
    row = named("Qwen3-0.6B")
    with django_capture_on_commit_callbacks(execute=True):
        assert alice_client.post(url(draft, "download"), {"base_model": row.pk})["Location"] == url(draft)
        alice_client.post(url(draft, "download"), {"base_model": row.pk})
    assert rung == [row.pk], "a second click asks for nothing"
    BaseModel.objects.filter(pk=row.pk).update(status="downloading", bytes_done=300, bytes_total=1000)
    headers = {"HTTP_HX_REQUEST": "true", "HTTP_HX_TARGET": "models"}
    part = alice_client.get(url(draft), **headers).content.decode()
    assert "<html" not in part and "30 %" in part and 'hx-trigger="every 2s"' in part
    BaseModel.objects.filter(pk=row.pk).update(status="ready")
    assert 'hx-trigger="every 2s"' not in alice_client.get(url(draft), **headers).content.decode()


def test_a_failed_download_says_why_and_may_be_tried_again(alice_client: Client, draft: TrainingTask) -> None:
    row = named("Qwen3-0.6B")
    BaseModel.objects.filter(pk=row.pk).update(status="failed", problem="The disk is full. Free some space.")
    page = alice_client.get(url(draft)).content.decode()
    assert "The disk is full." in page and "Try again" in page
    alice_client.post(url(draft, "download"), {"base_model": row.pk})
    assert (named("Qwen3-0.6B").status, named("Qwen3-0.6B").problem) == ("queued", "")


def test_going_on_with_a_model_that_is_not_here_asks_for_it(
    alice_client: Client, draft: TrainingTask
) -> None:
    row = named("Qwen3-0.6B")
    response = alice_client.post(url(draft), {"model": f"base:{row.pk}"})
    assert response["Location"] == reverse("setup:step", args=[draft.pk, "data"])
    assert named("Qwen3-0.6B").status == "queued" and reload(draft).base_model == row


def test_without_the_hub_every_way_to_it_says_what_to_do_instead(
    alice_client: Client, draft: TrainingTask, settings: Any
) -> None:
    settings.HUB_OFFLINE = True
    settings.MODEL_ROOTS = [Path("/srv/models")]
    row = named("Qwen3-0.6B")
    words = "cannot reach the Hub"
    response = alice_client.post(url(draft), {"model": f"base:{row.pk}"})
    assert response.status_code == 422 and words in response.content.decode()
    response = alice_client.post(url(draft, "hub"), {"hub_id": "team/model"})
    assert response.status_code == 422 and words in response.content.decode()
    assert "/srv/models" in response.content.decode()
    response = alice_client.post(url(draft, "download"), {"base_model": row.pk}, follow=True)
    assert words in response.content.decode()
    assert named("Qwen3-0.6B").status == "absent" and not BaseModel.objects.filter(name="team/model").exists()


def test_the_bell_of_a_lost_message_is_rung_again(
    draft: TrainingTask, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.CELERY_BROKER_URL = "redis://nowhere"
    sent: list[str] = []
    monkeypatch.setattr(base_models.current_app, "send_task", lambda name, args, **_: sent.append(args[0]))
    row = base_models.base_model_download(named("Qwen3-0.6B"))
    assert base_models.downloads_ring_again() == 1
    assert base_models.downloads_ring_again() == 0, "it was rung just now"
    assert sent == [str(row.pk)]


def test_a_broker_that_is_away_never_fails_a_request(
    alice_client: Client, draft: TrainingTask, monkeypatch: pytest.MonkeyPatch, settings: Any,
    django_capture_on_commit_callbacks: Any,
) -> None:  # fmt: skip
    settings.CELERY_BROKER_URL = "redis://nowhere"

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("the broker is away")

    monkeypatch.setattr(base_models.current_app, "send_task", away)
    with django_capture_on_commit_callbacks(execute=True):
        response = alice_client.post(url(draft, "download"), {"base_model": named("Qwen3-0.6B").pk})
    assert response.status_code == 302 and named("Qwen3-0.6B").status == "queued"


# --- Hub ids -------------------------------------------------------------------------------------------------
def test_a_hub_id_becomes_one_s_own_row_and_is_chosen(
    alice_client: Client, draft: TrainingTask, alice: Any
) -> None:
    assert alice_client.post(url(draft, "hub"), {"hub_id": " team/model "})["Location"] == url(draft)
    row = named("team/model")
    assert (row.owner, row.source, row.status, reload(draft).base_model) == (alice, "hub", "queued", row)
    alice_client.post(url(draft, "hub"), {"hub_id": "team/model"})
    assert BaseModel.objects.filter(name="team/model").count() == 1


def test_a_hub_id_of_the_catalogue_is_its_row(alice_client: Client, draft: TrainingTask) -> None:
    alice_client.post(url(draft, "hub"), {"hub_id": "qwen/qwen3-0.6b"})
    assert reload(draft).base_model == named("Qwen3-0.6B") and named("Qwen3-0.6B").owner is None


@pytest.mark.parametrize(
    "hub_id", ["", "../../etc", "a/b/c", "--flag/x", "file:///etc", "x" * 200, "o/m\x00"]
)
def test_what_is_no_hub_id_is_refused_beside_its_field(
    alice_client: Client, draft: TrainingTask, hub_id: str
) -> None:
    response = alice_client.post(url(draft, "hub"), {"hub_id": hub_id})
    assert response.status_code == 422
    assert not BaseModel.objects.filter(source="hub").exists()


def test_a_person_s_own_downloads_are_limited(alice_client: Client, draft: TrainingTask) -> None:
    for number in range(base_models.MAX_DOWNLOADS_EACH):
        alice_client.post(url(draft, "hub"), {"hub_id": f"team/model-{number}"})
    response = alice_client.post(url(draft, "hub"), {"hub_id": "team/one-more"})
    assert response.status_code == 422 and "Wait until one has ended" in response.content.decode()


# --- folders -------------------------------------------------------------------------------------------------
@pytest.fixture
def root(tmp_path: Path, settings: Any) -> Path:
    folder = tmp_path / "srv"
    make_model_folder(folder / "team" / "tiny")
    settings.MODEL_ROOTS = [folder]
    return folder


def test_a_folder_below_an_allowed_root_is_read_and_chosen(
    alice_client: Client, alice: Any, draft: TrainingTask, root: Path
) -> None:
    assert alice_client.post(url(draft, "folder"), {"root": "0", "relative": "team/tiny"})["Location"] == url(
        draft
    )
    row = BaseModel.objects.get(source="folder")
    assert (row.owner, row.name, row.status, row.path) == (
        alice,
        "tiny",
        "ready",
        str(root / "team" / "tiny"),
    )
    assert reload(draft).base_model == row
    alice_client.post(url(draft, "folder"), {"root": "0", "relative": "/team/tiny/"})
    assert BaseModel.objects.filter(source="folder").count() == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"root": "0", "relative": "nothing"}, "no such folder"),
        ({"root": "0", "relative": "../../etc"}, "Name a folder below"),
        ({"root": "0", "relative": "a/../../b"}, "Name a folder below"),
        ({"root": "0", "relative": "x\x00y"}, "Null characters"),
        ({"root": "0", "relative": "x" * 600}, "500"),
        ({"root": "7", "relative": "team/tiny"}, "7"),
        ({"root": "0", "relative": ""}, "Name the folder"),
        ({"root": "0", "relative": "team"}, "config.json is missing"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_words(
    alice_client: Client, draft: TrainingTask, root: Path, data: dict[str, str], words: str
) -> None:
    response = alice_client.post(url(draft, "folder"), data)
    assert response.status_code == 422 and words in response.content.decode()
    assert not BaseModel.objects.filter(source="folder").exists() and reload(draft).base_model is None


def test_a_link_that_leads_out_of_the_root_is_refused(
    alice_client: Client, draft: TrainingTask, root: Path
) -> None:
    outside = make_model_folder(root.parent / "outside")
    (root / "way-out").symlink_to(outside)
    response = alice_client.post(url(draft, "folder"), {"root": "0", "relative": "way-out"})
    assert response.status_code == 422 and "outside the folders" in response.content.decode()


def test_without_allowed_roots_there_is_no_form_and_a_post_says_why(
    alice_client: Client, draft: TrainingTask, settings: Any
) -> None:
    settings.MODEL_ROOTS = []
    assert "STUDIO_MODEL_ROOTS" in alice_client.get(url(draft)).content.decode()
    response = alice_client.post(url(draft, "folder"), {"root": "0", "relative": "x"})
    assert response.status_code == 422


def test_a_created_task_gets_no_other_model(
    alice_client: Client, alice: Any, root: Path, data_dir: Path
) -> None:
    task = make_draft(alice, make_starter())
    TrainingTask.objects.update(status="queued")
    before = reload(task).base_model
    for name, data in (("folder", {"root": "0", "relative": "team/tiny"}), ("hub", {"hub_id": "a/b"})):
        response = alice_client.post(url(task, name), data)
        assert response["Location"] == reverse("tasks:detail", args=[task.pk])
    assert (
        reload(task).base_model == before
        and not BaseModel.objects.filter(source__in=["folder", "hub"]).exists()
    )
