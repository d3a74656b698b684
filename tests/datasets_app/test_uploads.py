"""Uploads through the page: kept, limited while they stream, refused with a sentence, nothing left behind."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.test.client import BOUNDARY, MULTIPART_CONTENT, encode_multipart
from django.urls import reverse

from datasets_app import uploads
from datasets_app.models import Dataset
from tests.datasets_app.samples import jsonl, record

NEW = "/datasets/new/"
GOOD = jsonl(record(1), record(2))


def post(client: Client, data: bytes = GOOD, name: str = "pairs.jsonl", **fields: Any) -> Any:
    headers = fields.pop("headers", {})
    return client.post(NEW, {"file": SimpleUploadedFile(name, data), **fields}, headers=headers)


def left_behind(data_dir: Path) -> list[str]:
    return [path.name for folder in ("uploads", "datasets") for path in (data_dir / folder).iterdir()]


def test_an_upload_becomes_a_dataset_and_leads_to_its_page(alice_client: Client, data_dir: Path) -> None:
    response = post(alice_client, name="my pairs.jsonl")
    dataset = Dataset.objects.get()
    assert (response.status_code, response.url) == (302, f"/datasets/{dataset.pk}/")
    assert dataset.original_path.read_bytes() == GOOD
    assert left_behind(data_dir) == [str(dataset.pk)]


def test_with_htmx_the_browser_is_told_where_to_go(alice_client: Client, data_dir: Path) -> None:
    response = post(alice_client, headers={"HX-Request": "true"})
    assert response.headers["HX-Redirect"] == Dataset.objects.get().get_absolute_url()


def test_the_hash_is_taken_while_it_streams(alice_client: Client, data_dir: Path) -> None:
    data = jsonl(*(record(number, chosen="x" * 3000) for number in range(300)))
    post(alice_client, data)
    assert Dataset.objects.get().sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("wanted", ["/tasks/7/setup/data/", "/tasks/7/setup/data/?x=1"])
def test_an_upload_from_elsewhere_returns_there_with_the_dataset(
    alice_client: Client, data_dir: Path, wanted: str
) -> None:
    response = post(alice_client, next=wanted)
    join = "&" if "?" in wanted else "?"
    assert response.url == f"{wanted}{join}dataset={Dataset.objects.get().pk}"


@pytest.mark.parametrize(
    "wanted", ["https://evil.example/", "//evil.example/x", "javascript:alert(1)", "\\\\evil"]
)
def test_a_foreign_address_to_return_to_is_ignored(alice_client: Client, data_dir: Path, wanted: str) -> None:
    assert post(alice_client, next=wanted).url == Dataset.objects.get().get_absolute_url()


def test_the_same_file_again_leads_to_the_earlier_one_and_says_so(
    alice_client: Client, data_dir: Path
) -> None:
    post(alice_client, name="first.jsonl")
    earlier = Dataset.objects.get()
    response = alice_client.post(NEW, {"file": SimpleUploadedFile("again.jsonl", GOOD)}, follow=True)
    assert response.redirect_chain == [(earlier.get_absolute_url(), 302)]
    assert "uploaded before, as “first”" in response.content.decode()
    assert left_behind(data_dir) == [str(earlier.pk)]


REFUSED = [
    (b"", "The file is empty"),
    (b"\x89PNG\r\n\x1a\n....", "This is a PNG image"),
    (b"PK\x03\x04....", "This is a zip archive"),
    ('{"prompt": "x"}'.encode("utf-16-le"), "zero bytes"),
    ('{"prompt": "x"}'.encode("utf-32"), "UTF-32"),
]


@pytest.mark.parametrize(("data", "words"), REFUSED)
@pytest.mark.parametrize("htmx", [True, False])
def test_what_is_no_text_is_refused_at_once(
    alice_client: Client, data_dir: Path, data: bytes, words: str, htmx: bool
) -> None:
    response = post(alice_client, data, headers={"HX-Request": "true"} if htmx else {})
    assert response.status_code == 422
    assert words in response.content.decode()
    assert ("<html" in response.content.decode()) is not htmx
    assert left_behind(data_dir) == [] and not Dataset.objects.exists()


def test_no_file_at_all_is_a_sentence(alice_client: Client, data_dir: Path) -> None:
    response = alice_client.post(NEW, {"name": "x", "next": "/tasks/"})
    assert response.status_code == 422
    assert "A folder cannot be uploaded" in response.content.decode()
    assert 'value="/tasks/"' in response.content.decode(), "where to return to is not lost"


def test_a_name_of_300_characters_is_refused_and_one_of_a_file_is_cut(
    alice_client: Client, data_dir: Path
) -> None:
    response = alice_client.post(NEW, {"file": SimpleUploadedFile("x.jsonl", GOOD), "name": "n" * 300})
    assert response.status_code == 422
    assert "at most 200" in response.content.decode()
    post(alice_client, name="f" * 300 + ".jsonl")
    assert len(Dataset.objects.get().name) <= 200


# --- limits --------------------------------------------------------------------------------------------
def test_a_file_of_exactly_the_limit_is_kept(alice_client: Client, data_dir: Path, settings: Any) -> None:
    settings.UPLOAD_MAX_BYTES = len(GOOD)
    assert post(alice_client).status_code == 302


@pytest.mark.parametrize("htmx", [True, False])
def test_one_byte_more_than_the_limit_ends_the_upload_with_413(
    alice_client: Client, data_dir: Path, settings: Any, htmx: bool
) -> None:
    settings.UPLOAD_MAX_BYTES = len(GOOD) - 1
    response = post(alice_client, headers={"HX-Request": "true"} if htmx else {})
    assert response.status_code == 413
    assert "larger than" in response.content.decode()
    assert left_behind(data_dir) == [] and not Dataset.objects.exists()


class Counted(io.BytesIO):
    """A body that tells how much of it was read."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(size)
        self.taken += len(piece)
        return piece


