"""The pages of the datasets: they work, they are private, and somebody's text stays text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from django.test import Client

from datasets_app import services
from datasets_app.findings import Finding
from datasets_app.models import Dataset
from tests.datasets_app.conftest import MakeDataset
from tests.datasets_app.samples import jsonl, record
from training.models import TrainingTask

HTMX = {"HX-Request": "true"}
NASTY = '<script>alert("x")</script><img src=x onerror=alert(1)>{{7*7}}${8*8}</textarea> \u2028 \u202e'


def text_of(response: Any) -> str:
    return response.content.decode()


def download(response: Any) -> bytes:
    async def collect() -> bytes:
        return b"".join([piece async for piece in response])

    return asyncio.run(collect())


ADDRESSES: list[tuple[str, str]] = [
    ("get", "/datasets/{id}/"),
    ("get", "/datasets/{id}/delete/"),
    ("post", "/datasets/{id}/delete/"),
    ("post", "/datasets/{id}/rename/"),
    ("post", "/datasets/{id}/again/"),
    ("get", "/datasets/{id}/download/original/"),
    ("get", "/datasets/{id}/download/pairs/"),
    ("get", "/datasets/{id}/download/findings/"),
]


@pytest.mark.parametrize(("method", "address"), ADDRESSES)
@pytest.mark.parametrize("headers", [{}, HTMX | {"HX-Target": "pairs"}])
def test_a_stranger_gets_404(
    validated: MakeDataset, mallory_client: Client, method: str, address: str, headers: dict[str, str]
) -> None:
    dataset = validated()
    response = getattr(mallory_client, method)(
        address.format(id=dataset.pk), {"name": "mine"}, headers=headers
    )
    assert response.status_code == 404
    dataset.refresh_from_db()
    assert dataset.name == "pairs" and dataset.original_path.exists()


@pytest.mark.parametrize(
    ("method", "address"), [*ADDRESSES, ("get", "/datasets/"), ("get", "/datasets/new/")]
)
def test_somebody_not_signed_in_is_sent_to_sign_in(
    validated: MakeDataset, client: Client, method: str, address: str
) -> None:
    response = getattr(client, method)(address.format(id=validated().pk))
    assert response.status_code == 302 and "/sign-in/" in response.url


@pytest.mark.parametrize(
    ("method", "address"),
    [
        ("post", "/datasets/"),
        ("put", "/datasets/new/"),
        ("post", "/datasets/{id}/"),
        ("get", "/datasets/{id}/rename/"),
        ("get", "/datasets/{id}/again/"),
        ("put", "/datasets/{id}/delete/"),
        ("post", "/datasets/{id}/download/pairs/"),
        ("post", "/datasets/example/"),
    ],
)
def test_a_wrong_method_is_405(
    validated: MakeDataset, alice_client: Client, method: str, address: str
) -> None:
    assert getattr(alice_client, method)(address.format(id=validated().pk)).status_code == 405


# --- list -----------------------------------------------------------------------------------------------
def test_an_empty_list_says_what_to_do(alice_client: Client, data_dir: Any) -> None:
    page = text_of(alice_client.get("/datasets/"))
    assert "No datasets yet" in page and "/datasets/new/" in page and "/datasets/example/" in page


def test_the_list_shows_only_ones_own(
    validated: MakeDataset, alice_client: Client, mallory_client: Client
) -> None:
    validated(name="secret plans.jsonl")
    assert "secret plans" in text_of(alice_client.get("/datasets/"))
    assert "secret plans" not in text_of(mallory_client.get("/datasets/"))


def test_the_list_asks_again_only_while_something_is_going_on(
    queued: MakeDataset, alice_client: Client
) -> None:
    dataset = queued()
    headers = HTMX | {"HX-Target": "rows"}
    part = text_of(alice_client.get("/datasets/", headers=headers))
    assert 'hx-trigger="every 2s"' in part and "<html" not in part
    Dataset.objects.update(status="ready")
    assert "hx-trigger" not in text_of(alice_client.get("/datasets/", headers=headers))
    assert dataset.name in text_of(alice_client.get("/datasets/"))


def test_a_long_list_has_pages(alice: Any, alice_client: Client) -> None:
    Dataset.objects.bulk_create(Dataset(owner=alice, name=f"set {n}", status="ready") for n in range(30))
    assert text_of(alice_client.get("/datasets/?page=2")).count("<tr>") == 1 + 5
    assert alice_client.get("/datasets/?page=x").status_code == 200


# --- upload page -----------------------------------------------------------------------------------------
def test_the_upload_page_has_the_requirements_the_advice_and_the_formats(alice_client: Client) -> None:
    page = text_of(alice_client.get("/datasets/new/"))
    for words in (
        "100–100,000 preference pairs",
        "Ensure clear quality differences between chosen and rejected responses",
        "Include diverse scenarios covering different aspects of alignment",
        "Maintain consistent preference criteria throughout the dataset",
        "Validate that preference rankings reflect human values and safety",
        "Tell me about tomorrow&#x27;s weather",
        "Equals 2",
        "non_preferred_output",
        "messages + rejected_response",
        "prompt + chosen + rejected",
    ):
        assert words in page, words
    assert "style=" not in page and "onclick" not in page


def test_the_address_to_return_to_is_carried_through_the_form(alice_client: Client) -> None:
    page = text_of(alice_client.get("/datasets/new/", {"next": '/tasks/1/"><script>'}))
    assert 'name="next" value="/tasks/1/&quot;&gt;&lt;script&gt;"' in page


def test_the_example_file_is_a_good_dataset(
    alice_client: Client, validated: MakeDataset, data_dir: Any
) -> None:
    response = alice_client.get("/datasets/example/")
    assert 'attachment; filename="short_and_direct.jsonl"' in response.headers["Content-Disposition"]
    dataset = validated(download(response))
    assert (dataset.status, dataset.num_errors) == ("ready", 0)


# --- one dataset -----------------------------------------------------------------------------------------
def test_a_dataset_shows_its_facts_findings_lengths_and_pairs(
    validated: MakeDataset, alice_client: Client
) -> None:
    data = jsonl(*(record(n) for n in range(1, 8)), record(9, chosen=7), record(1))
    page = text_of(alice_client.get(validated(data).get_absolute_url()))
    assert "prompt + chosen + rejected" in page
    assert "Line 8" in page and "the number 7" in page and "Left out" in page
    assert "the same pair as line 1" in page
    assert "8 pairs" in page and "Question 1?" in page and "Answer 1." in page
    assert page.count('role="img"') == 2
    assert "style=" not in page


@pytest.mark.parametrize("status", ["queued", "validating"])
def test_a_dataset_being_validated_shows_progress_and_asks_again(
    queued: MakeDataset, alice_client: Client, status: str
) -> None:
    dataset = queued()
    Dataset.objects.update(status=status, lines_done=1234, bytes_done=5)
    headers = HTMX | {"HX-Target": "dataset"}
    part = text_of(alice_client.get(dataset.get_absolute_url(), headers=headers))
    assert 'hx-trigger="every 1s"' in part and "<progress" in part and "<html" not in part
    assert ("1,234" in part) is (status == "validating")


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"prose\n", "invalid", "No record of the file could be used as a preference pair. Line 1: found"),
        (b"[]", "invalid", "holds no records"),
    ],
)
def test_a_dataset_without_pairs_says_why(
    validated: MakeDataset, alice_client: Client, data: bytes, status: str, words: str
) -> None:
    dataset = validated(data)
    page = text_of(alice_client.get(dataset.get_absolute_url()))
    assert dataset.status == status
    assert words in page and "hx-trigger" not in page
    main = page.partition("<main")[2]
    assert "found The" not in main and ".." not in main and "(record)" not in main


def test_a_failed_validation_can_be_done_again(queued: MakeDataset, alice_client: Client) -> None:
    dataset = queued()
    Dataset.objects.update(status="failed", problem="The disk is full.")
    page = text_of(alice_client.get(dataset.get_absolute_url()))
    assert "The disk is full." in page and "Validate again" in page
    assert alice_client.post(f"/datasets/{dataset.pk}/again/").status_code == 302
    dataset.refresh_from_db()
    assert dataset.status == "queued"


def test_pages_of_pairs_and_findings_come_alone_for_htmx(
    validated: MakeDataset, alice_client: Client
) -> None:
    data = jsonl(*(record(n) for n in range(1, 13)), *({"x": n} for n in range(60)))
    dataset = validated(data)

    def part(target: str, query: str) -> str:
        url = dataset.get_absolute_url() + query
        return text_of(alice_client.get(url, headers=HTMX | {"HX-Target": target}))

    pairs = part("pairs", "?pairs=3")
    assert pairs.lstrip().startswith('<div id="pairs">') and "Question 12?" in pairs
    assert "Question 1?" not in pairs and "Page 3 of 3" in pairs
    findings = part("findings", "?findings=2")
    assert findings.lstrip().startswith('<div id="findings">') and "Line 24" in findings
    assert "Line 12<" not in findings
    assert "Page 7 of 7" in part("findings", "?findings=999")


def test_somebodys_text_is_shown_as_text_everywhere(validated: MakeDataset, alice_client: Client) -> None:
    data = jsonl(
        record(1, prompt=NASTY, chosen=NASTY + "1", rejected=NASTY + "2"),
        {NASTY: 1},
        record(2, chosen=[NASTY]),
    )
    dataset = validated(data, name=NASTY.replace("/", "") + ".jsonl")
    services.dataset_rename(dataset, name=NASTY)
    for address in ("/datasets/", f"/datasets/{dataset.pk}/", f"/datasets/{dataset.pk}/delete/"):
        page = text_of(alice_client.get(address))
        assert "<script>alert" not in page and "<img src=x" not in page and "onerror=alert(1)>" not in page
        assert "&lt;script&gt;" in page
        assert "49" not in page.split("&lt;script&gt;")[1][:120], "templates in text are not run"
    assert "{{7*7}}${8*8}" in text_of(alice_client.get(dataset.get_absolute_url()))


def test_text_that_looks_like_htmx_is_not_obeyed(validated: MakeDataset, alice_client: Client) -> None:
    page = text_of(alice_client.get(validated(jsonl(record(prompt='<b hx-get="/x">'))).get_absolute_url()))
    assert "<b hx-get" not in page
    assert page.count("hx-disable>") >= 1


# --- rename, delete, download -------------------------------------------------------------------------------
def test_a_dataset_is_renamed(validated: MakeDataset, alice_client: Client) -> None:
    dataset = validated()
    assert alice_client.post(f"/datasets/{dataset.pk}/rename/", {"name": "Better"}).status_code == 302
    dataset.refresh_from_db()
    assert dataset.name == "Better"


@pytest.mark.parametrize("name", ["", "  ", "n" * 201, "a\0b"])
def test_a_name_that_cannot_be_is_422_with_the_form(
    validated: MakeDataset, alice_client: Client, name: str
) -> None:
    dataset = validated()
    response = alice_client.post(f"/datasets/{dataset.pk}/rename/", {"name": name})
    assert response.status_code == 422 and "errorlist" in text_of(response)
    dataset.refresh_from_db()
    assert dataset.name == "pairs"


def test_deleting_asks_first(validated: MakeDataset, alice_client: Client, alice: Any) -> None:
    dataset = validated()
    TrainingTask.objects.create(owner=alice, name="Old run", status="succeeded", dataset=dataset)
    page = text_of(alice_client.get(f"/datasets/{dataset.pk}/delete/"))
    assert "Delete dataset" in page and "Old run" in page
    assert Dataset.objects.exists()
    assert alice_client.post(f"/datasets/{dataset.pk}/delete/").url == "/datasets/"
    assert not Dataset.objects.exists()


def test_a_dataset_in_use_is_not_deleted_and_the_page_says_why(
    validated: MakeDataset, alice_client: Client, alice: Any
) -> None:
    dataset = validated()
    TrainingTask.objects.create(owner=alice, name="My run", status="running", dataset=dataset)
    page = text_of(alice_client.get(f"/datasets/{dataset.pk}/delete/"))
    assert "My run" in page and "Delete dataset" not in page
    response = alice_client.post(f"/datasets/{dataset.pk}/delete/")
    assert response.status_code == 409 and "cancel it" in text_of(response)
    assert dataset.original_path.exists()


def test_the_three_files_can_be_taken_away(validated: MakeDataset, alice_client: Client) -> None:
    data = jsonl(record(1), {"x": 1})
    dataset = validated(data, name="mine ☃.jsonl")

    def get(kind: str) -> Any:
        return alice_client.get(f"/datasets/{dataset.pk}/download/{kind}/")

    response = get("original")
    assert download(response) == data
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert response.headers["Content-Disposition"].startswith("attachment;")
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert int(response.headers["Content-Length"]) == len(data)
    pair = json.loads(download(get("pairs")))
    assert pair["rejected"][0]["content"] == "No idea 1."
    assert Finding.from_json(download(get("findings")).splitlines()[0]).line == 2


def test_a_file_that_is_not_there_yet_is_404(queued: MakeDataset, alice_client: Client) -> None:
    assert alice_client.get(f"/datasets/{queued().pk}/download/pairs/").status_code == 404


@pytest.mark.parametrize("kind", ["secret", "../original", ".env"])
def test_no_other_file_has_an_address(validated: MakeDataset, alice_client: Client, kind: str) -> None:
    assert alice_client.get(f"/datasets/{validated().pk}/download/{kind}/").status_code == 404


def test_a_length_bias_is_said(validated: MakeDataset, alice_client: Client) -> None:
    data = jsonl(*(record(n, chosen="long " * 30 + str(n)) for n in range(30)))
    assert "In 100% of the pairs the chosen answer is the longer one" in text_of(
        alice_client.get(validated(data).get_absolute_url())
    )


def test_the_number_of_queries_does_not_grow_with_the_list(
    alice: Any, alice_client: Client, django_assert_max_num_queries: Callable[..., Any]
) -> None:
    Dataset.objects.bulk_create(Dataset(owner=alice, name=f"set {n}", status="ready") for n in range(25))
    with django_assert_max_num_queries(6):
        alice_client.get("/datasets/")
