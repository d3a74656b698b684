"""The `generate` command: answers of a run's model and of its bare base to prompts, one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from training.engine.errors import RefusedError
from training.engine.finished import find_kept, greeting, load_config, load_kept
from training.engine.generation import Answer, FinishReason, GenerationError, Sampling, generate
from training.engine.order import mixed_seed
from training.engine.policy import Placement, Policy, load_policy, load_tokenizer
from training.engine.preflight import check_config
from training.engine.training_run import make_quiet_and_deterministic

Message = dict[str, str]
Prompt = str | Sequence[Message]
SIDES = ("tuned", "base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How answers are drawn; what cannot be is refused."""

    sides: tuple[str, ...] = ("tuned",)
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        known = bool(self.sides) and not set(self.sides) - set(SIDES)
        for fine, sentence, next_step in (
            (known, f"sides {self.sides!r} are not known.", "Use tuned, base or both."),
            (self.max_new_tokens >= 1, "max_new_tokens must be 1 or more.", "Raise it."),
            (0 <= self.temperature <= 10, "temperature must be from 0 to 10.", "0.7 is usual."),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1.", "1 cuts nothing."),
        ):
            if not fine:
                raise RefusedError(sentence, next_step)


class GeneratedAnswer(TypedDict):
    """One answer. `prompt` counts the prompts from 0; `seconds` are those of the model's passes."""

    prompt: int
    side: str
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_tokens: int
    seconds: float


def answer(
    run_dir: Path, prompts: Sequence[Prompt], settings: Settings, *, checkpoint: str = ""
) -> list[GeneratedAnswer]:
    """See `training.engine.generate`."""
    return list(answers(run_dir, prompts, settings, checkpoint=checkpoint))


def answers(
    run_dir: Path, prompts: Sequence[Prompt], settings: Settings, *, checkpoint: str = ""
) -> Iterator[GeneratedAnswer]:
    """The same, each as soon as it is complete."""
    if not prompts:
        raise RefusedError(
            "There is no prompt to answer.", "Give one with --prompt, or a file with --prompts."
        )
    config = load_config(run_dir)
    kept = find_kept(run_dir, checkpoint)
    check_config(config)
    make_quiet_and_deterministic()
    tokenizer = load_tokenizer(config)
    rendered = [_render(number, prompt, tokenizer) for number, prompt in enumerate(prompts)]
    placement, hello = Placement.choose(config), [greeting(tokenizer)]
    policy = load_kept(config, kept, placement, hello)
    # With an adapter the base is the same model without it; else it is one of its own.
    apart = config.finetuning_type == "full" and "base" in settings.sides
    base = load_policy(dataclasses.replace(config, adapter_path=""), placement, hello) if apart else policy
    for number, ids in enumerate(rendered):
        sampling = Sampling(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            seed=mixed_seed(settings.seed, "generate", number),
        )
        for side in settings.sides:
            yield _answer(base if side == "base" else policy, number, side, ids, tokenizer, sampling)


def read_prompts(path: Path) -> list[Prompt]:
    """JSON lines: a text, a list of messages, or an object with one of these as `prompt` (so pairs, too)."""
    found: list[Prompt] = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                value = json.loads(line)
                found.append(_prompt(value["prompt"] if isinstance(value, dict) else value, number))
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path} cannot be read: {error}.", "Name another file.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(
            f"A line of {path} is not a prompt ({type(error).__name__}: {error}).",
            'Write one JSON value a line: "text", [messages…] or {"prompt": …}.',
        ) from None
    return found


def _prompt(value: Any, number: int) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return value
    raise ValueError(f"line {number}")


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))


def _render(number: int, prompt: Prompt, tokenizer: Any) -> list[int]:
    from jinja2.exceptions import TemplateError

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, IndexError) as error:
        raise RefusedError(
            f"The model's chat template refused prompt {number + 1}: {error}",
            "Correct or leave out this prompt.",
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _answer(
    policy: Policy, number: int, side: str, ids: list[int], tokenizer: Any, sampling: Sampling
) -> GeneratedAnswer:
    with _side(policy, side):
        try:
            pieces = list(
                generate([Answer(side, policy.model, ids, tokenizer, sampling)], is_cancelled=lambda: False)
            )
        except GenerationError as error:
            raise RefusedError(f"Prompt {number + 1}: {error}") from error
    last = pieces[-1]
    assert last.finish_reason is not None  # noqa: S101 - the last piece of an answer says how it ended
    return {
        "prompt": number,
        "side": side,
        "text": "".join(piece.text for piece in pieces),
        "finish_reason": last.finish_reason,
        "num_prompt_tokens": last.num_prompt_tokens,
        "num_tokens": last.num_tokens,
        "seconds": last.seconds,
    }


@contextlib.contextmanager
def _side(policy: Policy, side: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(policy.inference())
        stack.enter_context(policy.scorer.placement.autocast())
        if side == "base" and hasattr(policy.model, "disable_adapter"):
            stack.enter_context(policy.model.disable_adapter())
        yield
