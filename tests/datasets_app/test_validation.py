"""The whole pass: every bad line is reported, every odd pair warned of, the figures are right."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_app import checks, findings, validation
from datasets_app.findings import Finding
from datasets_app.formats.pair import prompt_key
from datasets_app.lengths import estimate_tokens
from datasets_app.offsets import Offsets, read_lines
from datasets_app.validation import Validation
from tests.datasets_app.samples import codes, errors, jsonl, record, validate

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "x"}
REAL_DATA = Path(
    os.environ.get("STUDIO_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
)


def many(count: int) -> list[dict[str, object]]:
    return [record(number) for number in range(1, count + 1)]


def test_a_clean_file_has_no_findings_and_keeps_the_order() -> None:
    report, pairs, found = validate(jsonl(*many(120)))
    assert (report.num_pairs, report.num_errors, report.num_warnings, found) == (120, 0, 0, [])
    assert report.format == "prompt"
    assert [pair["id"] for pair in pairs[:2]] == ["line-1", "line-2"]
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": "Answer 1."}]


def test_the_hash_is_that_of_the_pairs_file() -> None:
    out = io.BytesIO()
    source = io.BytesIO(jsonl(*many(3)))
    report = Validation(source, pairs=out, issues=io.BytesIO(), progress=lambda lines, read: None).run()
    assert report.pairs_sha256 == sha256(out.getvalue()).hexdigest()


def test_every_bad_line_is_reported_with_line_field_found_and_expected() -> None:
    data = jsonl(record(1), record(2, chosen=5), record(3), record(4, rejected=..., prompt=""), record(5))
    report, pairs, found = validate(data + b"nonsense\n")
    assert errors(found) == [
        (2, "chosen", "not_text"),
        (4, "rejected", "missing_key"),
        (6, "(record)", "not_json"),
    ]
    assert (report.num_pairs, report.num_errors) == (3, 3)
    first = found[0]
    assert (first.found, first.expected, first.place) == ("the number 5", "text", "Line 2")
    assert all(finding.next_step for finding in found)
    assert len(pairs) == 3


def test_the_first_usable_line_fixes_the_format() -> None:
    other = {"messages": [USER, {"role": "assistant", "content": "a"}], "rejected_response": "b"}
    report, _, found = validate(jsonl({"x": 1}, record(1), other, {"y": 2}, record(2)))
    assert errors(found) == [
        (1, "(record)", "unknown_shape"),
        (3, "(record)", "other_shape"),
        (4, "(record)", "unknown_shape"),
    ]
    assert report.num_pairs == 2


ODD = {
    "prompt_ends_without_user": record(prompt=[USER, ANSWER]),
    "starts_with_assistant": record(prompt=[ANSWER, USER]),
    "system_not_first": record(prompt=[USER, ANSWER, {"role": "system", "content": "x"}, USER]),
    "roles_do_not_alternate": record(prompt=[USER, USER]),
    "repeats_prompt": record(prompt="a" * 30, chosen="a" * 30 + " b", rejected="a" * 30 + " c"),
    "nearly_identical": record(chosen="a b", rejected="a  b"),
    "very_long": record(chosen="word " * 40_000),
}


@pytest.mark.parametrize("code", ODD)
def test_an_odd_pair_is_kept_with_a_warning(code: str) -> None:
    report, _, found = validate(jsonl(ODD[code], *many(100)))
    assert [(f.line, f.level, f.code) for f in found] == [(1, "warning", code)]
    assert (report.num_pairs, report.num_errors, report.num_warnings) == (101, 0, 1)


def test_a_repeated_pair_names_the_line_it_repeats() -> None:
    _, _, found = validate(jsonl(*many(100), record(7)))
    assert [(f.line, f.code, f.found) for f in found] == [(101, "duplicate_pair", "the same pair as line 7")]


def test_a_pair_with_its_sides_swapped_is_a_contradiction() -> None:
    swapped = record(7, chosen=record(7)["rejected"], rejected=record(7)["chosen"])
    _, _, found = validate(jsonl(*many(100), swapped))
    assert [(f.line, f.code) for f in found] == [(101, "contradiction")]
    assert "line 7" in found[0].found


def test_unknown_keys_are_warned_of_once_with_their_count() -> None:
    _, _, found = validate(jsonl(*(record(number, score=1) for number in range(100)), record(200, note="x")))
    assert [(f.code, f.line, f.field) for f in found] == [
        ("unknown_key", 0, "score"),
        ("unknown_key", 0, "note"),
    ]
    assert "100 records" in found[0].found and "1 record" in found[1].found


@pytest.mark.parametrize(("count", "expected"), [(99, {"few_pairs"}), (100, set())])
def test_too_few_pairs_are_warned_of_and_not_refused(count: int, expected: set[str]) -> None:
    report, _, found = validate(jsonl(*many(count)))
    assert (codes(found), report.num_pairs) == (expected, count)


def test_too_many_pairs_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST", 110)
    assert codes(validate(jsonl(*many(110)))[2]) == set()
    assert codes(validate(jsonl(*many(111)))[2]) == {"many_pairs"}


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "empty_file"), (b"\n \n", "no_records"), (b"[]", "no_records"), (b"\x89PNG....", "not_text")],
)
def test_a_file_without_records_has_one_sentence_that_says_so(data: bytes, code: str) -> None:
    report, pairs, found = validate(data)
    assert (codes(found), pairs, report.num_pairs) == ({code}, [], 0)
    assert report.problem and report.num_errors == 1


def test_a_file_of_something_else_is_given_up_early() -> None:
    report, _, found = validate(b"just a line of prose\n" * 50_000)
    assert report.num_errors == validation.GIVE_UP_AFTER
    assert "first 1,000" in report.problem
    assert len(found) == validation.GIVE_UP_AFTER + 1


def test_a_broken_end_keeps_the_pairs_before_it() -> None:
    report, _, _ = validate(jsonl(*many(100))[:-20])
    assert (report.num_pairs, report.num_errors, report.problem) == (99, 1, "")


def test_text_of_any_kind_comes_through_unchanged() -> None:
    nasty = "<script>alert(1)</script> {{7*7}} ${x} \u2028 \x1b[31m \u202e \x00 😀"
    _, pairs, _ = validate(jsonl(record(1, prompt=nasty), *many(100)))
    assert pairs[0]["prompt"][0]["content"] == nasty


def test_the_figures_are_those_of_the_pairs() -> None:
    system = {"role": "system", "content": "s" * 40}
    turns = [system, USER, {"role": "assistant", "content": "x"}, {"role": "user", "content": "q" * 57}]
    data = jsonl(
        record(prompt=turns, chosen="c" * 100, rejected="r" * 60),
        record(prompt="q" * 40, chosen="c" * 20, rejected="r" * 60),
        record(prompt="q" * 40, chosen="d" * 60, rejected="r" * 60),
    )
    stats = validate(data)[0].stats
    assert (stats["num_prompts"], stats["num_multi_turn"], stats["num_system"]) == (2, 1, 1)
    assert (stats["num_chosen_longer"], stats["num_same_length"], stats["mean_length_difference"]) == (
        1,
        1,
        0.0,
    )
    assert stats["characters"] == {"prompt": 60.0, "chosen": 60.0, "rejected": 60.0}
    assert stats["tokens_estimate"]["rejected"] == 60 / 4 + 5
    assert stats["tokens_estimate"]["total_max"] == round((40 + 2 + 1 + 57) / 4 + 4 * 5 + 100 / 4 + 5)
    characters = stats["histograms"]["characters"]
    assert characters["edges"][:2] == [50, 100]
    assert characters["prompt"][:3] == [2, 0, 1]  # 100 characters belong to the range that begins at 100
    assert characters["chosen"][:3] == [1, 1, 1]
    assert all(sum(characters[part]) == 3 for part in ("prompt", "chosen", "rejected"))


def test_chinese_counts_more_tokens_a_character() -> None:
    assert estimate_tokens("a" * 12) == 3.0
    assert estimate_tokens("天" * 12) == 8.0


def test_progress_may_stop_the_pass() -> None:
    class Stop(Exception):
        pass

    def progress(lines: int, read: int) -> None:
        if lines == 5:
            raise Stop

    with pytest.raises(Stop):
        Validation(
            io.BytesIO(jsonl(*many(10))), pairs=io.BytesIO(), issues=io.BytesIO(), progress=progress
        ).run()


def test_memory_grows_by_hashes_only(tmp_path: Path) -> None:
    """Four thousand pairs of 5 kB are 20 MB of text; the pass must not hold them."""
    path = tmp_path / "big.jsonl"
    path.write_bytes(b"".join(jsonl(record(n, chosen=f"{n} " + "x" * 5000)) for n in range(4000)))
    out = [(tmp_path / name).open("wb") for name in ("pairs", "issues")]
    with path.open("rb") as source, out[0] as pairs, out[1] as issues:
        tracemalloc.start()
        report = Validation(source, pairs=pairs, issues=issues, progress=lambda lines, read: None).run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert report.num_pairs == 4000
    assert peak < 5 * 1024 * 1024


def test_the_findings_file_ends_with_a_word_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "MAX_KEPT", 3)
    report, _, found = validate(jsonl(record(0), *({"x": 1} for _ in range(10))))
    assert len(found) == 4
    assert found[-1].code == "too_many"
    assert report.num_errors == 10


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(0, 80), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_any_page_of_a_file_is_found_by_its_offsets(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], start: int, count: int
) -> None:
    path = tmp_path_factory.mktemp("offsets") / "lines"
    lines = [b"x" * size + b"\n" for size in sizes]
    path.write_bytes(b"".join(lines))
    offsets = Offsets(limit=4)
    for line in lines:
        offsets.add(len(line))
    stored = json.loads(json.dumps(offsets.to_json()))
    assert len(stored["at"]) <= 4
    assert list(read_lines(path, start=start, count=count, offsets=stored)) == lines[start : start + count]


def test_prompts_that_differ_in_white_space_only_are_the_same_prompt() -> None:
    def key(text: str, role: str = "user") -> bytes:
        return prompt_key([{"role": role, "content": text}])

    assert key("a  b\n") == key("a b")
    assert key("a b") != key("a c")
    assert key("a b") != key("a b", "system")


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("dpo_en_demo.json", "conversations", 298),
        ("dpo_zh_demo.json", "conversations", 300),
        ("v1_dpo_demo.jsonl", "chosen_messages", 10),
    ],
)
def test_files_people_really_have_convert_without_an_error(name: str, shape: str, count: int) -> None:
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here; set STUDIO_TEST_DATA to the folder that has it")
    report, pairs, found = validate(path)
    assert (report.format, report.num_pairs, report.num_errors) == (shape, count, 0)
    assert all(pair["chosen"][-1]["role"] == pair["rejected"][-1]["role"] == "assistant" for pair in pairs)
    assert {f.code for f in found} <= {"duplicate_pair", "few_pairs", "unknown_key", "roles_do_not_alternate"}


def test_rated_single_answers_are_refused_with_what_to_do() -> None:
    path = REAL_DATA / "kto_en_demo.json"
    if not path.exists():
        pytest.skip("kto_en_demo.json is not here; set STUDIO_TEST_DATA to the folder that has it")
    report, _, found = validate(path)
    assert (report.num_pairs, report.num_errors, codes(found)) == (0, 300, {"unknown_shape"})
    assert "thumbs" in found[0].next_step


def test_a_finding_survives_its_file() -> None:
    finding = Finding(level="error", code="x", line=3, item=1, field="“f”", found="\u2028", next_step="n")
    assert Finding.from_json(finding.to_json()) == finding
