"""A dataset from the file to its pairs, in a real browser, validated by a real worker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser import OpenPage
from tests.datasets_app.samples import jsonl, record
from tests.live import PASSWORD, LiveStudio, live_studio

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

NASTY = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">{{7*7}}"
LONG_WAIT = 40_000  # a worker may be starting
DROP_FILE = """(zone, [name, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name));
    for (const type of ["dragover", "drop"])
        zone.dispatchEvent(new DragEvent(type, {dataTransfer: data, bubbles: true, cancelable: true}));
}"""

OTHERS_BREAK_OFF = """() => {
    for (const name of ["htmx:sendAbort", "htmx:sendError"])
        document.body.dispatchEvent(new CustomEvent(name, {bubbles: true, detail: {}}));
}"""


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStudio]:
    folder = tmp_path_factory.mktemp("datasets")
    with live_studio(folder / "data", STUDIO_UPLOAD_MAX_MB="2") as studio:
        studio.make_first_account()
        yield studio


def sign_in(studio: LiveStudio, page: Page, to: str) -> None:
    page.goto(f"{studio.url}/sign-in/?next={to}")
    page.get_by_label("Name").fill("alice")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(studio.url + to)


def choose(page: Page, path: Path) -> None:
    page.get_by_label("Dataset file").set_input_files(path)


def upload(page: Page) -> None:
    page.get_by_role("button", name="Upload dataset").click()


def test_a_file_is_uploaded_validated_and_read_page_by_page(
    studio: LiveStudio, page: Page, tmp_path: Path
) -> None:
    sign_in(studio, page, "/datasets/new/")
    records = [record(number, chosen=f"Answer {number} {NASTY}") for number in range(1, 13)]
    (tmp_path / "pairs.jsonl").write_bytes(jsonl(*records, {"prompt": "q", "chosen": 7, "rejected": NASTY}))

    choose(page, tmp_path / "pairs.jsonl")
    page.get_by_label("Name").fill(NASTY)
    upload(page)
    expect(page.get_by_text("12 pairs", exact=True)).to_be_visible(timeout=LONG_WAIT)
    expect(page.get_by_role("heading", name=NASTY)).to_be_visible()
    expect(page.get_by_text("Line 13")).to_be_visible()
    expect(page.get_by_text("found the number 7; expected text")).to_be_visible()
    expect(page.get_by_text(f"Answer 1 {NASTY}")).to_be_visible()

    pairs = page.locator("#pairs")
    pairs.get_by_role("link", name="Next").click()
    expect(pairs.get_by_text("Question 6?")).to_be_visible()
    expect(pairs.get_by_text("Question 1?")).to_have_count(0)
    with page.expect_download() as download:
        page.get_by_role("link", name="Original file").click()
    assert download.value.path().read_bytes() == (tmp_path / "pairs.jsonl").read_bytes()
    assert page.title().startswith("<script>"), "nothing in the file ran"

    page.get_by_role("link", name="Delete…").click()
    page.get_by_role("button", name="Delete dataset").click()
    expect(page.get_by_text("was deleted")).to_be_visible()


def test_what_cannot_be_uploaded_is_said_in_the_form_and_the_form_still_works(
    studio: LiveStudio, page: Page, tmp_path: Path
) -> None:
    sign_in(studio, page, "/datasets/new/")
    problem = page.locator("[data-upload-problem]")
    (tmp_path / "big.jsonl").write_bytes(b"x" * 3 * 1024 * 1024)
    (tmp_path / "picture.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "good.jsonl").write_bytes(jsonl(record(1)))

    choose(page, tmp_path / "big.jsonl")
    expect(problem).to_contain_text("The file has 3.0 MB; the limit of this studio is 2 MB")
    upload(page)
    expect(problem).to_contain_text("the limit of this studio")
    choose(page, tmp_path / "empty.jsonl")
    expect(problem).to_contain_text("The file is empty")
    choose(page, tmp_path / "picture.jsonl")
    expect(problem).to_be_empty()
    upload(page)
    expect(problem).to_contain_text("This is a PNG image")
    choose(page, tmp_path / "good.jsonl")
    expect(problem).to_be_empty()
    upload(page)
    expect(page.get_by_text("1 pair", exact=True)).to_be_visible(timeout=LONG_WAIT)

    page.goto(studio.url + "/datasets/new/")
    choose(page, tmp_path / "good.jsonl")
    upload(page)
    expect(page.get_by_text("This file was uploaded before, as “good”")).to_be_visible()


def test_a_dropped_file_is_chosen(studio: LiveStudio, page: Page) -> None:
    sign_in(studio, page, "/datasets/")
    page.goto(studio.url + "/datasets/new/?next=/datasets/%3Fpage%3D1")
    page.locator("[data-dropzone]").evaluate(DROP_FILE, ["dropped.jsonl", jsonl(record(50)).decode()])
    upload(page)
    page.wait_for_url(re.compile(r"/datasets/\?page=1&dataset=[0-9a-f-]{36}$"))
    expect(page.get_by_role("link", name="dropped", exact=True)).to_be_visible()


def test_a_request_of_another_part_of_the_page_is_not_the_forms_affair(
    studio: LiveStudio, page: Page
) -> None:
    """A summary replaced by the next one is aborted beside this form; an error in a script fails every test here."""
    sign_in(studio, page, "/datasets/new/")
    page.evaluate(OTHERS_BREAK_OFF)
    expect(page.locator("#connection-notice")).to_be_visible()
    expect(page.locator("[data-upload-problem]")).to_be_empty()


def test_without_javascript_on_a_dark_phone(studio: LiveStudio, open_page: OpenPage, tmp_path: Path) -> None:
    phone = open_page(java_script_enabled=False, viewport={"width": 390, "height": 800}, color_scheme="dark")
    sign_in(studio, phone, "/datasets/new/")
    (tmp_path / "zip.jsonl").write_bytes(b"PK\x03\x04....")
    choose(phone, tmp_path / "zip.jsonl")
    upload(phone)
    expect(phone.get_by_text("This is a zip archive")).to_be_visible()
    (tmp_path / "plain.jsonl").write_bytes(jsonl(record(99)))
    choose(phone, tmp_path / "plain.jsonl")
    upload(phone)
    expect(phone.get_by_role("heading", name="plain")).to_be_visible()
