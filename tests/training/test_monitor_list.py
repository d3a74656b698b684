"""The list of fine-tuning tasks: what a row says, the filter, and when it refreshes itself."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from tests.training.monitor_rows import add_points, make_task
from training.models import TrainingTask

LIST = "/tasks/"
HTMX = {"HTTP_HX_REQUEST": "true"}


def page(client: Client, query: str = "", **extra: Any) -> str:
    response = client.get(LIST + query, **extra)
    assert response.status_code == 200
    return response.content.decode()


def test_without_tasks_the_page_says_how_to_begin(alice_client: Client) -> None:
    text = page(alice_client)
    assert "Start your first task" in text
    for step in (
        "Choose Base Model",
        "Dataset &amp; Evaluation",
        "Settings &amp; Options",
        "Create Task and monitor",
    ):
        assert step in text
    assert 'role="search"' not in text


def test_a_row_says_model_dataset_progress_and_has_a_sparkline_with_words(
    alice: Any, alice_client: Client
) -> None:
    task = make_task(alice)
    add_points(task, 40)
    text = page(alice_client)
    for words in ("Q1 alignment", "Brief-v1", "SmolLM2-135M-Instruct", "Brief answers", "step 40/100"):
        assert words in text
    assert "Training loss from 0.699 to 0.660 over 40 steps" in text
    assert "<polyline points=" in text


def test_a_stranger_sees_none_of_it(alice: Any, mallory_client: Client) -> None:
    make_task(alice)
    assert "Q1 alignment" not in page(mallory_client)


def test_anonymous_people_are_sent_to_sign_in(client: Client, db: None) -> None:
    response = client.get(LIST)
    assert response.status_code == 302
    assert reverse("accounts:sign-in") in response["Location"]


def test_the_list_is_only_read(alice_client: Client) -> None:
    assert alice_client.post(LIST).status_code == 405


def test_a_name_with_markup_is_text(alice: Any, alice_client: Client) -> None:
    make_task(alice, name="<img src=x onerror=alert(1)>")
    text = page(alice_client)
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text


@pytest.mark.parametrize("status", ["queued", "running", "cancelling"])
def test_rows_refresh_themselves_while_something_is_active(
    alice: Any, alice_client: Client, status: str
) -> None:
    make_task(alice, status=status)
    text = page(alice_client, **HTMX)
    assert 'hx-trigger="every 3s"' in text
    assert "<html" not in text


@pytest.mark.parametrize("status", ["draft", "succeeded", "stopped", "failed", "cancelled"])
def test_a_refresh_with_nothing_active_answers_286_and_asks_for_no_more(
    alice: Any, alice_client: Client, status: str
) -> None:
    make_task(alice, status=status)
    response = alice_client.get(LIST, **HTMX)
    assert response.status_code == 286
    assert "hx-trigger" not in response.content.decode()


def test_the_filter_narrows_by_status_and_by_name(alice: Any, alice_client: Client) -> None:
    make_task(alice, name="Alpha", status="failed")
    make_task(alice, name="Beta", status="running")
    assert "Alpha" in page(alice_client, "?status=failed")
    assert "Beta" not in page(alice_client, "?status=failed")
    found = page(alice_client, "?q=bET")
    assert "Beta" in found
    assert "Alpha" not in found
    assert "No task matches" in page(alice_client, "?q=gamma")


def test_search_also_finds_model_and_dataset_names(alice: Any, alice_client: Client) -> None:
    make_task(alice, name="Alpha")
    assert "Alpha" in page(alice_client, "?q=brief+answers")
    assert "Alpha" in page(alice_client, "?q=smollm2")


def test_an_unknown_status_is_422_with_a_sentence(alice: Any, alice_client: Client) -> None:
    make_task(alice)
    response = alice_client.get(LIST + "?status=everything")
    assert response.status_code == 422
    assert "There is no such group of tasks" in response.content.decode()


@pytest.mark.parametrize(
    ("fields", "step"),
    [
        ({"base_model": None, "dataset": None}, "model"),
        ({"dataset": None}, "data"),
        ({"model_name": ""}, "settings"),
        ({}, "review"),
    ],
)
def test_a_draft_leads_to_the_step_that_lacks_something(
    alice: Any, alice_client: Client, fields: dict[str, Any], step: str
) -> None:
    task = make_task(alice, status="draft")
    TrainingTask.objects.filter(pk=task.pk).update(**fields)
    assert f'href="/tasks/{task.id}/setup/{step}/"' in page(alice_client)


def test_actions_fit_the_status(alice: Any, alice_client: Client) -> None:
    failed, running = make_task(alice, status="failed"), make_task(alice)
    text = page(alice_client)
    assert reverse("tasks:retry", args=[failed.id]) in text
    assert reverse("tasks:delete", args=[failed.id]) in text
    assert reverse("tasks:retry", args=[running.id]) not in text
    assert reverse("tasks:delete", args=[running.id]) not in text


def test_many_tasks_are_paged_and_cost_a_fixed_number_of_queries(
    alice: Any, alice_client: Client, django_assert_max_num_queries: Any
) -> None:
    for number in range(27):
        make_task(alice, name=f"Task {number}")
    with django_assert_max_num_queries(8):
        text = page(alice_client)
    assert "1–25 of 27" in text
    assert "Task 0<" in page(alice_client, "?page=2")
