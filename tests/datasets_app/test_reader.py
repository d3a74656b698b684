"""Bytes to records: every odd file is read or refused with a sentence, and no bytes raise anything else."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zipfile
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from datasets_app.formats import array, reader, strict_json
from datasets_app.formats.encodings import FileRefused, Utf8Stream
from datasets_app.formats.reader import Reader
from tests.datasets_app.samples import jsonl, record


def read(data: bytes) -> list[tuple[int, Any]]:
    """Line number, and the value or the code of the problem."""
    return [
        (line.number, line.problem.code if line.problem else line.value) for line in Reader(io.BytesIO(data))
    ]


def refused(data: bytes) -> str:
    with pytest.raises(FileRefused) as caught:
        list(Reader(io.BytesIO(data)))
    assert caught.value.found.endswith(".") and caught.value.next_step.endswith(".")
    return caught.value.code


def test_lines_are_counted_and_blank_ones_left_out() -> None:
    assert read(b'{"a": 1}\n\n  \n{"a": 2}\n') == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_line_ends_and_a_missing_last_one_make_no_difference(end: bytes) -> None:
    assert read(b'{"a": 1}\r\n{"a": 2}' + end) == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_byte_order_mark_is_not_part_of_the_first_record() -> None:
    assert read(codecs.BOM_UTF8 + b'{"a": 1}\n') == [(1, {"a": 1})]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_with_a_mark_is_read(encoding: str) -> None:
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    text = (
        jsonl(record(1, chosen="天気 😀"), record(2)).decode() * 3000
    )  # many chunks, characters cut between them
    lines = read(marks.get(encoding, b"") + text.encode(encoding))
    assert len(lines) == 6000
    assert lines[0][1]["chosen"] == "天気 😀"


def test_what_was_converted_is_noted() -> None:
    source = Reader(io.BytesIO(gzip.compress(jsonl(record()).decode().encode("utf-16"))))
    assert len(list(source)) == 1
    assert [note.split()[3] for note in source.notes] == ["packed", "encoded"]


ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as _archive:
    _archive.writestr("a.jsonl", "{}")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(b"", "empty_file", id="empty"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + b"x" * 100, "not_text", id="PNG"),
        pytest.param(ZIP.getvalue(), "not_text", id="zip"),
        pytest.param(b"PAR1" + b"x" * 100, "not_text", id="parquet"),
        pytest.param(b"%PDF-1.7 ...", "not_text", id="PDF"),
        pytest.param('{"a": 1}'.encode("utf-16-le"), "not_text", id="UTF-16 without a mark"),
        pytest.param('{"a": 1}'.encode("utf-32"), "utf32", id="UTF-32"),
        pytest.param(codecs.BOM_UTF16_LE + b"\x00\xd8\x00\x00", "broken_utf16", id="half a surrogate"),
        pytest.param(gzip.compress(b'{"a": 1}\n' * 100)[:-20], "broken_gzip", id="gzip cut off"),
        pytest.param(gzip.compress(gzip.compress(b"{}")), "nested_archive", id="gzip of a gzip"),
        pytest.param(gzip.compress(b"\x89PNG"), "not_text", id="gzip of a PNG"),
        pytest.param(b'{\n  "prompt": "x"\n}\n', "pretty_printed", id="pretty-printed JSON"),
    ],
)
def test_a_file_that_is_no_dataset_is_refused_with_a_sentence(data: bytes, code: str) -> None:
    assert refused(data) == code


def test_a_gzip_bomb_is_stopped_by_its_ratio() -> None:
    bomb = gzip.compress(b" " * 64 * 1024 * 1024, 9)
    assert len(bomb) < 100_000
    assert refused(bomb) == "gzip_too_large"


def test_a_gzip_of_any_ratio_is_stopped_at_the_size_limit() -> None:
    data = gzip.compress(jsonl(*(record(number) for number in range(5000))))
    with pytest.raises(FileRefused):
        list(Reader(io.BytesIO(data), max_bytes=50_000))


BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"a": NaN}', "not_a_number"),
    (b'{"a": -Infinity}', "not_a_number"),
    (b'{"a": 1e999}', "bad_number"),
    (b'{"a": ' + b"9" * 5000 + b"}", "bad_number"),
    (b'{"a": 1, "a": 2}', "duplicate_key"),
    (b'{"a": {"b": 1, "b": 2}}', "duplicate_key"),
    (b"[" * 100_000 + b"]" * 100_000, "too_deep"),
    (b'{"a":' * 70 + b"1" + b"}" * 70, "too_deep"),
    (b'{"a": "\xff"}', "not_utf8"),
    (b'{"a": 1} {"a": 2}', "extra_data"),
    (b'{"a": "cut off', "truncated"),
    (b'{"a": 1', "truncated"),
    (b"prompt,chosen,rejected", "not_json"),
    (b"{'a': 1}", "not_json"),
    (b"<html>", "not_json"),
    (b'"text"', "not_an_object"),
    (b"12", "not_an_object"),
    (b"null", "not_an_object"),
]


@pytest.mark.parametrize(("line", "code"), BAD_LINES)
def test_a_bad_line_is_an_error_with_its_number_and_the_next_is_read(line: bytes, code: str) -> None:
    assert read(b'{"ok": 1}\n' + line + b'\n{"ok": 2}\n') == [(1, {"ok": 1}), (2, code), (3, {"ok": 2})]


def test_brackets_in_texts_are_not_depth() -> None:
    text = "[{" * 200 + '\\"'
    assert read(jsonl({"a": text})) == [(1, {"a": text})]


def test_a_line_of_ten_megabytes_is_an_error_and_the_next_is_read() -> None:
    long = b'{"prompt": "' + b"x" * 10 * 1024 * 1024 + b'"}'
    lines = list(Reader(io.BytesIO(b'{"a": 1}\n' + long + b'\n{"a": 2}')))
    assert [line.number for line in lines] == [1, 2, 3]
    assert lines[1].problem and "10.0 MB" in lines[1].problem.found
    assert lines[2].value == {"a": 2}


def test_a_truncated_last_line_is_one_error() -> None:
    assert read(jsonl(record(1), record(2))[:-10])[-1] == (2, "truncated")


# --- one JSON array -----------------------------------------------------------------------------------
def test_an_array_is_read_record_by_record_with_lines_and_numbers() -> None:
    text = json.dumps([record(1), record(2), record(3)], indent=2).encode()
    lines = list(Reader(io.BytesIO(b"\n " + text)))
    assert [(line.number, line.item) for line in lines] == [(3, 1), (8, 2), (13, 3)]
    assert [line.value for line in lines] == [record(1), record(2), record(3)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"[]", []),
        (b'[{"a": 1},]', [{"a": 1}]),
        (b'[{"a": 1}, "x,]", {"b": "]}"}]', [{"a": 1}, "not_an_object", {"b": "]}"}]),
        (b'[7, {"a": 1}]', ["not_an_object", {"a": 1}]),
        (b'[{"a": 1}, {"b": "cut', [{"a": 1}, "truncated"]),
        (b'[{"a": 1}', [{"a": 1}, "truncated"]),
        (b'[{"a": 1}] {"b": 2}', [{"a": 1}, {"b": 2}]),
        (b'[{"a": "\\\\\\""}, {"b": 2}]', [{"a": '\\"'}, {"b": 2}]),
        (b'[{"a": NaN}, {"b": 2}]', ["not_a_number", {"b": 2}]),
    ],
)
def test_arrays_good_and_bad(text: bytes, expected: list[Any]) -> None:
    assert [value for _, value in read(text)] == expected


@given(
    values=st.lists(
        st.recursive(
            st.text(max_size=8) | st.integers() | st.none(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
            ),
            max_leaves=8,
        ),
        max_size=6,
    ),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
@settings(max_examples=150, deadline=None)
def test_an_array_is_cut_into_what_json_would_read(
    values: list[Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    """However the bytes arrive: the cutter agrees with the parser of the standard library."""
    raw = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    cutter = array._Cutter(1 << 20)
    found = [e for at in range(0, len(raw), chunk) for e in cutter.feed(raw[at : at + chunk])]
    found += cutter.take()
    assert [json.loads(e.raw.decode("utf-8", "surrogatepass")) for e in found if e.raw is not None] == values
    assert cutter.closed


def test_a_record_of_an_array_that_is_too_long_is_left_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 1000)
    text = json.dumps([record(1), record(2, chosen="x" * 5000), record(3)]).encode()
    assert [value if isinstance(value, str) else 0 for _, value in read(text)] == [0, "too_long", 0]


# --- no bytes raise anything else ------------------------------------------------------------------------
JSON_BYTES = st.lists(
    st.sampled_from(
        [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\n", b"\r", b"\\ud800", b"1e9", b"NaN"]
    )
    | st.binary(max_size=6)
    | st.just(b'{"prompt":"q","chosen":"a","rejected":"b"}'),
    max_size=30,
).map(b"".join)
HEADS = st.sampled_from(
    [b"", b"[", b"{", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"\x1f\x8b\x08"]
)


@given(head=HEADS, body=JSON_BYTES, packed=st.booleans())
@example(head=b"", body=b"\xff\xfe", packed=False)
@example(head=b"\x1f\x8b\x08", body=b"", packed=False)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_bytes_make_the_reader_raise_anything_but_its_own_error(
    head: bytes, body: bytes, packed: bool
) -> None:
    data = gzip.compress(head + body, 1) if packed else head + body
    try:
        for line in Reader(io.BytesIO(data)):
            assert (line.value is None) == (line.problem is not None)
    except FileRefused as error:
        assert error.found and error.next_step


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_line_makes_the_parser_raise_anything_but_its_own_error(line: bytes) -> None:
    try:
        strict_json.loads(line)
    except strict_json.BadJson as error:
        assert error.found and error.next_step


def test_the_position_is_the_one_in_the_file_as_it_came() -> None:
    data = gzip.compress(jsonl(*(record(number) for number in range(2000))))
    source = io.BytesIO(data)
    stream = Utf8Stream(source, max_bytes=10**9)
    assert b"".join(iter(lambda: stream.read(1000), b"")).count(b"\n") == 2000
    assert stream.consumed() == len(data)
