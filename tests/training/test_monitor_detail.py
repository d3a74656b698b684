"""The page of one task: what each status shows, its partials, its data and its downloads."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from django.http import HttpResponse
from django.test import Client
from django.urls import reverse

from tests.training.monitor_rows import add_events, add_log, add_point, add_points, make_model, make_task
from training.models import TrainedModel, TrainingTask
from training.monitor.feed import frame_after
from training.monitor.views.pages import PARTS

pytestmark = pytest.mark.usefixtures("data_dir")
NAMES = ("detail", "points", "csv", "log", "stop", "delete")


def get(
    client: Client, task: TrainingTask, name: str = "detail", query: str = "", **extra: Any
) -> HttpResponse:
    return client.get(reverse(f"tasks:{name}", args=[task.id]) + query, **extra)


def text_of(client: Client, task: TrainingTask, **extra: Any) -> str:
    response = get(client, task, **extra)
    assert response.status_code == 200
    return response.content.decode()


def embedded(text: str, name: str) -> Any:
    found = re.search(rf'<script id="{name}" type="application/json">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found.group(1))


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_gets_404(alice: Any, mallory_client: Client, name: str) -> None:
    assert get(mallory_client, make_task(alice), name).status_code == 404


@pytest.mark.parametrize("target", PARTS)
def test_a_stranger_gets_404_for_a_partial(alice: Any, mallory_client: Client, target: str) -> None:
    response = get(mallory_client, make_task(alice), HTTP_HX_REQUEST="true", HTTP_HX_TARGET=target)
    assert response.status_code == 404


@pytest.mark.parametrize("name", NAMES)
def test_anonymous_people_are_sent_to_sign_in(alice: Any, client: Client, name: str) -> None:
    assert get(client, make_task(alice), name).status_code == 302


@pytest.mark.parametrize("name", ["detail", "points", "csv", "log"])
def test_reading_addresses_refuse_post(alice: Any, alice_client: Client, name: str) -> None:
    assert alice_client.post(reverse(f"tasks:{name}", args=[make_task(alice).id])).status_code == 405


def test_a_draft_is_sent_to_its_wizard(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, status="draft")
    assert get(alice_client, task)["Location"] == f"/tasks/{task.id}/setup/review/"


def test_a_running_task_shows_phase_progress_and_both_ways_to_end_it(
    alice: Any, alice_client: Client
) -> None:
    task = make_task(alice, phase="reference", phase_done=40, phase_total=180, phase_unit="pairs")
    text = text_of(alice_client, task)
    assert "Reference pass 40/180 pairs" in text
    assert "Stop and keep" in text
    assert "No model appears in My Models" in text
    assert reverse("tasks:cancel", args=[task.id]) in text


def test_a_queued_task_says_its_place_and_why_it_waits(alice: Any, alice_client: Client) -> None:
    make_task(alice, status="queued", name="First")
    second = make_task(alice, status="queued", name="Second")
    text = text_of(alice_client, second)
    assert "Number 2 in the queue" in text
    assert "No GPU worker is running" in text
    assert ">Cancel<" in text


def test_a_finished_task_leads_to_its_model(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, status="succeeded", step=100)
    model = make_model(task)
    text = text_of(alice_client, task)
    assert "Your model is ready" in text
    for name in ("my_models:detail", "my_models:download", "serving:try"):
        assert reverse(name, args=[model.id]) in text
    assert "0.6931" in text
    assert "0.412" in text
    assert "Stop…" not in text


def test_a_failed_task_says_a_sentence_a_next_step_and_the_log_as_text(
    alice: Any, alice_client: Client
) -> None:
    task = make_task(
        alice,
        status="failed",
        error="The GPU ran out of memory.",
        next_step="Set batch_size to 1.",
        log_tail="Traceback\n<script>alert(1)</script>",
    )
    text = text_of(alice_client, task)
    assert "The GPU ran out of memory." in text
    assert "Set batch_size to 1." in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert(1)" not in text
    assert reverse("tasks:retry", args=[task.id]) in text


def test_settings_show_what_was_changed_and_what_the_reference_is(alice: Any, alice_client: Client) -> None:
    task = make_task(
        alice, parameters={"learning_rate": 5e-6}, plan={"reference": "The reference is Safe-v1."}
    )
    text = text_of(alice_client, task)
    assert "The reference is Safe-v1." in text
    assert re.search(r"<code>learning_rate</code></dt><dd[^>]*>5e-6 <span class=\"changed\"", text)
    assert re.search(r"<code>beta</code></dt><dd[^>]*>0.1</dd>", text)


def test_the_figures_and_the_seq_of_the_page_belong_together(alice: Any, alice_client: Client) -> None:
    task = make_task(alice)
    add_points(task, 12)
    add_point(task, 12, {"eval_loss": 0.65, "eval_kl": 0.01}, split="eval")
    text = text_of(alice_client, task)
    assert embedded(text, "task-boot")["seq"] == task.last_seq == 13
    figures = {item["id"]: item["figure"]["data"] for item in embedded(text, "task-figures")}
    assert figures["loss"][0]["x"] == list(range(1, 13))
    assert figures["loss"][1]["y"] == [0.65]
    assert figures["kl"][1]["x"] == [12]


def test_metrics_that_no_chart_draws_do_not_disturb_the_page(alice: Any, alice_client: Client) -> None:
    task = make_task(alice)
    add_points(task, 3)
    values = {
        "eval_loss": 0.65,
        "eval_watch/distinct_1": 0.4,
        "eval_kl_sampled": None,
        "eval_not/yet known": 3.0,
    }
    add_point(task, 3, values, split="eval")
    figures = {
        item["id"]: item["figure"]["data"] for item in embedded(text_of(alice_client, task), "task-figures")
    }
    assert figures["loss"][1]["y"] == [0.65]
    drawn = {trace["meta"]["key"] for traces in figures.values() for trace in traces}
    assert not drawn & {"eval_watch/distinct_1", "eval_not/yet known"}


def test_the_page_says_which_model_is_kept_and_why_the_run_ended(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, status="succeeded")
    TrainedModel.objects.create(
        owner=alice,
        task=task,
        name="kept",
        result={
            "step": 60, "total_steps": 90, "model_step": 40, "best_step": 40, "best_metric": 0.5321,
            "metric_for_best_model": "eval_loss", "stopped_by": "early_stopping",
        },
    )  # fmt: skip
    text = text_of(alice_client, task)
    assert "The best evaluation was at step 40 (eval_loss 0.5321): that model is kept." in text
    assert "It stopped early at step 60 of 90" in text


def test_names_with_markup_stay_text_also_inside_the_embedded_data(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, name="</script><script>alert(1)</script>")
    add_events(task, "<img src=x onerror=alert(2)>")
    add_log(task, "<svg onload=alert(3)>")
    text = text_of(alice_client, task)
    assert "<script>alert(1)" not in text
    assert "<img src=x" not in text
    assert "<svg onload" not in text
    assert embedded(text, "task-boot")["name"] == task.name


def test_without_javascript_the_latest_values_and_the_csv_are_there(alice: Any, alice_client: Client) -> None:
    task = make_task(alice)
    add_point(task, 3, {"loss": 0.61234, "rewards/accuracies": 0.75})
    text = text_of(alice_client, task)
    assert 'data-latest="loss">0.61234<' in text
    assert 'data-latest="rewards/accuracies">0.75<' in text
    assert reverse("tasks:csv", args=[task.id]) in text
    assert "<noscript>" in text


@pytest.mark.parametrize("target", PARTS)
def test_a_partial_is_the_part_alone_with_its_own_id(alice: Any, alice_client: Client, target: str) -> None:
    task = make_task(alice)
    add_events(task, "Loading model.")
    text = text_of(alice_client, task, HTTP_HX_REQUEST="true", HTTP_HX_TARGET=target)
    assert re.findall(r'<section id="([\w-]+)"', text) == [target]
    assert "<html" not in text


def test_the_ways_to_end_a_task_follow_its_status(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, status="queued")
    ask = {"HTTP_HX_REQUEST": "true", "HTTP_HX_TARGET": "task-ending"}
    assert "Stop and keep the model" not in text_of(alice_client, task, **ask)
    TrainingTask.objects.filter(pk=task.pk).update(status="running")
    assert "Stop and keep the model" in text_of(alice_client, task, **ask)
    TrainingTask.objects.filter(pk=task.pk).update(status="succeeded")
    assert "already finished" in text_of(alice_client, task, **ask)


def test_the_reading_follows_the_curves(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, total_steps=40)
    for step in range(1, 41):
        add_point(task, step, {"loss": 0.7 - 0.01 * step})
    for step, loss in ((0, 0.693), (20, 0.5), (30, 0.6), (40, 0.72)):
        add_point(task, step, {"eval_loss": loss}, split="eval")
    text = text_of(alice_client, task, HTTP_HX_REQUEST="true", HTTP_HX_TARGET="task-reading")
    assert "The model may be overfitting" in text
    assert "Stop and keep…" in text


# --- points ---------------------------------------------------------------------------------------------------
def test_points_after_a_seq_are_those_alone_and_a_missing_number_is_null(
    alice: Any, alice_client: Client
) -> None:
    task = make_task(alice)
    add_points(task, 3)
    add_events(task, "Said.")
    add_point(task, 4, {"loss": None})
    frame = json.loads(get(alice_client, task, "points", "?after=2").content, parse_constant=pytest.fail)
    assert (frame["from"], frame["to"], frame["more"]) == (2, 5, False)
    assert [point["seq"] for point in frame["points"]] == [3, 5]
    assert frame["points"][1]["values"] == {"loss": None}
    assert [event["text"] for event in frame["events"]] == ["Said."]
    assert frame["state"]["step"] == 4


def test_a_long_history_comes_in_pages_without_holes_or_doubles(alice: Any, alice_client: Client) -> None:
    task = make_task(alice)
    add_events(task, "First.")
    add_points(task, 620)
    add_events(task, *(f"Sentence {number}." for number in range(520)))
    seen: list[int] = []
    after, more = 0, True
    while more:
        frame = get(alice_client, task, "points", f"?after={after}").json()
        assert frame["from"] == after
        seen += sorted(row["seq"] for row in frame["points"] + frame["events"])
        after, more = frame["to"], frame["more"]
    assert seen == list(range(1, 1142))


def test_a_frame_never_reaches_beyond_the_seq_that_was_read_with_the_task(alice: Any) -> None:
    """Rows committed between two of its queries would come with a hole before them."""
    task = make_task(alice)
    add_points(task, 5)
    task.last_seq = 3  # as read before the last two were written
    frame = frame_after(task, 1)
    assert (frame["to"], [point["seq"] for point in frame["points"]]) == (3, [2, 3])


@pytest.mark.parametrize("after", ["-1", "x", "1e3", "99999999999999999999", "٣"])
def test_a_nonsense_after_is_422(alice: Any, alice_client: Client, after: str) -> None:
    assert get(alice_client, make_task(alice), "points", f"?after={after}").status_code == 422


# --- downloads ------------------------------------------------------------------------------------------------
def rows_of(response: HttpResponse) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(response.content.decode())))


def test_the_csv_holds_every_point(alice: Any, alice_client: Client) -> None:
    task = make_task(alice, name="=cmd|' /C calc'!A0")
    add_points(task, 3)
    add_point(task, 3, {"eval_loss": 0.5}, split="eval")
    response = get(alice_client, task, "csv")
    rows = rows_of(response)
    assert [(row["step"], row["split"]) for row in rows] == [
        ("1", "train"),
        ("2", "train"),
        ("3", "train"),
        ("3", "eval"),
    ]
    assert rows[3]["eval_loss"] == "0.5"
    assert rows[3]["loss"] == ""
    assert response["Content-Disposition"].startswith("attachment")
    assert "=" not in response["Content-Disposition"].split("filename=")[1]


def test_the_csv_of_a_chart_has_its_columns_alone(alice: Any, alice_client: Client) -> None:
    task = make_task(alice)
    add_points(task, 2)
    add_point(task, 2, {"eval_kl": 0.01}, split="eval")
    rows = rows_of(get(alice_client, task, "csv", "?chart=kl"))
    assert [(row["split"], row["kl"], row["eval_kl"]) for row in rows] == [("eval", "", "0.01")]
    assert list(rows[0]) == ["step", "split", "time", "kl", "eval_kl"]


@pytest.mark.parametrize("evil", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_of_the_csv_is_a_formula(alice: Any, alice_client: Client, evil: str) -> None:
    task = make_task(alice)
    add_point(task, 1, {evil: evil, "loss": -0.5})
    cells = next(iter(csv.reader(io.StringIO(get(alice_client, task, "csv").content.decode(), newline=""))))
    assert f"'{evil}" in cells
    text = get(alice_client, task, "csv").content.decode()
    assert f"'{evil}" in text.split("\r\n", 1)[1]
    assert ",-0.5" in text


def test_the_log_is_the_newest_attempts_end_as_plain_text(alice: Any, alice_client: Client) -> None:
    task = make_task(alice)
    add_log(task, "first attempt", epoch=1)
    add_log(task, "x" * 70_000 + "\nlast line\n", epoch=2)
    response = get(alice_client, task, "log")
    assert response["Content-Type"] == "text/plain; charset=utf-8"
    assert response.content == b"last line\n"


def test_the_whole_log_can_be_downloaded_and_no_path_is_taken_from_the_address(
    alice: Any, alice_client: Client, data_dir: Path
) -> None:
    task = make_task(alice)
    add_log(task, "everything\n" * 10_000)
    response = get(alice_client, task, "log", "?download=1&path=../../secret&file=/etc/passwd")
    assert b"".join(response.streaming_content) == b"everything\n" * 10_000
    assert response["Content-Disposition"].startswith("attachment")


def test_a_task_without_a_log_has_an_empty_one(alice: Any, alice_client: Client) -> None:
    response = get(alice_client, make_task(alice), "log", "?download=1")
    assert (response.status_code, response.content) == (200, b"")


def test_the_settings_are_those_of_the_run_and_not_only_those_chosen(
    alice: Any, alice_client: Client
) -> None:
    """After running out of memory a batch is smaller than what was chosen."""
    run = {"config": {"per_device_train_batch_size": 7, "run_id": "x", "target_modules": []}}
    task = make_task(alice, parameters={"per_device_train_batch_size": 14}, plan=run)
    text = re.sub(r"\s+", " ", text_of(alice_client, task))
    assert re.search(r"batch_size</(?:code></)?dt> ?<dd[^>]*>7\b", text)
