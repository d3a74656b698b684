"""The split by prompt: nothing lost, nothing on both sides, the same every time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_app.splitting import SplitSummary, count_split, split_by_prompt


def write_pairs(folder: Path, prompts: list[int]) -> Path:
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            pair = {
                "id": f"line-{number}",
                "prompt": [{"role": "user", "content": f"Question {prompt}" + " " * (number % 3)}],
                "chosen": [{"role": "assistant", "content": str(number)}],
                "rejected": [{"role": "assistant", "content": "no"}],
            }
            file.write(json.dumps(pair) + "\n")
    return path


def split(folder: Path, path: Path, share: float, seed: int) -> tuple[SplitSummary, list[str], list[str]]:
    train, evaluation = folder / "train.jsonl", folder / "eval.jsonl"
    summary = split_by_prompt(path, share=share, seed=seed, train_path=train, eval_path=evaluation)
    return summary, train.read_text().splitlines(), evaluation.read_text().splitlines()


def prompts_of(lines: list[str]) -> set[str]:
    return {json.loads(line)["prompt"][0]["content"].strip() for line in lines}


@given(
    prompts=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    share=st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.5, 0.9, 0.99]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_a_split_by_prompt_keeps_every_promise(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[int], share: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    path = write_pairs(folder, prompts)
    summary, train, evaluation = split(folder, path, share, seed)
    sizes = Counter(prompts)

    assert not prompts_of(train) & prompts_of(evaluation)
    assert sorted(train + evaluation) == sorted(path.read_text().splitlines())
    assert (
        (summary.num_train, summary.num_eval)
        == (len(train), len(evaluation))
        == count_split(path, share, seed)
    )
    assert summary.num_train_prompts + summary.num_eval_prompts == len(sizes)
    assert train, "training is never left without a pair"
    order = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    for side in (train, evaluation):
        ids = [json.loads(line)["id"] for line in side]
        assert ids == sorted(ids, key=order.index)

    target = round(share * len(prompts))
    if share == 0 or len(sizes) < 2:
        assert not evaluation
        return
    assert evaluation
    assert len(evaluation) <= max(target, min(sizes.values()))
    if summary.num_train_prompts > 1 and len(evaluation) <= target:
        smallest_left = min(sizes[int(text.split()[1])] for text in prompts_of(train))
        assert target - len(evaluation) < smallest_left  # no further prompt would have fitted


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, list(range(200)))
    first = split(tmp_path, path, 0.1, 42)
    assert split(tmp_path, path, 0.1, 42) == first
    assert split(tmp_path, path, 0.1, 43)[2] != first[2]
    assert len(first[2]) == 20


def test_a_pair_added_elsewhere_does_not_shuffle_the_validation_side(tmp_path: Path) -> None:
    before = prompts_of(split(tmp_path, write_pairs(tmp_path, list(range(200))), 0.1, 42)[2])
    after = prompts_of(split(tmp_path, write_pairs(tmp_path, list(range(204))), 0.1, 42)[2])
    assert len(before & after) >= 18


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_makes_no_sense_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        count_split(write_pairs(tmp_path, [1, 2]), share, 0)


def test_a_half_written_split_never_carries_the_final_name(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, [1, 2, 3])
    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(ValueError):
        split(tmp_path, path, 0.5, 0)
    assert not (tmp_path / "train.jsonl").exists()
