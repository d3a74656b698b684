"""The download: what is in the archive, what never is, and the card as the Hub reads it."""

from __future__ import annotations

import io
import json
import re
import tracemalloc
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.test import AsyncClient
from django.urls import reverse

from studio.my_models.archive import ArchiveError, files_of, zip_chunks
from tests.studio.made_models import make_base, make_model
from training.models import TrainedModel
from training.services.trained_models import model_card


async def download(user: Any, model: TrainedModel) -> Any:
    client = AsyncClient()
    await client.aforce_login(user)
    return await client.get(reverse("my_models:download", args=[model.pk]))


@pytest.mark.django_db(transaction=True)
async def test_the_archive_holds_adapter_tokenizer_and_card_and_nothing_else(
    alice: Any, data_dir: Path
) -> None:
    from asgiref.sync import sync_to_async

    model = await sync_to_async(make_model)(alice, name='Ärger & "Quotes"\u2028/../x')
    response = await download(alice, model)
    assert response.headers["Content-Disposition"] == 'attachment; filename="arger-quotesx.zip"'
    assert response.headers["Content-Type"] == "application/zip"
    body = b"".join([chunk async for chunk in response.streaming_content])
    archive = zipfile.ZipFile(io.BytesIO(body))
    assert archive.testzip() is None
    names = {name.removeprefix("arger-quotesx/") for name in archive.namelist()}
    assert names == {
        "README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    config = json.loads(archive.read("arger-quotesx/adapter_config.json"))
    assert config["base_model_name_or_path"] == "org/tiny-base"
    weights = archive.read("arger-quotesx/adapter_model.safetensors")
    assert weights == (model.folder / "adapter_model.safetensors").read_bytes()
    assert archive.read("arger-quotesx/README.md").decode() == await sync_to_async(model_card)(model)
    assert archive.getinfo("arger-quotesx/adapter_model.safetensors").compress_type == zipfile.ZIP_STORED


@pytest.mark.django_db(transaction=True)
async def test_a_model_without_files_sends_a_sentence_instead(alice: Any, data_dir: Path) -> None:
    from asgiref.sync import sync_to_async

    model = await sync_to_async(make_model)(alice)
    (model.folder / "adapter_model.safetensors").unlink()
    response = await download(alice, model)
    assert response.status_code == 302
    assert response.headers["Location"] == model.get_absolute_url()


def test_a_link_out_of_the_folder_is_never_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").symlink_to(secret)
    with pytest.raises(ArchiveError, match="adapter_model"):
        files_of(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"w")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(secret)
    assert "tokenizer.json" not in {path.name for path in files_of(folder)}


def test_a_tokenizer_that_is_not_beside_the_adapter_comes_from_the_base(tmp_path: Path) -> None:
    folder, base = tmp_path / "model", tmp_path / "base"
    for each in (folder, base):
        each.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"w")
    (base / "tokenizer_config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"the base's weights stay where they are")
    names = [path.name for path in files_of(folder, tokenizer_from=base)]
    assert names == ["adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json"]


def test_an_archive_of_any_size_needs_little_memory(tmp_path: Path) -> None:
    big = tmp_path / "adapter_model.safetensors"
    with big.open("wb") as file:
        file.truncate(200 * 1024 * 1024)
    tracemalloc.start()
    chunks = zip_chunks([big], prefix="m", readme="r", written=datetime(2026, 1, 1, tzinfo=UTC))
    total = sum(len(chunk) for chunk in chunks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 200 * 1024 * 1024
    assert peak < 8 * 1024 * 1024


# --- the card ---------------------------------------------------------------------------------------------
def parts(card: str) -> tuple[dict[str, Any], str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.django_db
def test_the_card_begins_with_what_the_hub_reads(alice: Any, data_dir: Path) -> None:
    from huggingface_hub import ModelCard

    card = model_card(make_model(alice))
    front, body = parts(card)
    assert front["base_model"] == "org/tiny-base"
    assert front["library_name"] == "peft"
    assert front["license"] == "apache-2.0"
    assert front["datasets"] == ["Example: brief"]
    assert {"dpo", "lora", "preference"} <= set(front["tags"])
    assert ModelCard(card).data.base_model == "org/tiny-base"
    for text in (
        "| DPO accuracy | – | 87.5% |",
        "| `beta` | 0.1 |",
        "`" + "ef" * 32,
        "torch 2.13.0",
        "12 of 12",
    ):
        assert text in body, text


@pytest.mark.django_db
def test_a_card_says_which_model_training_started_from(alice: Any, data_dir: Path) -> None:
    parent = make_model(alice, name="First")
    child = make_model(alice, name="Second", base=parent.base_model, parent=parent)
    assert "**First**" in model_card(child)
    assert "not the bare base" in model_card(child)
    orphan = make_model(alice, name="Third", parent_name="Gone one")
    assert "**Gone one**" in model_card(orphan)


@pytest.mark.django_db
@pytest.mark.parametrize(
    "name",
    [
        "a: b\n---\nlicense: mit",
        "<script>alert(1)</script>",
        "# heading | cell `code`",
        "🌊\u2028\x85x",
        "'\"{[*&!",
    ],
)
def test_no_name_can_change_the_card_around_it(name: str, alice: Any, data_dir: Path) -> None:
    model = make_model(alice, name=name, dataset_name=name, base=make_base(name=name))
    front, body = parts(model_card(model))
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == " ".join(name.split())
    assert front["datasets"] == [" ".join(name.split())]
    heading = body.strip().splitlines()[0]
    assert heading.startswith("# ")
    assert not re.search(r"(?<!\\)<script", body.split("```")[0])
