"""What a person meets when something did not work."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.exceptions import RequestDataTooBig
from django.test import Client, RequestFactory
from django.urls import reverse

from studio import errors


@pytest.mark.django_db
def test_an_unknown_address_has_a_way_on(alice_client: Client) -> None:
    response = alice_client.get("/nowhere/")
    page = response.content.decode()
    assert response.status_code == 404 and "There is nothing here" in page and "Go to your tasks" in page


@pytest.mark.django_db
def test_an_unknown_address_sends_a_stranger_to_sign_in(client: Client) -> None:
    response = client.get("/nowhere/")
    assert response.status_code == 404 and "Sign in" in response.content.decode()


@pytest.mark.django_db
def test_a_form_that_is_too_large_is_413(alice_client: Client, settings: Any) -> None:
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 1000
    response = alice_client.post(reverse("accounts:password"), {"old_password": "x" * 2000})
    assert response.status_code == 413 and "too large" in response.content.decode()


@pytest.mark.django_db
def test_too_many_fields_are_413(alice_client: Client) -> None:
    fields = {f"field{number}": "x" for number in range(600)}
    assert alice_client.post(reverse("accounts:password"), fields).status_code == 413


def test_a_foreign_host_name_is_400_without_a_traceback(client: Client) -> None:
    response = client.get(reverse("health"), headers={"Host": "evil.example"})
    page = response.content.decode()
    assert response.status_code == 400 and "could not be read" in page and "evil" not in page


def test_the_500_page_needs_no_database(rf: RequestFactory, client: Client) -> None:
    """No `db` fixture: a query would fail this test."""
    response = errors.server_error(rf.get("/"))
    page = response.content.decode()
    assert response.status_code == 500 and "Something went wrong" in page and "Traceback" not in page


def test_a_view_that_breaks_shows_the_500_page(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr("studio.health.connection.cursor", broken)
    client.raise_request_exception = False
    response = client.get(reverse("health"))
    assert response.status_code == 500 and "a secret detail" not in response.content.decode()
    assert "a secret detail" in caplog.text


def test_too_big_is_told_from_unreadable(rf: RequestFactory, db: None) -> None:
    from django.contrib.auth.models import AnonymousUser

    request = rf.post("/")
    request.user = AnonymousUser()
    assert errors.bad_request(request, RequestDataTooBig()).status_code == 413
    assert errors.bad_request(request, ValueError()).status_code == 400


@pytest.mark.django_db
def test_health_tells_version_and_state(client: Client, settings: Any) -> None:
    assert client.get(reverse("health")).json() == {"status": "ok", "version": settings.VERSION}
    assert client.post(reverse("health")).status_code == 405
