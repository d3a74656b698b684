"""The road with real weights: SmolLM2-135M-Instruct and the example pairs, a few steps, through the pages."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests import starter
from tests.e2e import walk
from tests.live import LiveStudio, live_studio

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

FEW_STEPS = {
    "epoch": 0.08, "batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": "5e-4",
    "max_context_length": 256,
}  # fmt: skip


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[LiveStudio]:
    starter.give(tmp_path / "data")
    with live_studio(tmp_path / "data", STUDIO_STARTER_MODEL="1", OMP_NUM_THREADS="2") as studio:
        assert "Preparing the starter model" not in studio.output(), "the one in the data folder is used"
        yield studio


@pytest.mark.timeout(560)
def test_the_starter_model_learns_from_the_example_and_answers(studio: LiveStudio, page: Page) -> None:
    walk.make_account(page, studio.url + studio.link, "alice")
    page.get_by_role("button", name="Start your first task").click()
    walk.choose(page, "HuggingFaceTB/SmolLM2-135M-Instruct")
    walk.look(page, "smollm2-step-1")
    walk.go_on(page, "Dataset & Evaluation")
    walk.choose_dataset(page, "Example: short and direct answers")
    walk.hold_out(page, 2, every=4)
    walk.go_on(page, "Settings & Options")
    walk.fill_settings(page, name="Short and direct", model_name="SmolLM2-short-and-direct", **FEW_STEPS)
    walk.go_on(page, "Review and create the task")

    socket = walk.Socket(page)
    path = walk.create(page)
    walk.wait_for_end(page, "Succeeded", seconds=400)
    total = walk.total_steps(page)
    walk.wait_for_steps(page, total)
    walk.look(page, "smollm2-task")
    walk.picture(page, "task", whole=False)

    assert socket.train_steps() == list(range(1, total + 1)), "every point once, over the socket"
    moments = socket.moments_while_running()
    assert len(moments) >= total // 2 and moments[-1] - moments[0] > 2, "they came while it trained"
    rows = list(csv.DictReader(io.StringIO(page.request.get(f"{studio.url}{path}metrics.csv").text())))
    losses = [float(row["eval_loss"]) for row in rows if row["split"] == "eval"]
    margins = [float(row["eval_rewards/margins"]) for row in rows if row["split"] == "eval"]
    assert abs(losses[0] - math.log(2)) < 1e-4 and losses[-1] < losses[0], losses
    assert margins[-1] > margins[0], margins

    page.get_by_role("link", name="Try it beside its base").click()
    page.get_by_label("Max tokens").fill("40")
    page.get_by_label("Temperature").fill("0")
    base, tuned, lengths = walk.ask_both(page, "What is the capital of France?")
    assert "Paris" in base and tuned.strip(), (base, tuned)
    assert lengths >= 5, "the answers were streamed"
    walk.look(page, "smollm2-try")
    expect(page.locator("#problem")).to_be_hidden()
