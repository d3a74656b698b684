"""The reader of events.jsonl: however the bytes arrive, the same events come out, once."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.worker.tail import MAX_LINE, Line, LineBuffer, TailReader, parse

numbers = st.integers(0, 10**6)
events = st.one_of(
    st.builds(
        lambda step, split, loss: {
            "type": "metrics",
            "time": 1.0,
            "split": split,
            "step": step,
            "values": {"loss": loss},
        },
        numbers,
        st.sampled_from(["train", "eval"]),
        st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    ),
    st.builds(lambda text: {"type": "log", "time": 1.0, "level": "info", "text": text}, st.text()),
    st.builds(lambda n: {"type": "phase", "phase": "training", "done": n, "total": 9, "unit": ""}, numbers),
)  # fmt: skip
garbage = st.one_of(
    st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b" ")),
    st.sampled_from(
        [b"{", b"[]", b"null", b'{"type": "nothing"}', b'{"type": "metrics"}', b'{"type": []}', b"\xff"]
    ),
)


def in_pieces(raw: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    return [raw[a:b] for a, b in pairwise(edges)]


@given(
    lines=st.lists(st.one_of(events, garbage), max_size=12),
    torn=st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b" ")),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
)
def test_any_chunking_gives_the_same_events(lines: list[Any], torn: bytes, cuts: list[int]) -> None:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    raw = b"".join(line + b"\n" for line in encoded) + torn
    buffer = LineBuffer()
    found: list[Line] = []
    for piece in in_pieces(raw, cuts):
        assert buffer.read_from + len(piece) <= len(raw)
        found += buffer.feed(piece)
    assert [line.event for line in found if line.event] == [line for line in lines if isinstance(line, dict)]
    assert len(found) == len(lines), "what is no event is a line all the same"
    assert buffer.position == len(raw) - len(torn), "a torn last line is not read"
    for line, original in zip(found, encoded, strict=True):
        assert raw[line.offset :].startswith(original), "each line knows where it begins"


@given(before=st.lists(events, max_size=6), after=st.lists(events, max_size=6), torn=st.integers(0, 40))
def test_a_reader_that_starts_again_at_its_offset_misses_nothing(
    before: list[Any], after: list[Any], torn: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("tail") / "events.jsonl"
    first = b"".join(json.dumps(event).encode() + b"\n" for event in before)
    second = b"".join(json.dumps(event).encode() + b"\n" for event in after)
    path.write_bytes(first + second[:torn])
    reader = TailReader(path)
    found = [line.event for line in reader.read()]
    path.write_bytes(first + second)
    found += [line.event for line in TailReader(path, reader.offset).read()]
    assert found == [*before, *after]


def test_a_file_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    reader = TailReader(tmp_path / "events.jsonl")
    assert reader.read() == [] and reader.offset == 0


def test_a_long_file_is_read_in_bounded_pieces(tmp_path: Path) -> None:
    line = json.dumps({"type": "log", "time": 1.0, "level": "info", "text": "x" * 1000}).encode() + b"\n"
    path = tmp_path / "events.jsonl"
    path.write_bytes(line * 2000)
    reader = TailReader(path)
    pieces = []
    while piece := reader.read():
        pieces.append(len(piece))
    assert sum(pieces) == 2000 and max(pieces) < 400


def test_a_line_longer_than_a_chunk_arrives_whole(tmp_path: Path) -> None:
    event = {"type": "log", "time": 1.0, "level": "info", "text": "y" * 700_000}
    path = tmp_path / "events.jsonl"
    path.write_bytes(json.dumps(event).encode() + b"\n")
    reader = TailReader(path)
    found: list[Line] = []
    for _ in range(5):
        found += reader.read()
    assert [line.event for line in found] == [event]


def test_what_could_harm_the_page_or_the_disk_is_no_event() -> None:
    def metrics(**change: Any) -> bytes:
        return json.dumps(
            {"type": "metrics", "time": 1.0, "split": "train", "step": 1, "values": {}} | change
        ).encode()

    assert parse(metrics()) is not None
    bad: list[dict[str, Any]] = [
        {"step": -1}, {"step": True}, {"step": 1.5}, {"step": 2**40}, {"split": "test"}, {"values": []},
        {"time": float("nan")},
    ]  # fmt: skip
    assert [parse(metrics(**change)) for change in bad] == [None] * len(bad)
    for path in ("/etc/passwd", "../../other/checkpoints/step-000001"):
        event = {"type": "checkpoint", "time": 1.0, "step": 1, "path": path}
        assert parse(json.dumps(event).encode()) is None
    assert parse(b'{"type": "log", "level": "info", "text": "' + b"x" * MAX_LINE + b'"}') is None
    assert parse(b"[" * 100_000) is None


@pytest.mark.parametrize("time", [None, "now", True, [1]])
def test_a_sentence_without_a_time_is_no_event(time: Any) -> None:
    said = {"type": "log", "time": 1.0, "level": "info", "text": "hello"}
    assert parse(json.dumps(said).encode()) is not None
    assert parse(json.dumps(said | {"time": time}).encode()) is None


def test_watch_prompts_that_were_answered_are_an_event_with_a_path_in_the_run() -> None:
    said = {
        "type": "watch",
        "time": 1.0,
        "step": 4,
        "model": "policy",
        "path": "watch/a.jsonl",
        "num_prompts": 4,
    }
    assert parse(json.dumps(said).encode()) is not None
    for wrong in ("/etc/passwd", "../x", None):
        assert parse(json.dumps(said | {"path": wrong}).encode()) is None
