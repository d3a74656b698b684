"""Watch prompts: which, how they are answered, what is written, and the divergence estimated on the answers."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError

from tests.engine.conftest import NewRun, RunFolder
from tests.engine.interruptions import LeaveAt
from tests.engine.policies import bend, tiny_config, tiny_policy
from tests.tiny import build_tiny_pairs, tiny_pairs
from training.contract import ConfigError, ExitCode
from training.engine import watch
from training.engine.batch_answers import answer_prompts, draw_tokens
from training.engine.events import LoggedEvents
from training.engine.interrupts import Interrupts
from training.engine.policy import Placement, Policy, load_tokenizer
from training.engine.watch import Watch, WatchPrompt, answer_kl, read_watch_prompts

WATCHED: dict[str, Any] = {
    "watch_prompts": 3, "watch_max_new_tokens": 6, "pairs": 12, "eval_pairs": 8, "eval_steps": 2,
    "warmup_ratio": 0.0,
}  # fmt: skip


def lines(run: RunFolder, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "watch" / name).read_text().splitlines()]


# --- the answers ----------------------------------------------------------------------------------------


def naive_answer(policy: Any, prompt: list[int], steps: int) -> list[int]:
    """Greedy, one prompt, no cache, the model's own logits."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_batch_answers_as_each_prompt_alone(tiny_model: Path) -> None:
    config = tiny_config(tiny_model)
    policy = tiny_policy(config)
    prompts = [[1, 70, 80, 90, 100, 110], [1, 75], [1, 60, 61, 62, 63]]
    with policy.inference():
        expected = [naive_answer(policy, prompt, 8) for prompt in prompts]
        found = answer_prompts(
            policy.scorer.decoder, policy.head, prompts, placement=Placement.choose(config), seeds=[1, 2, 3],
            eos=frozenset(), temperature=0.0, max_new_tokens=8,
        )  # fmt: skip
        ended = answer_prompts(
            policy.scorer.decoder, policy.head, prompts, placement=Placement.choose(config), seeds=[1, 2, 3],
            eos=frozenset({expected[0][2]}), temperature=0.0, max_new_tokens=8,
        )  # fmt: skip
    assert [answer.ids for answer in found] == expected
    assert {answer.finish_reason for answer in found} == {"length"}
    until = expected[0].index(expected[0][2]) + 1
    assert (ended[0].ids, ended[0].finish_reason) == (expected[0][:until], "stop")
    assert ended[0].spoken == expected[0][: until - 1]


def test_a_prompt_draws_the_same_in_any_company(tiny_model: Path) -> None:
    config = tiny_config(tiny_model)
    policy = tiny_policy(config)

    def answered(prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        with policy.inference():
            found = answer_prompts(
                policy.scorer.decoder, policy.head, prompts, placement=Placement.choose(config), seeds=seeds,
                eos=frozenset(), temperature=1.0, max_new_tokens=8,
            )  # fmt: skip
        return [answer.ids for answer in found]

    alone = answered([[1, 70, 80]], [5])
    assert answered([[1, 60, 61, 62, 63], [1, 70, 80]], [9, 5])[1] == alone[0]
    assert answered([[1, 70, 80]], [6]) != alone


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -30.0]]).repeat(4000, 1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    counts = Counter(draw_tokens(logits, generators, 1.0).tolist())
    for token, share in enumerate(torch.softmax(logits[0], 0).tolist()):
        assert counts[token] / 4000 == pytest.approx(
            share, abs=4 * math.sqrt(share * (1 - share) / 4000) + 1e-9
        )
    hot = Counter(draw_tokens(logits, generators, 2.0).tolist())
    for token, share in enumerate(torch.softmax(logits[0] / 2, 0).tolist()):
        assert hot[token] / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000) + 1e-9)


# --- the sampled divergence -----------------------------------------------------------------------------


