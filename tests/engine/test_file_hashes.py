"""Gigabytes are read once, beside the start of a run, and never believed after a change."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import NewRun
from training.engine import file_hashes, session
from training.engine.file_hashes import begin_hashing, known_sha256


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 1000, 4096])
def test_a_file_larger_than_a_read_has_its_own_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(file_hashes, "READ_BYTES", 1000)
    expected = written(tmp_path / "weights", bytes(number % 251 for number in range(size)))
    assert known_sha256(tmp_path / "weights") == expected


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for content in (b"one", b"other"):
        expected = written(path, content)
        assert known_sha256(path) == expected


def test_who_asks_while_it_is_read_waits_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads, began, go = tmp_path / "weights", [], threading.Event(), threading.Event()
    expected = written(path, b"many bytes")

    def slowly(path: Path) -> str:
        reads.append(path)
        began.set()
        assert go.wait(10)
        return expected

    monkeypatch.setattr(file_hashes, "_sha256", slowly)
    begin_hashing([tmp_path / "gone", path])
    assert began.wait(10)
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(known_sha256(path)))
    asking.start()
    asking.join(0.05)
    assert not found
    go.set()
    asking.join(10)
    assert found == [expected] and reads == [path]


def test_two_that_ask_at_once_read_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads = tmp_path / "weights", []
    expected = written(path, b"many bytes")
    together = threading.Barrier(8)
    made = file_hashes._Hash.__init__

    def making(self: Any, path: Path, size: int, mtime_ns: int) -> None:
        time.sleep(0.05)  # long enough for all to look while the first is made
        made(self, path, size, mtime_ns)

    def ask() -> None:
        together.wait(10)
        assert known_sha256(path) == expected

    monkeypatch.setattr(file_hashes._Hash, "__init__", making)
    monkeypatch.setattr(file_hashes, "_sha256", lambda path: reads.append(path) or expected)
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert reads == [path]


def test_a_run_begins_with_the_hash_of_its_base_before_torch_is_imported(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(max_steps=1)
    order: list[str] = []
    importing, reading, hashing = session._import_training, file_hashes._sha256, session.begin_hashing

    def begins(paths: list[Path]) -> None:
        order.extend(["hashes", *(path.name for path in paths)])
        hashing(paths)

    def reads(path: Path) -> str:
        order.append(f"reads {path.name}")
        return reading(path)

    def imports() -> Any:
        order.append("imports")
        return importing()

    monkeypatch.setattr(session, "begin_hashing", begins)
    monkeypatch.setattr(session, "_import_training", imports)
    monkeypatch.setattr(file_hashes, "_sha256", reads)
    file_hashes._hash_of.cache_clear()  # of tests before this one
    assert run.train() == 0
    assert [entry for entry in order if not entry.startswith("reads")] == [
        "hashes", "model.safetensors", "imports",
    ]  # fmt: skip
    assert order.count("reads model.safetensors") == 1
