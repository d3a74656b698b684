"""Every address of the studio, taken from the URL configuration, is closed to whoever is not signed in."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings
from django.shortcuts import resolve_url
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver, reverse

OPEN = {"accounts:sign-in", "accounts:first-run", "health"}
EXAMPLES: dict[str, Any] = {"uuid": uuid.UUID(int=1), "int": 1}


def example(kind: str, regex: str) -> Any:
    """A value that the converter takes: of "a|b|c", the first."""
    choices = re.fullmatch(r"\(?(?:\?:)?([\w-]+)(?:\|[\w-]+)+\)?", regex)
    return choices[1] if choices else EXAMPLES.get(kind, "x")


def named(resolver: URLResolver, namespace: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in resolver.url_patterns:
        if isinstance(entry, URLResolver):
            yield from named(entry, f"{namespace}{entry.namespace}:" if entry.namespace else namespace)
        elif isinstance(entry, URLPattern):
            assert entry.name, f"{entry.pattern} has no name: it could not be tested"
            kwargs = {
                name: example(type(value).__name__.lower().removesuffix("converter"), value.regex)
                for name, value in entry.pattern.converters.items()
            }
            yield f"{namespace}{entry.name}", kwargs


ADDRESSES = sorted(dict(named(get_resolver())).items())


def test_the_list_is_not_empty() -> None:
    assert len(ADDRESSES) > 15


@pytest.mark.django_db
@pytest.mark.parametrize(("name", "kwargs"), ADDRESSES, ids=[name for name, _ in ADDRESSES])
@pytest.mark.parametrize("method", ["get", "post", "htmx"])
def test_an_anonymous_visitor_is_sent_to_the_sign_in_page(
    name: str, kwargs: dict[str, Any], method: str
) -> None:
    path = reverse(name, kwargs=kwargs)
    client = Client()
    headers = {"HX-Request": "true"} if method == "htmx" else {}
    response = client.post(path) if method == "post" else client.get(path, headers=headers)
    if name in OPEN:
        assert response.status_code < 500 and not response.get("Location", "").startswith("/sign-in")
        return
    assert response.status_code == 302, f"{path} answered {response.status_code}"
    assert response["Location"].startswith(resolve_url(settings.LOGIN_URL))


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [row for row in ADDRESSES if "uuid" in str(row[1]).lower()],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_exist_is_404_for_somebody_signed_in(
    mallory_client: Client, name: str, kwargs: dict[str, Any]
) -> None:
    path = reverse(name, kwargs=kwargs)
    codes = {mallory_client.get(path).status_code, mallory_client.post(path).status_code}
    assert codes <= {404, 405} and 404 in codes, f"{path}: {codes}"


@pytest.mark.django_db
def test_every_page_carries_the_safety_headers(alice_client: Client) -> None:
    response = alice_client.get(reverse("accounts:password"))
    policy = response["Content-Security-Policy"]
    assert "script-src 'self';" in policy + ";" and "unsafe-eval" not in policy
    assert (
        "default-src 'self'" in policy
        and "frame-ancestors 'none'" in policy
        and "object-src 'none'" in policy
    )
    assert "camera=()" in response["Permissions-Policy"]
    assert response["X-Content-Type-Options"] == "nosniff"
    assert response["Referrer-Policy"] == "same-origin"
