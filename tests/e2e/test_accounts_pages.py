"""From the printed link to an account, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.browser import OpenPage
from tests.live import PASSWORD, LiveStudio, live_studio

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStudio]:
    with live_studio(tmp_path_factory.mktemp("accounts") / "data") as studio:
        yield studio


def test_the_link_makes_an_account_that_can_leave_and_come_back(
    studio: LiveStudio, page: Page, open_page: OpenPage
) -> None:
    page.goto(studio.url + studio.link)
    page.get_by_label("Name").fill("alice")
    page.get_by_label("Password", exact=True).fill("1234567890")
    page.get_by_label("Password again").fill("1234567890")
    page.get_by_role("button", name="Make the account").click()
    expect(page.get_by_text("too common")).to_be_visible()
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_label("Password again").fill(PASSWORD)
    page.get_by_role("button", name="Make the account").click()
    expect(page.get_by_role("heading", name="Fine-tuning tasks")).to_be_visible()

    page.goto(studio.url + "/people/")
    page.get_by_label("Name").fill("bob")
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_label("Password again").fill(PASSWORD)
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_text("bob can sign in now")).to_be_visible()

    bobs = open_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    bobs.goto(studio.url + "/account/")
    bobs.get_by_label("Name").fill("bob")
    bobs.get_by_label("Password").fill("wrong password here")
    bobs.get_by_role("button", name="Sign in").click()
    expect(bobs.get_by_role("alert")).to_contain_text("do not belong together")
    bobs.get_by_label("Name").fill("bob")
    bobs.get_by_label("Password").fill(PASSWORD)
    bobs.get_by_role("button", name="Sign in").click()
    expect(bobs.get_by_role("heading", name="Your account")).to_be_visible()

    page.get_by_role("button", name="Disable bob").click()
    expect(page.get_by_text("bob is signed out")).to_be_visible()
    bobs.reload()
    expect(bobs.get_by_role("heading", name="Sign in")).to_be_visible()

    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.goto(studio.url + studio.link)
    expect(page.get_by_role("heading", name="This link does not work any more")).to_be_visible()
