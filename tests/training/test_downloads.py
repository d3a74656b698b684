"""Downloads through the real library and a real child process, from a stand-in Hub on loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from django.db import IntegrityError

from datasets_app import leases
from tests.training.hub_server import SHA, hub
from tests.training.model_folders import LLAMA_CONFIG, make_model_folder
from training.models import BaseModel
from training.services import base_models
from training.worker import downloads
from training.worker.hub_fetch import choose

Status = BaseModel.Status
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.slow]


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    folder = make_model_folder(tmp_path / "remote")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"x")
    return folder


def asked_for(alice: Any, name: str = "team/tiny") -> BaseModel:
    return BaseModel.objects.create(owner=alice, source=BaseModel.Source.HUB, name=name, status=Status.QUEUED)


def run(row: BaseModel, monkeypatch: pytest.MonkeyPatch, address: str) -> BaseModel:
    monkeypatch.setenv("HF_ENDPOINT", address)
    downloads.models_download(str(row.pk))
    row.refresh_from_db()
    return row


def test_a_model_is_downloaded_checked_and_becomes_ready(
    data_dir: Path, alice: Any, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(remote) as asked:
        row = run(asked_for(alice), monkeypatch, asked[0])
    assert (row.status, row.problem, row.revision) == (Status.READY, "", SHA)
    assert row.facts["linear_modules"][0] == "q_proj" and row.facts["licence"] == "apache-2.0"
    assert row.bytes_total > 0 and row.lease_until is None
    names = {path.name for path in Path(row.path).iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "README.md",
    }
    assert not list(Path(row.path).parent.glob("*.partial"))
    assert not any("evil" in path or "pytorch_model" in path or "onnx" in path for path in asked)


def test_a_model_that_needs_code_is_refused_before_its_weights_are_fetched(
    data_dir: Path, alice: Any, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (remote / "config.json").write_text(json.dumps({**LLAMA_CONFIG, "auto_map": {"AutoModel": "evil.M"}}))
    with hub(remote) as asked:
        row = run(asked_for(alice), monkeypatch, asked[0])
    assert row.status == Status.FAILED and "code to be run" in row.problem
    assert not any(path.endswith(".safetensors") for path in asked)


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, "RepoNotFound", "no model named team/tiny"),
        (403, "GatedRepo", "accepted its licence"),
        (404, "RepoNotFound", "no model named team/tiny"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(
    data_dir: Path,
    alice: Any,
    remote: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    error: str,
    words: str,
) -> None:
    with hub(remote, status=status, error=error) as asked:
        row = run(asked_for(alice), monkeypatch, asked[0])
    assert row.status == Status.FAILED and words in row.problem


def test_without_a_network_the_sentence_says_where_to_put_the_folder(
    data_dir: Path, alice: Any, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.MODEL_ROOTS = [Path("/srv/models")]
    row = run(asked_for(alice), monkeypatch, "http://127.0.0.1:9")
    assert row.status == Status.FAILED
    assert "cannot reach the Hub" in row.problem and "/srv/models" in row.problem
    settings.HUB_OFFLINE = True
    BaseModel.objects.update(status=Status.QUEUED)
    assert "cannot reach the Hub" in run(row, monkeypatch, "http://127.0.0.1:9").problem


def test_too_little_disk_is_said_before_the_weights_are_fetched(
    data_dir: Path, alice: Any, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "DISK_RESERVE", 2**60)
    with hub(remote) as asked:
        row = run(asked_for(alice), monkeypatch, asked[0])
    assert row.status == Status.FAILED and "Free some space" in row.problem


def test_a_doubled_message_and_a_late_one_do_nothing(
    data_dir: Path, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = asked_for(alice)
    epoch = leases.claim(BaseModel.objects.all(), row.pk, owner="other", ttl=downloads.TTL)
    assert downloads.download(row.pk) is False
    row.refresh_from_db()
    assert row.lease_owner == "other" and row.lease_epoch == epoch
    BaseModel.objects.update(status=Status.READY, lease_until=None)
    assert downloads.download(row.pk) is False


def test_a_fenced_download_changes_nothing(
    data_dir: Path, alice: Any, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker takes over while the child runs: this one stops and the row stays the other's."""
    row = asked_for(alice)

    def take_over(*_: Any) -> None:
        BaseModel.objects.filter(pk=row.pk).update(lease_epoch=99)

    monkeypatch.setattr(downloads, "_check_disk", take_over)
    with hub(remote) as asked:
        row = run(row, monkeypatch, asked[0])
    assert (row.status, row.lease_epoch, row.path) == (Status.DOWNLOADING, 99, "")
    assert not (data_dir / "base_models" / str(row.pk)).exists(), "what it had fetched is not put into place"


def test_a_download_that_keeps_breaking_off_is_given_up(data_dir: Path, alice: Any) -> None:
    row = asked_for(alice)
    BaseModel.objects.update(attempts=downloads.MAX_ATTEMPTS)
    assert downloads.download(row.pk) is False
    row.refresh_from_db()
    assert row.status == Status.FAILED and "retry" in row.problem
    assert base_models.base_model_download(row).status == Status.QUEUED


def test_only_weights_json_and_tokenizer_files_are_chosen() -> None:
    names = [
        "model-00001-of-00002.safetensors", "config.json", "modeling_x.py", "pytorch_model.bin",
            "tokenizer.json",
        "consolidated.safetensors", "original/consolidated.00.pth", "x/model.safetensors",
            "adapter_model.safetensors",
    ]  # fmt: skip
    assert choose(names) == ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"]


def test_the_token_is_passed_by_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("DATABASE_URL", "postgres://secret")
    env = downloads._environment()
    assert env["HF_TOKEN"] == "hf_secret" and "DATABASE_URL" not in env


def test_downloads_never_take_every_place_of_the_workers_that_prepare_data(
    data_dir: Path, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 60 GB takes hours; an upload must not wait for it, however many models are asked for."""
    under_way, second = asked_for(alice, "team/large"), asked_for(alice, "team/other")
    rows = BaseModel.objects.filter(status=Status.QUEUED)
    leases.claim(rows, under_way.pk, owner="elsewhere", ttl=downloads.TTL, status=Status.DOWNLOADING)
    monkeypatch.setattr(downloads, "_run", lambda row, epoch: pytest.fail("two at a time"))
    assert not downloads.download(second.pk)
    second.refresh_from_db()
    assert (second.status, second.attempts, second.lease_until) == (Status.QUEUED, 0, None)


def test_a_download_whose_worker_is_gone_holds_nobody_up(
    data_dir: Path, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, second = asked_for(alice, "team/lost"), asked_for(alice, "team/other")
    rows = BaseModel.objects.filter(status=Status.QUEUED)
    leases.claim(rows, lost.pk, owner="gone", ttl=-downloads.TTL, status=Status.DOWNLOADING)
    folder = Path(data_dir)
    monkeypatch.setattr(downloads, "_run", lambda row, epoch: ({}, folder, SHA))
    assert downloads.download(second.pk)


@pytest.mark.parametrize("source", [BaseModel.Source.HUB, BaseModel.Source.FOLDER])
def test_two_clicks_at_once_make_one_row(alice: Any, source: str) -> None:
    """Else the second row would make every later look-up of this model an error."""
    same = {"owner": alice, "source": source, "name": "team/tiny", "path": "/models/tiny"}
    BaseModel.objects.create(**same)
    with pytest.raises(IntegrityError):
        BaseModel.objects.create(**same)