def test_both_estimates_are_unbiased_for_the_divergence_of_whole_answers() -> None:
    """Every answer over a vocabulary of 3 (0 ends it), at most 3 tokens: the mean is a finite sum."""
    draw = torch.Generator().manual_seed(3)

    def model() -> dict[tuple[int, ...], torch.Tensor]:
        contexts = [c for n in range(3) for c in itertools.product((1, 2), repeat=n)]
        return {c: torch.log_softmax(torch.randn(3, generator=draw).double(), 0) for c in contexts}

    policy, reference = model(), model()
    answers = [c for n in range(3) for c in itertools.product((1, 2), repeat=n)]
    answers = [(*c, 0) for c in answers] + list(itertools.product((1, 2), repeat=3))

    def logps(of: dict[tuple[int, ...], torch.Tensor], answer: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([of[answer[:i]][token] for i, token in enumerate(answer)])

    exact = k1_mean = k3_mean = k1_square = k3_square = total = 0.0
    for answer in answers:
        ours, theirs = logps(policy, answer), logps(reference, answer)
        share = float(ours.sum().exp())
        k1, k3 = answer_kl(ours, theirs)
        total += share
        exact += share * float(ours.sum() - theirs.sum())
        k1_mean, k3_mean = k1_mean + share * k1, k3_mean + share * k3
        k1_square, k3_square = k1_square + share * k1**2, k3_square + share * k3**2
        assert k3 >= 0
    assert total == pytest.approx(1)
    assert exact > 0.1
    assert k1_mean == pytest.approx(exact, rel=1e-12)
    assert k3_mean == pytest.approx(exact, rel=1e-12)
    assert k3_square - k3_mean**2 < k1_square - k1_mean**2, "k3 scatters less"


def watching(model: Path, folder: Path, prompts: list[WatchPrompt], **settings: Any) -> tuple[Watch, Policy]:
    config = tiny_config(model, watch_temperature=1.0, **settings)
    policy = tiny_policy(config)
    made = Watch(
        prompts, config=config, run_dir=folder, policy=policy, tokenizer=load_tokenizer(config),
        events=LoggedEvents(), with_reference=True,
    )  # fmt: skip
    return made, policy


def said(folder: Path, step: int) -> list[dict[str, Any]]:
    name = f"watch/step-{step:06d}.jsonl"
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_estimate_at_a_step_is_unbiased_for_the_divergence_there(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Many prompts of the same words: their draws must be of their own, and those of the policy."""
    words = [1, 70, 80, 90]
    prompts = [WatchPrompt(str(number), [], words) for number in range(60)]
    watch, policy = watching(tiny_model, tmp_path, prompts, watch_max_new_tokens=1)
    bend(policy, scale=0.3)
    watch.look(5, lambda: None)
    k1, k3 = (torch.tensor([line[name] for line in said(tmp_path, 5)]).double() for name in ("k1", "k3"))
    found = []
    for context in (policy.inference, policy.reference):
        with context():
            found.append(policy.model(torch.tensor([words])).logits[0, -1].double().log_softmax(-1))
    exact = float((found[0].exp() * (found[0] - found[1])).sum())
    assert exact > 0.05
    for values in (k1, k3):
        assert float(values.mean()) == pytest.approx(exact, abs=float(4 * values.std() / len(values) ** 0.5))


def test_only_the_weights_tell_the_answers_of_two_steps_apart(tiny_model: Path, tmp_path: Path) -> None:
    prompts = [WatchPrompt(name, [], [1, 70, 80]) for name in "ab"]
    answers = {}
    for seed in (0, 1):
        watch, policy = watching(tiny_model, tmp_path, prompts, watch_max_new_tokens=12, seed=seed)
        for step in (1, 2, 3):
            if step == 3:
                bend(policy, scale=2.0)
            watch.look(step, lambda: None)
            answers[seed, step] = [line["answer"] for line in said(tmp_path, step)]
    assert answers[0, 1] == answers[0, 2]
    assert answers[0, 3] != answers[0, 2]
    assert answers[1, 1] != answers[0, 1]
    assert len(set(answers[0, 1])) == 2, "each prompt has draws of its own"


# --- runs -----------------------------------------------------------------------------------------------


def test_a_run_watches_at_every_evaluation(new_run: NewRun) -> None:
    run = new_run(**WATCHED, max_steps=3)
    assert run.train() == 0
    names = ["reference.jsonl", *(f"step-{step:06d}.jsonl" for step in (0, 2, 3))]
    assert sorted(path.name for path in (run.path / "watch").iterdir()) == names
    reference, start, last = (lines(run, name) for name in (names[0], names[1], names[3]))
    assert [line["answer"] for line in reference] == [line["answer"] for line in start], (
        "it starts as its reference"
    )
    assert [line["id"] for line in start] == [line["id"] for line in last]
    assert len({json.dumps(line["prompt"]) for line in start}) == 3
    assert {line["model"] for line in start} == {"policy"} and {line["model"] for line in reference} == {
        "reference"
    }
    said = [event for event in run.events if event["type"] == "watch"]
    assert [(e["step"], e["model"], e["path"], e["num_prompts"]) for e in said] == [
        (0, "reference", "watch/reference.jsonl", 3), (0, "policy", "watch/step-000000.jsonl", 3),
        (2, "policy", "watch/step-000002.jsonl", 3), (3, "policy", "watch/step-000003.jsonl", 3),
    ]  # fmt: skip
    assert "watching" in {event["phase"] for event in run.events if event["type"] == "phase"}
    first, point = run.points("eval")[0], run.points("eval")[3]
    assert first["eval_kl_sampled"] == first["eval_kl_sampled_k1"] == 0.0
    assert point["eval_kl_sampled"] > 0
    tokens = sum(line["num_tokens"] + (line["finish_reason"] == "stop") for line in last)
    assert point["eval_kl_sampled"] == pytest.approx(sum(line["k3"] for line in last) / tokens)
    assert point["eval_watch/length"] == pytest.approx(sum(line["num_tokens"] for line in last) / 3)
    assert 0 < point["eval_watch/distinct_1"] <= 1
    assert run.result["metrics"]["eval_watch/refusals"] == 0.0


@pytest.mark.parametrize("elsewhere", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_continued_run_says_the_same_words(new_run: NewRun, elsewhere: bool) -> None:
    def words(of: RunFolder) -> dict[str, str]:
        return {path.name: path.read_text() for path in (of.path / "watch").iterdir()}

    undisturbed = new_run("undisturbed", **WATCHED, max_steps=3)
    assert undisturbed.train() == 0
    run = new_run("interrupted", **WATCHED, max_steps=3)
    assert run.train(LeaveAt(run, 2)) == ExitCode.INTERRUPTED
    if elsewhere:
        newest = run.path / "checkpoints/step-000002"
        run = new_run("again", resume_from=str(newest), **WATCHED, max_steps=3)
    assert run.train() == 0
    assert words(run) == words(undisturbed)
    assert run.result["adapter_sha256"] == undisturbed.result["adapter_sha256"]


def test_watching_changes_nothing_in_the_training(new_run: NewRun) -> None:
    watched, blind = new_run("watched", **WATCHED), new_run("blind", **(WATCHED | {"watch_prompts": 0}))
    assert watched.train() == 0
    assert blind.train() == 0
    assert watched.result["adapter_sha256"] == blind.result["adapter_sha256"]
    assert not (blind.path / "watch").exists()


def test_a_wish_to_leave_is_heard_between_two_tokens(new_run: NewRun) -> None:
    run = new_run(**WATCHED)

    class Leave(Interrupts):
        def check(self) -> None:
            watching = any(e["type"] == "phase" and e["phase"] == "watching" for e in run.events)
            self.terminated = watching
            super().check()

    assert run.train(Leave(run.path)) == ExitCode.INTERRUPTED
    assert not (run.path / "watch").exists(), "not even the first model had answered"


def test_own_prompts_are_taken_from_a_file_in_its_order_and_need_no_validation(
    new_run: NewRun, tmp_path: Path
) -> None:
    path = tmp_path / "watch.jsonl"
    prompts = [{"id": name, "prompt": [{"role": "user", "content": f"Say {name}."}]} for name in "cab"]
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    run = new_run(**(WATCHED | {"eval_pairs": 0}), watch_path=str(path), max_steps=2)
    assert run.train() == 0
    assert [line["id"] for line in lines(run, "step-000002.jsonl")] == ["c", "a", "b"]
    assert "best_step" not in run.result
    assert run.result["metrics"]["eval_watch/length"] > 0


def test_without_a_reference_nothing_is_said_about_the_distance_to_it(new_run: NewRun) -> None:
    run = new_run(**WATCHED, max_steps=1, method="orpo")
    assert run.train() == 0
    point = run.points("eval")[1]
    assert point["eval_kl_sampled"] is None
    assert point["eval_watch/distinct_2"] is not None
    assert not (run.path / "watch/reference.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("", "has no watch prompts"), ('{"prompt": "words"}\n', "is not a prompt"),
     (json.dumps({"prompt": [{"role": "user", "content": "x" * 2000}]}) + "\n", "and max_length is 1024")],
)  # fmt: skip
def test_a_file_of_prompts_that_cannot_be_used_is_refused(
    new_run: NewRun, tmp_path: Path, text: str, sentence: str
) -> None:
    path = tmp_path / "watch.jsonl"
    path.write_text(text)
    run = new_run(**WATCHED, watch_path=str(path))
    assert run.train() == ExitCode.REFUSED
    assert sentence in run.result["error"]
    assert run.result["next_step"]


def test_validation_prompts_are_distinct_and_chosen_by_their_digest(tiny_model: Path, tmp_path: Path) -> None:
    path = build_tiny_pairs(tmp_path / "eval.jsonl", 8)
    config = tiny_config(tiny_model, eval_path=str(path), watch_prompts=4)
    tokenizer = load_tokenizer(config)
    first = [prompt.id for prompt in read_watch_prompts(config, tokenizer)]
    turned = tiny_pairs(8)[3:] + tiny_pairs(8)[:3]
    turned += [{**pair, "id": "again"} for pair in turned]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in turned))
    assert [prompt.id for prompt in read_watch_prompts(config, tokenizer)] == first
    assert len(set(first)) == 4


def test_short_validation_prompts_are_watched_first_and_then_the_shortest(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny_pairs(tmp_path / "eval.jsonl", 8)
    config = tiny_config(tiny_model, eval_path=str(path), watch_prompts=8)
    tokenizer = load_tokenizer(config)
    lengths = {prompt.id: len(prompt.ids) for prompt in read_watch_prompts(config, tokenizer)}
    limit = sorted(lengths.values())[3]
    monkeypatch.setattr(watch, "PROMPT_TOKENS", limit)
    found = [prompt.id for prompt in read_watch_prompts(config, tokenizer)]
    short = [name for name in found if lengths[name] <= limit]
    assert found[: len(short)] == short
    rest = [lengths[name] for name in found[len(short) :]]
    assert rest == sorted(rest)
    assert set(found) == set(lengths)


@pytest.mark.parametrize(
    "settings", [{"watch_prompts": -1}, {"watch_max_new_tokens": 0}, {"watch_temperature": 3.0},
                 {"watch_prompts": 0, "watch_path": "/w"}],
)  # fmt: skip
def test_settings_of_watching_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="watch_"):
        tiny_config(Path(), **settings)


def test_a_validation_prompt_that_the_template_refuses_is_passed_over(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_model, eval_path=str(build_tiny_pairs(tmp_path / "eval.jsonl", 6)))
    tokenizer = load_tokenizer(config)
    first, *others = [prompt.id for prompt in read_watch_prompts(config, tokenizer)]
    refused = next(row["prompt"] for row in tiny_pairs(6) if row["id"] == first)
    real = tokenizer.apply_chat_template

    def picky(messages: Any, **settings: Any) -> Any:
        if messages == refused:
            raise TemplateError("no such role")
        return real(messages, **settings)

    monkeypatch.setattr(tokenizer, "apply_chat_template", picky)
    found = [prompt.id for prompt in read_watch_prompts(config, tokenizer)]
    assert first not in found
    assert found[: len(others)] == others


def test_a_model_that_cannot_generate_is_trained_without_being_watched(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_cache(*arguments: Any, **settings: Any) -> Any:
        raise NotImplementedError("no cache of keys and values")

    monkeypatch.setattr(watch, "answer_prompts", no_cache)
    run = new_run(max_steps=1, watch_prompts=2)
    assert run.train() == 0
    assert "Watch prompts are not answered: this model cannot generate here" in run.texts()
