"""Accounts: the first one by a link that works once, sign-in with a lock, people added by an administrator."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import time_machine
from django.contrib.auth.models import User
from django.db import connections
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from studio.accounts import services
from studio.accounts.models import FirstRunLink

PASSWORD = "correct horse battery"
ACCOUNT = {"username": "ada", "password1": PASSWORD, "password2": PASSWORD}
pytestmark = pytest.mark.django_db


def first_run(token: str) -> str:
    return reverse("accounts:first-run", args=[token])


@pytest.fixture
def audit_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    import logging

    monkeypatch.setattr(logging.getLogger("studio.audit"), "propagate", True)
    caplog.set_level("INFO", logger="studio.audit")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "studio.audit"]


# --- the first account ----------------------------------------------------------------------------
def test_the_link_makes_the_first_account_an_administrator_and_signs_it_in(
    client: Client, data_dir: Path, audit_lines: Any
) -> None:
    token = services.first_run_link_create()
    response = client.post(first_run(token), ACCOUNT)
    assert response.status_code == 302 and response["Location"] == "/"
    ada = User.objects.get()
    assert ada.is_superuser and ada.check_password(PASSWORD)
    assert client.get(reverse("accounts:people")).status_code == 200
    assert any('"action": "account made"' in line and '"name": "ada"' in line for line in audit_lines())


def test_the_first_sign_in_brings_the_example_dataset_and_later_ones_do_not(
    client: Client, data_dir: Path
) -> None:
    client.post(first_run(services.first_run_link_create()), ACCOUNT)
    ada = User.objects.get()
    assert ada.datasets.filter(is_example=True).count() == 1
    ada.datasets.all().delete()
    client.post(reverse("accounts:sign-out"))
    client.post(reverse("accounts:sign-in"), {"username": "ada", "password": PASSWORD})
    assert not ada.datasets.exists(), "what somebody deleted must stay deleted"


def test_a_failing_example_does_not_keep_anybody_out(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "example_dataset_ensure", lambda owner: 1 / 0)
    assert client.post(first_run(services.first_run_link_create()), ACCOUNT).status_code == 302
    assert client.get(reverse("accounts:password")).status_code == 200


def test_the_link_works_once(client: Client) -> None:
    token = services.first_run_link_create()
    client.post(first_run(token), ACCOUNT)
    for response in (
        Client().get(first_run(token)),
        Client().post(first_run(token), ACCOUNT | {"username": "eve"}),
    ):
        assert response.status_code == 410 and "does not work any more" in response.content.decode()
    assert User.objects.count() == 1


def test_a_used_link_sends_whoever_is_signed_in_to_their_tasks(client: Client) -> None:
    token = services.first_run_link_create()
    client.post(first_run(token), ACCOUNT)
    page = client.get(first_run(token)).content.decode()
    assert "signed in already" in page and "Go to sign-in" not in page


def test_the_cursor_goes_to_the_first_field_to_mend(client: Client) -> None:
    wrong = ACCOUNT | {"password2": "something else entirely"}
    page = client.post(first_run(services.first_run_link_create()), wrong).content.decode()
    focused = [tag for tag in page.split("<input")[1:] if " autofocus" in tag.split(">")[0]]
    assert len(focused) == 1 and 'name="password2"' in focused[0]


def test_the_link_expires(client: Client) -> None:
    token = services.first_run_link_create()
    with time_machine.travel(timezone.now() + timedelta(hours=25)):
        assert client.get(first_run(token)).status_code == 410
        assert client.post(first_run(token), ACCOUNT).status_code == 410
    assert not User.objects.exists()


def test_a_new_link_voids_the_earlier_one(client: Client) -> None:
    earlier, newer = services.first_run_link_create(), services.first_run_link_create()
    assert client.get(first_run(earlier)).status_code == 410
    assert client.get(first_run(newer)).status_code == 200


def test_no_link_is_made_and_none_works_once_somebody_has_an_account(client: Client) -> None:
    token = services.first_run_link_create()
    User.objects.create_superuser("made-by-command", password=PASSWORD)
    assert client.get(first_run(token)).status_code == 410
    assert client.post(first_run(token), ACCOUNT).status_code == 410
    assert services.first_run_link_create() == ""
    assert User.objects.count() == 1


def test_a_guessed_token_opens_nothing(client: Client) -> None:
    services.first_run_link_create()
    assert client.post(first_run("guess"), ACCOUNT).status_code == 410


def test_the_token_itself_is_not_in_the_database() -> None:
    token = services.first_run_link_create()
    assert token not in str(FirstRunLink.objects.values().get())


def test_a_refused_form_leaves_the_link_good(client: Client) -> None:
    token = services.first_run_link_create()
    weak = {"username": "ada", "password1": "1234567890", "password2": "1234567890"}
    response = client.post(first_run(token), weak)
    assert response.status_code == 422 and "too common" in response.content.decode()
    assert client.post(first_run(token), ACCOUNT).status_code == 302


@pytest.mark.django_db(transaction=True)
def test_two_browsers_with_the_link_make_one_account() -> None:
    token = services.first_run_link_create()
    start, outcomes = threading.Barrier(2), []

    def race(name: str) -> None:
        start.wait()
        try:
            services.first_account_create(token=token, username=name, password=PASSWORD)
            outcomes.append("made")
        except services.LinkUsed:
            outcomes.append("refused")
        finally:
            connections.close_all()

    threads = [threading.Thread(target=race, args=[name]) for name in ("ada", "eve")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["made", "refused"]
    assert User.objects.count() == 1


# --- sign in and out ------------------------------------------------------------------------------
def test_sign_in_goes_where_somebody_wanted_to_go(client: Client, alice: User, data_dir: Path) -> None:
    data = {"username": "alice", "password": PASSWORD, "next": "/people/"}
    assert client.post(reverse("accounts:sign-in"), data)["Location"] == "/people/"


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example",
        "https://evil.example/x",
        "javascript:alert(1)",
        "\\\\evil.example",
        "/\\evil.example",
    ],
)
def test_sign_in_never_leads_to_another_site(
    client: Client, alice: User, data_dir: Path, target: str
) -> None:
    data = {"username": "alice", "password": PASSWORD, "next": target}
    assert client.post(reverse("accounts:sign-in"), data)["Location"] == "/"
    assert Client().get(reverse("accounts:sign-in"), {"next": target}).content.decode().count("evil") == 0


def test_a_wrong_password_and_an_unknown_name_read_the_same(client: Client, alice: User) -> None:
    pages = []
    for name in ("alice", "nobody"):
        response = client.post(reverse("accounts:sign-in"), {"username": name, "password": "wrong"})
        assert response.status_code == 422
        pages.append(response.content.decode().split('role="alert">')[1].split("<")[0])
    assert pages[0] == pages[1]


def test_too_many_wrong_passwords_lock_the_name_from_that_address(
    client: Client, alice: User, settings: Any, audit_lines: Any, data_dir: Path
) -> None:
    settings.AXES_ENABLED = True
    wrong = {"username": "alice", "password": "wrong"}
    codes = [
        client.post(reverse("accounts:sign-in"), wrong).status_code
        for _ in range(settings.AXES_FAILURE_LIMIT)
    ]
    assert set(codes[:-1]) == {422} and codes[-1] == 429
    locked = client.post(reverse("accounts:sign-in"), {"username": "alice", "password": PASSWORD})
    assert locked.status_code == 429 and "15 minutes" in locked.content.decode()
    elsewhere = Client(REMOTE_ADDR="10.0.0.9")
    assert (
        elsewhere.post(reverse("accounts:sign-in"), {"username": "alice", "password": PASSWORD}).status_code
        == 302
    )
    assert any("sign-in locked" in line for line in audit_lines())
    with time_machine.travel(timezone.now() + timedelta(minutes=16)):
        assert (
            client.post(reverse("accounts:sign-in"), {"username": "alice", "password": PASSWORD}).status_code
            == 302
        )


def test_sign_out_needs_a_post(alice_client: Client) -> None:
    assert alice_client.get(reverse("accounts:sign-out")).status_code == 405
    assert alice_client.post(reverse("accounts:sign-out")).status_code == 302
    assert alice_client.get(reverse("accounts:password")).status_code == 302


def test_a_form_without_its_token_changes_nothing(alice: User) -> None:
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(alice)
    response = strict.post(reverse("accounts:sign-out"))
    assert response.status_code == 403 and "open for too long" in response.content.decode()
    assert strict.get(reverse("accounts:password")).status_code == 200


def test_htmx_after_the_session_ended_reloads_the_whole_page(client: Client) -> None:
    headers = {"HX-Request": "true", "HX-Current-URL": "http://testserver/tasks/?page=2"}
    response = client.get(reverse("accounts:people"), headers=headers, follow=True)
    assert response["HX-Redirect"] == "/sign-in/?next=%2Ftasks%2F"


def test_while_nobody_has_an_account_the_page_says_where_the_link_is(client: Client, db: None) -> None:
    assert "one-time link" in client.get(reverse("accounts:sign-in")).content.decode()


def test_who_is_signed_in_does_not_see_the_form_again(alice_client: Client) -> None:
    assert alice_client.get(reverse("accounts:sign-in"), {"next": "/people/"})["Location"] == "/people/"


# --- people ---------------------------------------------------------------------------------------
@pytest.fixture
def admin_client(db: None) -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("root", password=PASSWORD))
    return client


def test_an_administrator_adds_and_disables_somebody(
    admin_client: Client, data_dir: Path, audit_lines: Any
) -> None:
    assert admin_client.post(reverse("accounts:people"), ACCOUNT).status_code == 302
    ada = User.objects.get(username="ada")
    assert not ada.is_superuser
    adas = Client()
    assert (
        adas.post(reverse("accounts:sign-in"), {"username": "ada", "password": PASSWORD}).status_code == 302
    )
    admin_client.post(reverse("accounts:set-active", args=[ada.pk]), {"active": "0"})
    assert adas.get(reverse("accounts:password")).status_code == 302, "out at the next request"
    admin_client.post(reverse("accounts:set-active", args=[ada.pk]), {"active": "1"})
    assert (
        Client().post(reverse("accounts:sign-in"), {"username": "ada", "password": PASSWORD}).status_code
        == 302
    )
    told = " ".join(audit_lines())
    assert "account made" in told and "account disabled" in told and "account enabled" in told


def test_nobody_disables_themselves(admin_client: Client) -> None:
    root = User.objects.get(username="root")
    admin_client.post(reverse("accounts:set-active", args=[root.pk]), {"active": "0"})
    root.refresh_from_db()
    assert root.is_active


@pytest.mark.parametrize("method", ["get", "post"])
def test_others_may_not_see_or_change_people(alice_client: Client, mallory: User, method: str) -> None:
    assert getattr(alice_client, method)(reverse("accounts:people"), ACCOUNT).status_code == 403
    assert (
        alice_client.post(reverse("accounts:set-active", args=[mallory.pk]), {"active": "0"}).status_code
        == 403
    )
    mallory.refresh_from_db()
    assert mallory.is_active and not User.objects.filter(username="ada").exists()


def test_an_administrator_is_told_of_a_taken_name(admin_client: Client, alice: User) -> None:
    response = admin_client.post(reverse("accounts:people"), ACCOUNT | {"username": "ALICE"})
    assert response.status_code == 422 and "already exists" in response.content.decode()


def test_rights_cannot_be_smuggled_into_the_first_form(client: Client, admin_client: Client) -> None:
    admin_client.post(reverse("accounts:people"), ACCOUNT | {"is_superuser": "1", "is_staff": "1"})
    assert not User.objects.get(username="ada").is_superuser


def test_somebody_changes_their_own_password(alice: User, alice_client: Client, data_dir: Path) -> None:
    new = "another horse battery"
    wrong = {"old_password": "no", "new_password1": new, "new_password2": new}
    assert alice_client.post(reverse("accounts:password"), wrong).status_code == 422
    other_browser = Client()
    other_browser.force_login(alice)
    right = wrong | {"old_password": PASSWORD}
    assert alice_client.post(reverse("accounts:password"), right).status_code == 302
    assert alice_client.get(reverse("accounts:password")).status_code == 200
    assert other_browser.get(reverse("accounts:password")).status_code == 302
    assert (
        Client().post(reverse("accounts:sign-in"), {"username": "alice", "password": new}).status_code == 302
    )


def test_a_name_is_shown_as_text(admin_client: Client) -> None:
    User.objects.create_user("<script>alert(1)</script>")
    page = admin_client.get(reverse("accounts:people")).content.decode()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
