"""The whole road with a tiny model: from the first-run link to a model that answers, in a real browser.

Web, workers, broker and engine are the real ones; the tests of this module use one studio, in order.
"""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser import OpenPage
from tests.e2e import walk
from tests.live import LiveStudio, live_studio
from tests.tiny import build_tiny_model, tiny_pairs

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BAD_LINES = {
    7: '{"prompt": "cut off',
    19: '{"prompt": "q", "chosen": 7, "rejected": "n"}',
    30: '{"prompt": "q"}',
}
PAIRS = 40
QUICK = {
    "epoch": 10, "batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": "1e-2",
    "lora_rank": 4, "max_context_length": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStudio]:
    folder = tmp_path_factory.mktemp("road")
    build_tiny_model(folder / "models" / "tiny-llama")
    with live_studio(folder / "data", STUDIO_MODEL_ROOTS=str(folder / "models")) as studio:
        yield studio


def write_pairs(path: Path) -> Path:
    """40 good pairs, and bad lines among them."""
    lines = [
        json.dumps({key: pair[key] for key in ("prompt", "chosen", "rejected")}) for pair in tiny_pairs(PAIRS)
    ]
    for number, text in sorted(BAD_LINES.items()):
        lines.insert(number - 1, text)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_from_the_first_link_to_a_model_that_answers(
    studio: LiveStudio, page: Page, open_page: OpenPage, tmp_path: Path
) -> None:
    walk.make_account(page, studio.url + studio.link, "alice")
    walk.look(page, "no-tasks")

    page.get_by_role("button", name="Start your first task").click()
    walk.add_folder(page, "tiny-llama")
    walk.look(page, "step-1")
    walk.go_on(page, "Dataset & Evaluation")

    upload(page, write_pairs(tmp_path / "contrast.jsonl"))
    walk.hold_out(page, 10, every=30)
    walk.look(page, "step-2")
    walk.go_on(page, "Settings & Options")

    walk.fill_settings(page, name="The road", model_name="Road-v1", **QUICK)
    expect(page.locator("#summary")).to_contain_text("learning_rate 0.01 instead of 5e-6")
    expect(page.locator("#summary .badge-good").first).to_have_text("Ready")
    walk.look(page, "step-3")
    walk.go_on(page, "Review and create the task")
    walk.look(page, "step-4")

    socket = walk.Socket(page)
    path = walk.create(page)
    watch_it_train(studio, page, open_page, path, socket)
    model_page(page)
    answers(page)


def upload(page: Page, file: Path) -> None:
    """Step 2: a file with mistakes; which lines they are on is one link away, and the way back is kept."""
    page.get_by_label("Dataset file").set_input_files(file)
    page.get_by_role("button", name="Upload dataset").click()
    status = page.locator("#dataset-status")
    expect(status).to_contain_text(f"{PAIRS} pairs with", timeout=walk.LONG)
    expect(status).to_contain_text("3 lines had errors and are left out")
    expect(page.get_by_role("radio", name=re.compile("^contrast"))).to_be_checked()
    step = page.url
    page.get_by_role("link", name="See everything about it").click()
    for number in BAD_LINES:
        expect(page.get_by_text(f"Line {number}", exact=True)).to_be_visible()
    walk.look(page, "dataset")
    page.goto(step)


def watch_it_train(
    studio: LiveStudio, page: Page, open_page: OpenPage, path: str, socket: walk.Socket
) -> None:
    page.evaluate("window.neverReloaded = true")
    walk.wait_for_steps(page, 5)
    expect(page.locator("#live-pill")).to_have_text("Live")
    drawn = len(walk.steps_drawn(page))
    walk.wait_for_steps(page, drawn + 20)
    assert page.evaluate("window.neverReloaded"), "the chart grew without a reload"
    expect(page.locator("#task-status .badge").first).to_have_text("Running")
    walk.look(page, "training")

    before = walk.steps_drawn(page)
    page.reload()
    walk.wait_for_steps(page, len(before))
    after = walk.steps_drawn(page)
    assert after[: len(before)] == before == list(range(1, len(before) + 1))

    other = open_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    walk.sign_in(other, studio.url, "alice", to=path)
    walk.wait_for_steps(other, len(after))

    walk.wait_for_end(page, "Succeeded")
    walk.wait_for_end(other, "Succeeded")
    expect(page.get_by_role("heading", name="Your model is ready")).to_be_visible()
    whole = list(range(1, walk.total_steps(page) + 1))
    walk.wait_for_steps(page, len(whole))
    walk.wait_for_steps(other, len(whole))
    assert walk.steps_drawn(page) == walk.steps_drawn(other) == whole
    walk.look(page, "finished")
    walk.look(other, "finished-dark")

    moments = socket.moments_while_running()
    assert len(moments) >= 5 and moments[-1] - moments[0] > 1, "points came while it trained, not at its end"
    rows = list(csv.DictReader(io.StringIO(page.request.get(f"{studio.url}{path}metrics.csv").text())))
    assert [int(row["step"]) for row in rows if row["split"] == "train"] == whole
    losses = [float(row["eval_loss"]) for row in rows if row["split"] == "eval"]
    assert losses[-1] < losses[0] - 0.2, "the tiny model learned"


def model_page(page: Page) -> None:
    page.get_by_role("link", name="Open in My Models").click()
    expect(page.get_by_role("heading", name="Road-v1", level=1)).to_be_visible()
    page.get_by_role("link", name="Rename").click()
    page.get_by_label("Model name").fill("Renamed road")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", name="Renamed road", level=1)).to_be_visible()
    page.reload()
    expect(page.locator("#model-card")).to_contain_text("Renamed road")
    expect(page.locator("#model-card")).to_contain_text("base_model")
    walk.look(page, "model")

    with page.expect_download() as download:
        page.get_by_role("link", name="Download", exact=True).click()
    with zipfile.ZipFile(download.value.path()) as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= set(
            names
        )
        assert json.loads(archive.read(names["adapter_config.json"]))["r"] == 4
        weights = archive.read(names["adapter_model.safetensors"])
    header = json.loads(weights[8 : 8 + struct.unpack("<Q", weights[:8])[0]])
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["shape"][0] for name, entry in tensors.items() if "lora_A" in name} == {4}
    assert len(weights) == 8 + struct.unpack("<Q", weights[:8])[0] + max(
        entry["data_offsets"][1] for entry in tensors.values()
    )


def answers(page: Page) -> None:
    page.get_by_role("link", name="Try it").click()
    page.get_by_label("Temperature").fill("1")
    page.get_by_label("Max tokens").fill("300")
    base, tuned, lengths = walk.ask_both(page, "What is 3 plus 3?")
    assert base and tuned and base != tuned
    assert lengths >= 3, "the answers were streamed"
    walk.look(page, "try")
