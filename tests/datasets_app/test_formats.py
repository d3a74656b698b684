"""Every shape of record becomes the same canonical pair; what cannot says which field and why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_app.formats import FORMATS, detect, unknown_shape
from datasets_app.formats.pair import Pair, Record

USER = {"role": "user", "content": "What is 1+1?"}
GOOD = {"role": "assistant", "content": "2"}
BAD = {"role": "assistant", "content": "I don't know"}
SYSTEM = {"role": "system", "content": "Be kind."}


def convert(value: dict[str, Any]) -> tuple[Pair | None, list[tuple[str, str]]]:
    shape = detect(value)
    assert shape is not None
    record = Record(value)
    pair = shape.read(record)
    return pair, [(problem.field, problem.code) for problem in record.problems]


def sides(pair: Pair | None) -> tuple[Any, Any, Any]:
    assert pair is not None
    return pair["prompt"], pair["chosen"], pair["rejected"]


@pytest.mark.parametrize("key", FORMATS)
def test_the_example_of_a_format_is_detected_as_it_and_converts(key: str) -> None:
    value = json.loads(FORMATS[key].example)
    assert detect(value) is FORMATS[key]
    pair, problems = convert(value)
    assert not problems
    assert pair is not None and pair["prompt"] and pair["chosen"] != pair["rejected"]


SAME_PAIR: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, GOOD], "rejected_response": "I don't know"},
    "preferred output": {
        "input": {"messages": [USER]},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "preferred output as objects": {
        "input": {"messages": [USER]},
        "preferred_output": GOOD,
        "non_preferred_output": BAD,
    },
    "strings": {"prompt": USER["content"], "chosen": "2", "rejected": "I don't know"},
    "prompt as messages": {"prompt": [USER], "chosen": "2", "rejected": "I don't know"},
    "lists": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "lists that repeat the prompt": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "one list repeats the prompt": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]},
    "text prompt repeated in lists": {
        "prompt": USER["content"],
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    },
    "no prompt key": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": USER["content"]}],
        "chosen": {"from": "gpt", "value": "2"},
        "rejected": {"from": "gpt", "value": "I don't know"},
    },
    "two conversations": {"chosen_messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
    "typed parts": {
        "chosen_messages": [
            {
                "role": "user",
                "content": [{"type": "text", "value": "What is "}, {"type": "text", "text": "1+1?"}],
            },
            GOOD,
        ],
        "rejected_messages": [USER, BAD],
    },
}


@pytest.mark.parametrize("name", SAME_PAIR)
def test_every_way_to_write_a_pair_gives_the_same_pair(name: str) -> None:
    assert convert(SAME_PAIR[name]) == (
        {"id": "", "prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        [],
    )


def test_only_the_last_answer_of_a_longer_conversation_is_compared() -> None:
    pair, _ = convert({"messages": [SYSTEM, USER, GOOD, USER, GOOD], "rejected_response": "no"})
    assert sides(pair)[0] == [SYSTEM, USER, GOOD, USER]
    assert sides(pair)[1] == [GOOD]


def test_trajectories_are_compared_from_where_they_part() -> None:
    """The hotel example: both sides repeat the prompt, share one more user turn, then differ."""
    prompt = [USER, GOOD]
    more = {"role": "user", "content": "In Paris please"}
    pair, problems = convert(
        {"prompt": prompt, "chosen": [*prompt, more, GOOD], "rejected": [*prompt, more, BAD]}
    )
    assert not problems
    assert sides(pair) == ([*prompt, more], [GOOD], [BAD])


def test_trajectories_that_part_at_once_keep_all_their_turns() -> None:
    more = {"role": "user", "content": "And now?"}
    pair, problems = convert({"prompt": [USER], "chosen": [GOOD, more, GOOD], "rejected": [BAD, USER, BAD]})
    assert not problems
    assert sides(pair) == ([USER], [GOOD, more, GOOD], [BAD, USER, BAD])


def test_a_system_message_only_the_lists_have_belongs_to_the_prompt() -> None:
    pair, problems = convert(
        {"prompt": USER["content"], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    )
    assert not problems
    assert sides(pair) == ([SYSTEM, USER], [GOOD], [BAD])


@pytest.mark.parametrize("shape", ["strings", "sharegpt"])
def test_a_system_column_comes_first(shape: str) -> None:
    pair, _ = convert({**SAME_PAIR[shape], "system": "Be kind."})
    assert sides(pair)[0] == [SYSTEM, USER]


OTHER = {"role": "user", "content": "other"}
NULL_CALL = {"role": "assistant", "content": None, "tool_calls": []}
IMAGE = {"role": "user", "content": [{"type": "image_url"}]}


def prompt_shape(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def messages_shape(messages: Any, rejected: Any = "no") -> dict[str, Any]:
    return {"messages": messages, "rejected_response": rejected}


def output_shape(given: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"input": given, "preferred_output": chosen, "non_preferred_output": rejected}


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    (prompt_shape("q", "a", 7), ["rejected not_text"]),
    (prompt_shape(1, 2, None), ["prompt not_text", "chosen not_text", "rejected not_text"]),
    (prompt_shape("q", "a", "a"), ["rejected identical_answers"]),
    (prompt_shape("q", " ", "b"), ["chosen empty_answer"]),
    (prompt_shape(" ", "a", "b"), ["prompt empty_prompt"]),
    ({"chosen": "a", "rejected": "b"}, ["prompt missing_key"]),
    (prompt_shape([], "a", "b"), ["prompt not_messages"]),
    (prompt_shape([USER], [OTHER, GOOD], [BAD]), ["chosen differing_prompts"]),
    (prompt_shape([USER], [USER], [USER, BAD]), ["chosen empty_answer"]),
    (prompt_shape([USER], [GOOD, USER], [BAD]), ["chosen answer_not_by_assistant"]),
    ({"chosen": [USER, GOOD], "rejected": [USER]}, ["rejected answer_not_by_assistant"]),
    (
        {"chosen": [USER, GOOD], "rejected": [OTHER, BAD]},
        ["chosen differing_prompts", "rejected differing_prompts"],
    ),
    (messages_shape([GOOD, USER]), ["messages[1].role answer_not_by_assistant"]),
    (messages_shape([{"role": "boss", "content": "x"}, GOOD]), ["messages[0].role unknown_role"]),
    (messages_shape(["hi", GOOD], ["no"]), ["messages[0] not_a_message", "rejected_response not_text"]),
    (messages_shape([USER, NULL_CALL]), ["messages[1] tool_call"]),
    (messages_shape([IMAGE, GOOD]), ["messages[0].content[0] not_text"]),
    (output_shape({}, [GOOD], [BAD]), ["input no_messages"]),
    (output_shape({"messages": [USER]}, [GOOD, GOOD], [BAD]), ["preferred_output not_one_answer"]),
    (output_shape({"messages": [USER]}, [USER], [BAD]), ["preferred_output answer_not_by_assistant"]),
    (prompt_shape("\ud800", "a", "b"), ["prompt broken_character"]),
]


@pytest.mark.parametrize(("value", "expected"), WRONG)
def test_everything_wrong_with_a_record_is_named_with_its_field(
    value: dict[str, Any], expected: list[str]
) -> None:
    pair, problems = convert(value)
    assert pair is None
    assert [f"{field} {code}" for field, code in problems] == expected


def test_a_record_with_a_million_mistakes_gives_a_bounded_answer() -> None:
    _, problems = convert({"messages": [1] * 100_000, "rejected_response": "no"})
    assert len(problems) == 20


def test_an_unknown_shape_names_the_missing_key_of_the_nearest_one() -> None:
    problem = unknown_shape({"messages": [USER, GOOD], "rejected_answer": "no"})
    assert "`rejected_response`" in problem.next_step
    assert "rejected_answer" in problem.found


def test_single_rated_answers_are_recognised_as_such() -> None:
    assert "thumbs" in unknown_shape({"messages": [USER, GOOD], "label": True}).next_step


def test_unknown_keys_are_noted_wherever_they_stand() -> None:
    value = {"messages": [{**USER, "weight": 0}, GOOD], "rejected_response": "no", "source": "x", "id": 7}
    record = Record(value)
    FORMATS["messages"].read(record)
    assert record.unknown == {"source", "messages[].weight"}


KEYS = sorted({key for shape in FORMATS.values() for key in (*shape.required, *shape.optional)})
TEXTS = st.sampled_from(["", " ", "q", "a", "b", "\ud800"])
ROLE_NAMES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "boss", 7])
MESSAGES = st.fixed_dictionaries(
    {}, optional={"role": ROLE_NAMES, "content": TEXTS, "from": ROLE_NAMES, "value": TEXTS, "x": st.none()}
)
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | MESSAGES,
    lambda inner: (
        st.lists(MESSAGES | inner, max_size=4)
        | st.fixed_dictionaries({}, optional={"messages": inner, "text": inner})
    ),
    max_leaves=6,
)


@given(st.sampled_from(sorted(FORMATS)), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
@settings(max_examples=600, deadline=None)
def test_any_record_is_either_a_pair_or_says_what_is_wrong(key: str, value: dict[str, Any]) -> None:
    """Whatever stands where: no exception, no silent loss, and a pair keeps the promises of the canonical form."""
    record = Record(value)
    pair = FORMATS[key].read(record)
    assert (pair is None) == bool(record.problems)
    if pair is not None:
        assert pair["prompt"] and pair["chosen"] != pair["rejected"]
        for side in (pair["chosen"], pair["rejected"]):
            assert side[0]["role"] == side[-1]["role"] == "assistant"
        json.dumps(pair, ensure_ascii=False).encode()
