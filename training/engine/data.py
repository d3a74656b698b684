"""Pairs as token ids: reading, the chat template, cutting by `cutting.py`'s rule. Knows no model.

An example for SFT is a pair without its rejected side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from training.engine.cutting import STUMP_TOKENS, WHOLE_RULE, CutRule, DataReport, Ids, cut_sides
from training.engine.errors import RefusedError
from training.engine.pair_form import is_blank, pair_of_line

RENDER_BATCH = 64  # pairs handed to the tokenizer at once

Sides = tuple[Literal["chosen", "rejected"], ...]
BOTH_SIDES: Sides = ("chosen", "rejected")
CHOSEN_SIDE: Sides = ("chosen",)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class TokenizedPair:
    """One prompt and its two completions. The prompt is never empty: its last token predicts their first.

    An SFT example has an empty `rejected`, for which nothing is computed.
    """

    id: str
    prompt: Ids
    chosen: Ids
    rejected: Ids
    truncated: bool = False  # cut to max_length

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt, chosen and rejected, each counted once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.chosen) + len(self.rejected)

    def digest(self) -> bytes:
        """SHA-256 of what the model sees: the three id sequences and where each ends."""
        lengths = np.array([len(self.prompt), len(self.chosen), len(self.rejected)], dtype=np.int32)
        parts = (lengths, self.prompt, self.chosen, self.rejected)
        return hashlib.sha256(b"".join(part.astype("<i4").tobytes() for part in parts)).digest()


def noun_of(sides: Sides) -> str:
    return "pair" if sides == BOTH_SIDES else "example"


def read_pairs(path: Path, *, sides: Sides = BOTH_SIDES) -> list[dict[str, Any]]:
    """The canonical pairs of a file, one JSON object a line; each must have these sides."""
    pairs = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    pairs.append(pair_of_line(line, path, number, sides))
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path} cannot be read: {error}.", "Prepare the dataset again.") from None
    return pairs


def tokenize_pairs(
    pairs: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    rule: CutRule = WHOLE_RULE,
    sides: Sides = BOTH_SIDES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[TokenizedPair], DataReport]:
    """Render with the chat template, tokenise, cut. A completion is what the template adds to the prompt.

    `max_length`: tokens of a prompt with one answer.
    """
    report = DataReport(noun=noun_of(sides), rule=rule, read=len(pairs))
    each = 1 + len(sides)  # texts of a pair
    kept: list[TokenizedPair] = []
    for start in range(0, len(pairs), RENDER_BATCH):
        rendered = []
        for pair in pairs[start : start + RENDER_BATCH]:
            texts = _render(pair, tokenizer, report, sides)
            if texts is not None:
                rendered.append((str(pair["id"]), texts))
        flat = [text for _, texts in rendered for text in texts]
        ids = tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else []
        for index, (name, _) in enumerate(rendered):
            whole = _split_completions(name, *ids[each * index : each * (index + 1)])
            cut = cut_pair(whole, max_length=max_length, rule=rule, bos=tokenizer.bos_token_id)
            bounded = cut_pair(whole, max_length=sys.maxsize, rule=rule, bos=tokenizer.bos_token_id)
            _judge_length(cut, bounded, report, sides)
            if _keep(cut, whole, report, sides):
                assert cut is not None  # noqa: S101 - what is kept is there
                kept.append(cut)
        progress(min(start + RENDER_BATCH, len(pairs)), len(pairs))
    return kept, report


def _render(pair: dict[str, Any], tokenizer: Any, report: DataReport, sides: Sides) -> list[str] | None:
    """Texts of the prompt and of the prompt with each side; None for an empty answer, or if the template refuses."""
    from jinja2.exceptions import TemplateError

    if any(is_blank(pair[side]) for side in sides):
        report.empty_answer += 1
        return None

    def render(messages: list[dict[str, str]], *, generation: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))

    try:
        return [
            render(pair["prompt"], generation=True),
            *(render(pair["prompt"] + pair[side], generation=False) for side in sides),
        ]
    except (TemplateError, IndexError) as error:
        report.refused_by_template += 1
        report.template_message = report.template_message or str(error)
        return None


def _split_completions(name: str, prompt: list[int], *with_completion: list[int]) -> TokenizedPair:
    """Where a tokenizer merges across the border, the prompt ends at the last token that all of them share."""
    start = np.array(prompt, dtype=np.int32)
    wholes = [np.array(sequence, dtype=np.int32) for sequence in with_completion]
    shared = min(_common_prefix(start, whole) for whole in wholes)
    chosen, *rest = [whole[shared:] for whole in wholes]
    rejected = rest[0] if rest else np.array([], dtype=np.int32)
    return TokenizedPair(name, start[:shared], chosen, rejected)


def _common_prefix(left: Ids, right: Ids) -> int:
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length


def cut_pair(
    pair: TokenizedPair, *, max_length: int, rule: CutRule = WHOLE_RULE, bos: int | None = None
) -> TokenizedPair | None:
    """The pair itself where it fits, else what the rule leaves of it; None where the rule drops it."""
    longest = max(len(pair.chosen), len(pair.rejected))
    if rule.fits(len(pair.prompt), longest, max_length):
        return pair
    if rule.mode == "drop":
        return None
    prompt, (chosen, rejected) = cut_sides(
        pair.prompt, [pair.chosen, pair.rejected], max_length=max_length, rule=rule, bos=bos
    )
    return TokenizedPair(pair.id, prompt, chosen, rejected, truncated=True)


def _keep(cut: TokenizedPair | None, whole: TokenizedPair, report: DataReport, sides: Sides) -> bool:
    """Whether the pair is used; counts what happened to it, and why."""
    if _is_empty(whole, sides):
        report.empty += 1
    elif _is_identical(whole, sides):
        report.identical += 1
    else:
        return _survives(cut, whole, report, sides)
    return False


def _survives(cut: TokenizedPair | None, whole: TokenizedPair, report: DataReport, sides: Sides) -> bool:
    """The same of a pair that was fit to be used before it was cut."""
    if cut is None:
        report.over_long += 1
    elif _is_empty(cut, sides):
        report.became_empty += 1
    elif _is_identical(cut, sides):
        report.became_identical += 1
    else:
        prompt_cut = len(cut.prompt) < len(whole.prompt)
        completion_cut = cut.num_completion_tokens < whole.num_completion_tokens
        report.truncated += prompt_cut or completion_cut
        report.prompts_cut += prompt_cut
        report.completions_cut += completion_cut
        return True
    return False


def _judge_length(
    cut: TokenizedPair | None, bounded: TokenizedPair | None, report: DataReport, sides: Sides
) -> None:
    """Count what max_length itself did to a pair. `bounded`: with the parts' own bounds only, None where they drop it.

    A pair that those bounds, or its own text, make useless is no reason for another max_length.
    """
    if bounded is None or _is_empty(bounded, sides) or _is_identical(bounded, sides):
        return
    report.lengths.append(len(bounded.prompt) + max(len(bounded.chosen), len(bounded.rejected)))
    if cut is None or _is_empty(cut, sides):
        return
    report.left += 1
    report.stumps += _is_stump(cut, bounded, sides)


def _is_stump(cut: TokenizedPair, bounded: TokenizedPair, sides: Sides) -> bool:
    """Whether max_length left next to nothing of the prompt or an answer, or the same answers."""
    return _is_identical(cut, sides) or any(
        len(getattr(cut, name)) < min(len(getattr(bounded, name)), STUMP_TOKENS)
        for name in ("prompt", *sides)
    )


def _is_empty(pair: TokenizedPair, sides: Sides) -> bool:
    return not (len(pair.prompt) and all(len(getattr(pair, side)) for side in sides))


def _is_identical(pair: TokenizedPair, sides: Sides) -> bool:
    return sides == BOTH_SIDES and np.array_equal(pair.chosen, pair.rejected)


def data_sha256(pairs: Sequence[TokenizedPair]) -> str:
    """One hash over the tokenised pairs in their order."""
    total = hashlib.sha256()
    for pair in pairs:
        total.update(pair.digest())
    return total.hexdigest()


def within_budget(pairs: Iterable[TokenizedPair], *, budget: int) -> Iterator[list[TokenizedPair]]:
    """The pairs in their order, cut where the next one would pass `budget` tokens; never an empty list."""
    batch: list[TokenizedPair] = []
    used = 0
    for pair in pairs:
        if batch and used + pair.num_tokens > budget:
            yield batch
            batch, used = [], 0
        batch.append(pair)
        used += pair.num_tokens
    if batch:
        yield batch


def length_sorted_batches(pairs: Iterable[TokenizedPair], *, budget: int) -> Iterator[list[TokenizedPair]]:
    """For passes without gradient: longest first, so that memory peaks at once."""
    by_length = sorted(pairs, key=lambda pair: pair.num_tokens, reverse=True)
    return within_budget(by_length, budget=budget)
