"""The watch prompts: the same few prompts answered at every evaluation, and what the answers tell.

Answers are sampled at `watch_temperature` (0: the likeliest token); a prompt's draws are a function of
(seed, id): a resumed run says the same, and the same noise at every step and for the reference leaves only
the weights to tell two answers apart (common random numbers). At temperature 1 they are samples of the policy
at each step, and the divergence from the reference is estimated on them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from training.contract import WATCH_DIR, Metric, RunConfig
from training.engine.batch_answers import BatchAnswer, answer_prompts
from training.engine.data import TokenizedPair, read_pairs
from training.engine.diversity import distinct, mean_length, refusal_share, repetition, self_bleu
from training.engine.errors import RefusedError
from training.engine.events import EventLog
from training.engine.generation import context_length, eos_tokens
from training.engine.logps import token_logps
from training.engine.order import mixed_seed
from training.engine.policy import Policy
from training.engine.step_files import step_path, write_durably
from training.watch_time import WATCH_ROWS

# Short validation prompts are watched where there are enough: measured on a CPU with the starter model, four of them
# with 32 tokens each cost a few per cent of the steps between two evaluations. Else the shortest of the first ones.
PROMPT_TOKENS, FIRST_PROMPTS = 128, 64
REFERENCE_FILE = "reference.jsonl"
Values = dict[str, float | None]


@dataclass(frozen=True)
class WatchPrompt:
    id: str
    messages: list[dict[str, str]]
    ids: list[int]


def read_watch_prompts(config: RunConfig, tokenizer: Any) -> list[WatchPrompt]:
    """Those of `watch_path`, else distinct short prompts of the validation pairs, those whose digests sort first."""
    if not config.watch_prompts:
        return []
    found = _of_file(config, tokenizer) if config.watch_path else _of_validation(config, tokenizer)
    chosen = []
    for prompt in found:
        chosen.append(prompt)
        if len(chosen) == config.watch_prompts:
            break
    return chosen


def _of_file(config: RunConfig, tokenizer: Any) -> Iterator[WatchPrompt]:
    path = Path(config.watch_path)
    prompts = read_pairs(path, sides=())
    if not prompts:
        raise RefusedError(
            f"{path} has no watch prompts.", "Write one prompt a line, or leave watch_path empty."
        )
    for prompt in prompts:
        made = _tokenized(prompt, tokenizer)
        if len(made.ids) > config.max_length:
            raise RefusedError(
                f"The watch prompt {made.id} has {len(made.ids)} tokens, and max_length is {config.max_length}.",
                "Shorten it, or raise max_context_length.",
            )
        yield made


def _of_validation(config: RunConfig, tokenizer: Any) -> Iterator[WatchPrompt]:
    if not config.eval_path:
        return
    pairs = read_pairs(Path(config.eval_path), sides=())
    distinct_prompts = {_digest(pair["prompt"]): pair for pair in reversed(pairs)}
    longer = []
    for number, (_, pair) in enumerate(sorted(distinct_prompts.items())):
        try:
            prompt = _tokenized(pair, tokenizer)
        except RefusedError:  # counted and said where the pairs are read
            continue
        if len(prompt.ids) <= min(PROMPT_TOKENS, config.max_length):
            yield prompt
        elif number < FIRST_PROMPTS and len(prompt.ids) <= config.max_length:
            longer.append(prompt)
    yield from sorted(longer, key=lambda prompt: len(prompt.ids))


def _digest(messages: list[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _tokenized(pair: dict[str, Any], tokenizer: Any) -> WatchPrompt:
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
    except (TemplateError, IndexError) as error:
        raise RefusedError(
            f"The model's chat template refuses the watch prompt {pair['id']} ({error}).",
            "Change the prompt.",
        ) from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return WatchPrompt(str(pair["id"]), pair["prompt"], [int(token) for token in ids])


def prepare_watch(
    prompts: Sequence[WatchPrompt],
    config: RunConfig,
    run_dir: Path,
    policy: Policy,
    tokenizer: Any,
    events: EventLog,
    *,
    with_reference: bool,
) -> Watch | None:
    """None when nothing is to be watched. Says why, where that was not asked for."""
    if not prompts:
        return None
    if policy.scorer.placement.world.lockstep:
        events.log("Watch prompts are not answered while the model is divided between devices.", "warning")
        return None
    longest = context_length(policy.model) - 1
    prompts = [prompt for prompt in prompts if len(prompt.ids) <= longest]
    if not prompts:
        events.log("No watch prompt leaves room for an answer in this model's context.", "warning")
        return None
    reason = _cannot_answer(policy, prompts[0], eos_tokens(policy.model, tokenizer))
    if reason:
        events.log(f"Watch prompts are not answered: this model cannot generate here ({reason}).", "warning")
        return None
    return Watch(
        prompts,
        config=config,
        run_dir=run_dir,
        policy=policy,
        tokenizer=tokenizer,
        events=events,
        with_reference=with_reference,
    )


def _cannot_answer(policy: Policy, prompt: WatchPrompt, eos: frozenset[int]) -> str:
    """Why generating fails with this model, by trying two tokens; training must not end for that."""
    try:
        with policy.inference():
            answer_prompts(
                policy.scorer.decoder, policy.head, [prompt.ids],
                placement=policy.scorer.placement, seeds=[0], eos=eos, temperature=1.0, max_new_tokens=2,
            )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Watch:
    """Answers the prompts, writes `watch/step-000040.jsonl`, and gives the metrics."""

    def __init__(
        self,
        prompts: Sequence[WatchPrompt],
        *,
        config: RunConfig,
        run_dir: Path,
        policy: Policy,
        tokenizer: Any,
        events: EventLog,
        with_reference: bool,
    ) -> None:
        self.prompts = list(prompts)
        self._config, self._policy, self._tokenizer, self._events = config, policy, tokenizer, events
        self._run_dir, self._folder = run_dir, run_dir / WATCH_DIR
        self._with_reference = with_reference
        self._eos = eos_tokens(policy.model, tokenizer)

    def look(self, step: int, check: Callable[[], None]) -> Values:
        """Answer now; `check` may raise to leave. The reference answers once."""
        reference = self._folder / REFERENCE_FILE
        if self._with_reference and not reference.exists():
            with self._policy.reference():
                answers = self._answers(check)
            self._write(reference, 0, "reference", answers, {})
        with self._policy.inference():
            answers = self._answers(check)
        divergences = self._divergences(answers, check)
        self._write(step_path(self._folder, step, ".jsonl"), step, "policy", answers, divergences)
        return self._values(answers, divergences)

    def _answers(self, check: Callable[[], None]) -> list[BatchAnswer]:
        placement = self._policy.scorer.placement
        rows = WATCH_ROWS[placement.device.type]
        answers: list[BatchAnswer] = []
        room = context_length(self._policy.model) - max(len(prompt.ids) for prompt in self.prompts)

        def still_here() -> None:
            self._events.phase("watching", done=len(answers), total=len(self.prompts), unit="prompts")
            check()

        for start in range(0, len(self.prompts), rows):
            prompts = self.prompts[start : start + rows]
            answers += answer_prompts(
                self._policy.scorer.decoder,
                self._policy.head,
                [prompt.ids for prompt in prompts],
                placement=placement,
                seeds=[mixed_seed(self._config.seed, "watch", prompt.id) for prompt in prompts],
                eos=self._eos,
                temperature=self._config.watch_temperature,
                max_new_tokens=max(1, min(self._config.watch_max_new_tokens, room)),
                check=still_here,
            )
        return answers

    def _divergences(
        self, answers: Sequence[BatchAnswer], check: Callable[[], None]
    ) -> dict[str, list[float]]:
        """k1 and k3 of each answer, summed over its tokens; empty where answers are no samples of the policy."""
        if not self._with_reference or self._config.watch_temperature != 1.0:
            return {}
        found: dict[str, list[float]] = {"k1": [], "k3": []}
        nothing = np.array([], dtype=np.int32)
        for prompt, answer in zip(self.prompts, answers, strict=True):
            check()
            ids = np.array(prompt.ids, dtype=np.int32), np.array(answer.ids, dtype=np.int32)
            pair = TokenizedPair(prompt.id, *ids, nothing)
            k1, k3 = answer_kl(*(self._logps(pair, reference=one) for one in (False, True)))
            found["k1"].append(k1)
            found["k3"].append(k3)
        return found

    def _logps(self, pair: TokenizedPair, *, reference: bool) -> torch.Tensor:
        with self._policy.reference() if reference else self._policy.inference():
            states = self._policy.scorer([pair])
            return token_logps(states.hidden, states.labels, self._policy.head)

    def _values(self, answers: Sequence[BatchAnswer], divergences: dict[str, list[float]]) -> Values:
        spoken = [answer.spoken for answer in answers]
        tokens = sum(len(answer.ids) for answer in answers)
        values: Values = {
            Metric.WATCH_LENGTH: mean_length(spoken),
            Metric.WATCH_DISTINCT_1: distinct(spoken, 1),
            Metric.WATCH_DISTINCT_2: distinct(spoken, 2),
            Metric.WATCH_SELF_BLEU: self_bleu(spoken),
            Metric.WATCH_REPETITION: repetition(spoken),
            Metric.WATCH_REFUSALS: refusal_share([self._text(answer) for answer in answers]),
        }
        for key, name in ((Metric.KL_SAMPLED, "k3"), (Metric.KL_SAMPLED_K1, "k1")):
            values[key] = sum(divergences[name]) / tokens if divergences else None
        return values

    def _text(self, answer: BatchAnswer) -> str:
        return str(self._tokenizer.decode(answer.spoken, skip_special_tokens=True))

    def _write(
        self,
        path: Path,
        step: int,
        model: Literal["policy", "reference"],
        answers: Sequence[BatchAnswer],
        divergences: dict[str, list[float]],
    ) -> None:
        lines = []
        for index, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True)):
            line = {
                "id": prompt.id,
                "step": step,
                "model": model,
                "prompt": prompt.messages,
                "answer": self._text(answer),
                "num_tokens": len(answer.spoken),
                "finish_reason": answer.finish_reason,
            }
            line |= {name: values[index] for name, values in divergences.items()}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_durably(path, "".join(lines).encode())
        self._events.watch(step, model, str(path.relative_to(self._run_dir)), len(lines))


def answer_kl(policy: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Estimates of KL(policy || reference) from one answer drawn from the policy: log-probabilities [T] twice.

    With w = ref / pi at each token: k1 = sum -log w, k3 = sum (w - 1) - log w (Schulman 2020, "Approximating
    KL divergence"). Both are unbiased for the divergence between the distributions of whole answers, because
    the mean of either at a token, given those before it, is the divergence there; k3 is never below 0 and
    scatters far less.
    """
    log_ratio = (policy - reference).double()
    k3 = torch.expm1(-log_ratio) + log_ratio
    return float(log_ratio.sum()), float(k3.sum())