def test_the_rest_of_an_upload_over_the_limit_is_not_even_read(
    alice_client: Client, data_dir: Path, settings: Any
) -> None:
    settings.UPLOAD_MAX_BYTES = 100_000
    body = encode_multipart(BOUNDARY, {"file": SimpleUploadedFile("x.jsonl", b"x" * 20_000_000)})
    source = Counted(body)
    stated = {"CONTENT_TYPE": MULTIPART_CONTENT, "CONTENT_LENGTH": str(len(body)), "wsgi.input": source}
    response = alice_client.generic("POST", NEW, b"", **stated)
    assert response.status_code == 413
    assert source.taken < 2_000_000
    assert left_behind(data_dir) == []


def test_a_disk_without_room_is_507_and_keeps_nothing(
    alice_client: Client, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "disk_has_room", lambda size: False)
    response = post(alice_client)
    assert response.status_code == 507
    assert "almost full" in response.content.decode()
    assert left_behind(data_dir) == []


def test_a_disk_that_fills_up_while_it_streams_is_507_too(
    alice_client: Client, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """Takes the first piece and then has no room."""

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    new_file = uploads.StreamingUploadHandler.new_file

    def on_a_full_disk(self: Any, *args: Any, **kwargs: Any) -> None:
        new_file(self, *args, **kwargs)
        self._out.close()
        self._out = Full()

    monkeypatch.setattr(uploads.StreamingUploadHandler, "new_file", on_a_full_disk)
    assert post(alice_client).status_code == 507
    assert left_behind(data_dir) == []


def test_a_stranger_to_the_studio_writes_nothing_to_disk(
    client: Client, db: None, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(uploads.Path, "chmod", lambda self, mode: opened.append(self))
    response = post(client)
    assert response.status_code == 302 and reverse("accounts:sign-in") in response.url
    assert opened == [] and left_behind(data_dir) == []


def test_a_file_sent_to_another_page_is_gone_at_the_end_of_the_request(
    alice_client: Client, data_dir: Path
) -> None:
    response = alice_client.post("/datasets/", {"file": SimpleUploadedFile("x.jsonl", GOOD)})
    assert response.status_code == 405
    assert left_behind(data_dir) == []


@pytest.mark.parametrize(
    "name", ["../../x", "a\0b.jsonl", "CON", "n" * 900, "\u202egpj.x", "<img onerror=1>.jsonl"]
)
def test_no_file_name_reaches_the_disk(alice_client: Client, data_dir: Path, name: str) -> None:
    body = (
        f'--x\r\nContent-Disposition: form-data; name="file"; filename="{quote(name, safe="./<>= ")}"\r\n\r\n'.encode()
        + GOOD
        + b"\r\n--x--\r\n"
    )
    response = alice_client.generic("POST", NEW, body, "multipart/form-data; boundary=x")
    assert response.status_code == 302
    dataset = Dataset.objects.get()
    assert left_behind(data_dir) == [str(dataset.pk)]
    assert [path.name for path in dataset.folder.iterdir()] == ["original"]
    assert dataset.original_name.isprintable() and len(dataset.original_name) <= 255


def test_a_file_name_longer_than_a_header_may_be_is_a_bad_request(
    alice_client: Client, data_dir: Path
) -> None:
    name = "n" * 5000
    head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
    response = alice_client.generic(
        "POST", NEW, head + GOOD + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"
    )
    assert response.status_code == 400
    assert left_behind(data_dir) == []
