"""The whole road with a tiny model: from the first-run link to a model that answers, in a real browser.

Web, workers, broker and engine are the real ones; the tests of this module use one studio, in order.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests import errands
from tests.browser import OpenPage
from tests.e2e import walk
from tests.live import PASSWORD, LiveStudio, live_studio
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
    expect(page.locator("#summary")).to_contain_text("learning_rate 0.01 instead of 5e-5")
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


# --- more of the same studio: alice has an account, a model, a dataset and a finished task by now -----
@pytest.fixture
def alices(studio: LiveStudio, page: Page) -> Page:
    """Alice's window, with everything the first test leaves behind; made here when this test runs alone."""
    if studio.link and not finished_task(studio):
        make_first_task(studio)
    walk.sign_in(page, studio.url, "alice")
    return page


def make_first_task(studio: LiveStudio) -> None:
    alice = studio.make_first_account("alice")
    errands.wait_for_end(alice, errands.create_task(alice, "tiny-llama", num_train_epochs="0.1"))


def finished_task(studio: LiveStudio) -> bool:
    try:
        return "Succeeded" in studio.sign_in("alice").get("/tasks/")[1]
    except AssertionError:
        return False


def oldest_task(page: Page, url: str) -> str:
    page.goto(url + "/tasks/")
    return page.locator(".task-name a").last.get_attribute("href") or ""


def duplicate_longer(page: Page, url: str, *, epoch: int) -> str:
    """A copy of a finished task with more passes; the path of the new task, which has begun to train."""
    page.goto(url + oldest_task(page, url))
    page.get_by_role("button", name="Duplicate").click()
    page.wait_for_url(re.compile("/setup/"))
    page.get_by_role("link", name=re.compile("Step 3")).click()
    page.get_by_label("epoch", exact=True).fill(str(epoch))
    walk.go_on(page, "Review and create the task")
    path = walk.create(page)
    walk.wait_for_steps(page, 3)
    return path


def test_stop_and_keep_makes_a_model_and_cancel_makes_none(studio: LiveStudio, alices: Page) -> None:
    page = alices
    path = duplicate_longer(page, studio.url, epoch=80)
    page.get_by_role("link", name="Stop…").click()
    walk.look(page, "stop-dialog")
    page.get_by_role("button", name="Stop and keep the model").click()
    walk.wait_for_end(page, "Stopped, model kept")
    expect(page.get_by_role("heading", name="Stopped early; the model was kept")).to_be_visible()
    page.reload()
    kept = walk.steps_drawn_whole(page)
    assert kept == list(range(1, len(kept) + 1)) and 3 <= len(kept) < walk.total_steps(page)
    rows = list(csv.DictReader(io.StringIO(page.request.get(f"{studio.url}{path}metrics.csv").text())))
    assert max(int(row["step"]) for row in rows if row["split"] == "eval") == len(kept), (
        "evaluated at its end"
    )
    page.get_by_role("link", name="Open in My Models").click()
    expect(page.locator("#model-card")).to_contain_text(f"{len(kept)} of ")

    page.goto(studio.url + "/models/")
    models = page.locator(".model-cards > li").count()
    path = duplicate_longer(page, studio.url, epoch=80)
    page.get_by_role("link", name="Stop…").click()
    page.get_by_role("button", name="Cancel the task").click()
    walk.wait_for_end(page, "Cancelled")
    assert len(walk.steps_drawn_whole(page)) >= 3, "what was measured stays"
    page.goto(studio.url + "/models/")
    assert page.locator(".model-cards > li").count() == models
    assert not studio.find("training.engine", "train"), "the engine is gone"
    walk.look(page, "models")
    page.goto(studio.url + "/tasks/")
    walk.look(page, "tasks")
    page.goto(studio.url + path + "delete/")
    page.get_by_role("button", name="Delete the task").click()
    expect(page.get_by_text("The task was deleted.")).to_be_visible()
    assert page.request.get(studio.url + path).status == 404


def test_a_task_can_start_from_a_model_and_its_reference_is_that_model(
    studio: LiveStudio, alices: Page
) -> None:
    page = alices
    page.goto(studio.url + "/models/")
    card = page.locator(".model-cards > li").last
    name = card.get_by_role("heading").inner_text()
    card.get_by_role("heading").get_by_role("link").click()
    page.get_by_role("button", name="Start a new task from this model").click()
    expect(page.locator("#summary")).to_contain_text(f"{name}, not the bare base")
    expect(page.locator("label:has(input:checked)")).to_contain_text(name)
    walk.go_on(page, "Dataset & Evaluation")
    walk.choose_dataset(page, "Example: short and direct answers")
    walk.go_on(page, "Settings & Options")
    values = {label: value for label, value in QUICK.items() if label != "lora_rank"} | {"epoch": 0.05}
    walk.fill_settings(page, name="On from there", model_name="Road-v2", **values)
    expect(page.get_by_label("lora_rank", exact=True)).to_be_disabled()  # that model's adapter has decided it
    expect(page.get_by_label("lora_rank", exact=True)).to_have_value("4")
    walk.go_on(page, "Review and create the task")
    expect(page.get_by_text(f"{name}, the model this run starts from, not the bare base")).to_be_visible()
    path = walk.create(page)
    walk.wait_for_end(page, "Succeeded")
    page.reload()
    expect(page.locator(".task-foot")).to_contain_text(name)
    points = page.request.get(f"{studio.url}{path}points/").json()["points"]
    first = next(row for row in points if row["split"] == "eval" and row["step"] == 0)
    assert abs(first["values"]["eval_loss"] - math.log(2)) < 1e-6, "it begins where that model ended"
    assert abs(first["values"]["eval_kl"]) < 1e-6
    page.get_by_role("link", name="Open in My Models").click()
    expect(page.get_by_label("Lineage")).to_contain_text(name)


