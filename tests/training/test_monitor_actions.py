"""Cancel, stop and keep, retry, duplicate, delete: from the page to the row, with a sentence."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from tests.training.monitor_rows import add_points, make_model, make_task
from training.models import TrainedModel, TrainingTask

pytestmark = pytest.mark.usefixtures("data_dir")
ACTIONS = ("cancel", "stop", "retry", "duplicate", "delete")


def post(client: Client, task: TrainingTask, name: str) -> Any:
    return client.post(reverse(f"tasks:{name}", args=[task.id]), follow=True)


@pytest.mark.parametrize("name", ACTIONS)
def test_a_stranger_gets_404_and_changes_nothing(alice: Any, mallory_client: Client, name: str) -> None:
    task = make_task(alice)
    before = TrainingTask.objects.values().get(pk=task.pk)
    assert post(mallory_client, task, name).status_code == 404
    assert TrainingTask.objects.values().get(pk=task.pk) == before


@pytest.mark.parametrize("name", ACTIONS)
def test_anonymous_people_are_sent_to_sign_in(alice: Any, client: Client, name: str) -> None:
    task = make_task(alice)
    assert client.post(reverse(f"tasks:{name}", args=[task.id])).status_code == 302
    task.refresh_from_db()
    assert (task.status, task.desired_state) == ("running", "run")


@pytest.mark.parametrize("name", ["cancel", "retry", "duplicate"])
def test_a_link_cannot_act(alice: Any, alice_client: Client, name: str) -> None:
    assert alice_client.get(reverse(f"tasks:{name}", args=[make_task(alice).id])).status_code == 405


@pytest.mark.parametrize("name", ACTIONS)
def test_a_post_without_a_token_is_refused(alice: Any, name: str) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    assert client.post(reverse(f"tasks:{name}", args=[make_task(alice).id])).status_code == 403


def test_cancel_ends_a_queued_task_at_once(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, status="queued")
    assert "The task was cancelled." in post(alice_client, task, "cancel").content.decode()
    task.refresh_from_db()
    assert task.status == "cancelled"


def test_cancel_of_a_finished_task_changes_nothing_and_says_so(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, status="succeeded")
    assert "already finished" in post(alice_client, task, "cancel").content.decode()
    task.refresh_from_db()
    assert task.status == "succeeded"


def test_stop_asks_the_worker_and_the_page_says_that_the_model_will_be_kept(
    alice: Any, alice_client: Client
) -> None:
    task = make_task(alice)
    text = post(alice_client, task, "stop").content.decode()
    task.refresh_from_db()
    assert task.desired_state == "stop"
    assert "Stopping at the next step; the model will be kept." in text


def test_the_stop_page_explains_both_ways_without_javascript(alice: Any, alice_client: Client) -> None:
    text = alice_client.get(reverse("tasks:stop", args=[make_task(alice).id])).content.decode()
    assert "Stop and keep" in text
    assert "No model appears in My Models" in text
    assert "Continue training" in text


def test_the_stop_page_of_an_ended_task_offers_nothing(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, status="stopped")
    text = alice_client.get(reverse("tasks:stop", args=[task.id])).content.decode()
    assert "already finished" in text
    assert reverse("tasks:cancel", args=[task.id]) not in text


def test_retry_queues_a_failed_task_again(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, status="failed", error="Out of memory.")
    post(alice_client, task, "retry")
    task.refresh_from_db()
    assert (task.status, task.error) == ("queued", "")


def test_duplicate_makes_a_draft_with_the_same_choices_and_opens_it(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, status="succeeded", parameters={"beta": 0.3})
    response = alice_client.post(reverse("tasks:duplicate", args=[task.id]))
    draft = TrainingTask.objects.get(status="draft")
    assert response["Location"].startswith(f"/tasks/{draft.id}/setup/")
    assert (draft.parameters, draft.dataset, draft.base_model) == (
        {"beta": 0.3},
        task.dataset,
        task.base_model,
    )


def test_delete_asks_first_and_says_that_the_model_stays(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, status="succeeded")
    make_model(task)
    text = alice_client.get(reverse("tasks:delete", args=[task.id])).content.decode()
    assert "cannot be undone" in text
    assert "What stays: the model" in text
    assert TrainingTask.objects.filter(pk=task.pk).exists()


def test_delete_removes_task_and_points_and_keeps_the_model(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, status="succeeded")
    add_points(task, 3)
    make_model(task)
    assert "The task was deleted." in post(alice_client, task, "delete").content.decode()
    assert not TrainingTask.objects.filter(pk=task.pk).exists()
    assert TrainedModel.objects.get().task is None


def test_a_running_task_is_not_deleted(alice: Any, alice_client: Client) -> None:
    task = make_task(alice)
    assert "Cancel it first" in post(alice_client, task, "delete").content.decode()
    assert TrainingTask.objects.filter(pk=task.pk).exists()