@pytest.mark.console_errors("WebSocket connection to .* failed")
def test_a_stranger_gets_404_everywhere(studio: LiveStudio, alices: Page, open_page: OpenPage) -> None:
    page = alices
    page.goto(studio.url + "/people/")
    page.get_by_label("Name").fill("bob")
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_label("Password again").fill(PASSWORD)
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_text("bob can sign in now")).to_be_visible()
    bob = open_page(viewport={"width": 1280, "height": 900})
    walk.sign_in(bob, studio.url, "bob")

    task = oldest_task(page, studio.url)
    page.goto(studio.url + "/models/")
    model = page.locator(".model-cards h2 a").last.get_attribute("href")
    page.goto(studio.url + "/datasets/")
    dataset = page.locator("a[href^='/datasets/'][href*='-']").first.get_attribute("href")
    partial = {"HX-Request": "true", "HX-Target": "task-status"}
    reads = [
        (task, {}), (task, partial), (f"{task}points/", {}), (f"{task}metrics.csv", {}), (f"{task}log/", {}),
        (f"{task}log/?download=1", {}), (f"{task}stop/", {}), (f"{task}delete/", {}),
        (model, {}), (f"{model}download/", {}), (f"{model}rename/", {}), (f"{model}delete/", {}),
        (f"{model}try/", {}), (dataset, {}),
    ]  # fmt: skip
    for address, headers in reads:
        assert page.request.get(studio.url + address, headers=headers).status == 200, f"alice: {address}"
        assert bob.request.get(studio.url + address, headers=headers).status == 404, f"bob: {address}"
    for address in [
        *(f"{task}{verb}/" for verb in ("cancel", "stop", "retry", "duplicate", "delete")),
        f"{model}rename/", f"{model}delete/", f"{model}try/", f"{model}try/stream/",
    ]:  # fmt: skip
        token = next(cookie["value"] for cookie in bob.context.cookies() if "csrf" in cookie["name"])
        answer = bob.request.post(studio.url + address, headers={"X-CSRFToken": token})
        assert answer.status == 404, f"bob: POST {address} gave {answer.status}"

    assert socket_opens(page, task) and not socket_opens(bob, task)
    for address in ("/tasks/", "/models/"):
        bob.goto(studio.url + address)
        expect(bob.get_by_text(re.compile("road", re.I))).to_have_count(0)


def socket_opens(page: Page, task: str) -> bool:
    opened: bool = page.evaluate(
        """(path) => new Promise((resolve) => {
            const socket = new WebSocket(`ws://${location.host}/ws${path}?after=0`);
            socket.onopen = () => { resolve(true); socket.close(); };
            socket.onerror = () => resolve(false);
        })""",
        task,
    )
    return opened


def test_the_road_on_a_phone(studio: LiveStudio, alices: Page, open_page: OpenPage) -> None:
    phone = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    walk.sign_in(phone, studio.url, "alice")
    walk.start_draft(phone, studio.url)
    walk.choose(phone, "tiny-llama")
    walk.look(phone, "phone-step-1")
    walk.go_on(phone, "Dataset & Evaluation")
    walk.choose_dataset(phone, "Example: short and direct answers")
    walk.hold_out(phone, 5)
    walk.look(phone, "phone-step-2")
    walk.go_on(phone, "Settings & Options")
    walk.fill_settings(phone, name="On a phone", model_name="Phone-v1", **QUICK | {"epoch": 0.3})
    walk.look(phone, "phone-step-3")
    walk.go_on(phone, "Review and create the task")
    walk.look(phone, "phone-step-4")
    socket = walk.Socket(phone)
    walk.create(phone)
    walk.wait_for_end(phone, "Succeeded")
    walk.wait_for_steps(phone, walk.total_steps(phone))
    assert socket.train_steps(), "points came by socket"
    walk.look(phone, "phone-task")
    phone.get_by_role("link", name="Try it beside its base").click()
    phone.get_by_label("Max tokens").fill("40")
    base, tuned, _ = walk.ask_both(phone, "Hello")
    assert base or tuned
    walk.look(phone, "phone-try")
    for address in ("/tasks/", "/models/", "/datasets/", "/account/"):
        phone.goto(studio.url + address)
        walk.look(phone, f"phone{address.replace('/', '-').rstrip('-')}")
