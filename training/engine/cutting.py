"""The rule for over-long pairs: what of a pair is read, and how that is counted. Knows token ids only.

`max_length` bounds one side: the prompt with one answer. `max_prompt_length` and `max_completion_length` bound
the parts first, where they are set: a prompt loses its start, an answer its end. What is still too long is cut by
the mode (`truncation_mode`):

- `keep_end` (default): the prompt loses tokens from its start, down to an eighth of `max_length`, then the answers
  lose their ends;
- `keep_start`: the answers lose their ends; a pair whose prompt leaves no room for an answer is dropped;
- `drop`: nothing is cut, neither by the parts' bounds nor by `max_length`: an over-long pair is dropped.

Both sides always keep the same prompt, a leading BOS token stays, and the prompt's last token, which predicts the
answers, too. A pair whose answers are the same after cutting, or one of whose answers is empty, is dropped. Nothing is
cut or dropped without being counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from training.contract import DataCounts, RunConfig

Ids = npt.NDArray[np.int32]
Mode = Literal["keep_end", "keep_start", "drop"]
PROMPT_SHARE = 8  # keep_end: a cut prompt keeps at least max_length / PROMPT_SHARE tokens
# Below so many tokens a cut answer is its opening ("Sure, I"), which says nothing of why it was preferred, and a cut
# prompt not even the template's own words before the answer: nothing of the question is left.
STUMP_TOKENS = 4
# More stumps than other pairs: nothing is left to compare. Rarer ones are a tail, which a warning is enough for.
STUMP_SHARE = 0.5
# Long tails are cut on purpose; from a quarter on it is the data's body, and probably nobody meant it.
NOTABLE_SHARE = 0.25
# A length for all pairs would be set by the one longest, and memory grows with it.
WHOLE_SHARE = 0.95


@dataclasses.dataclass(frozen=True)
class CutRule:
    """Bounds of the parts in tokens, 0 = none, and the mode."""

    max_prompt_length: int = 0
    max_completion_length: int = 0
    mode: Mode = "keep_end"

    @classmethod
    def of(cls, config: RunConfig) -> CutRule:
        mode: Mode = config.truncation_mode  # type: ignore[assignment]  # checked by RunConfig
        return cls(config.max_prompt_length, config.max_completion_length, mode)

    def fits(self, prompt: int, longest: int, max_length: int) -> bool:
        return (
            prompt + longest <= max_length
            and prompt <= (self.max_prompt_length or prompt)
            and longest <= (self.max_completion_length or longest)
        )

    def sentence(self) -> str:
        parts = {
            "keep_end": "the start of the prompt first, then the ends of the answers",
            "keep_start": "the ends of the answers",
            "drop": "",
        }
        return parts[self.mode]


WHOLE_RULE = CutRule()


def cut_sides(
    prompt: Ids,
    completions: list[Ids],
    *,
    max_length: int,
    rule: CutRule = WHOLE_RULE,
    bos: int | None = None,
) -> tuple[Ids, list[Ids]]:
    """The parts [P], [[C], …] of a pair that does not fit, by the module's rule; a part may come back empty.

    Of the mode `drop` only the question `CutRule.fits` matters: it never comes here.
    """
    if rule.max_prompt_length:
        prompt = _without_start(prompt, rule.max_prompt_length, bos)
    if rule.max_completion_length:
        completions = [ids[: rule.max_completion_length] for ids in completions]
    longest = max(len(ids) for ids in completions)
    if len(prompt) + longest <= max_length:
        return prompt, completions
    if rule.mode == "keep_end":
        floor = max(1, min(len(prompt), max_length // PROMPT_SHARE))
        room = min(len(prompt), max(floor, max_length - longest))
        prompt = _without_start(prompt, room, bos)
    rest = max(0, max_length - len(prompt))
    return prompt, [ids[:rest] for ids in completions]


def _without_start(prompt: Ids, room: int, bos: int | None) -> Ids:
    """The last `room` tokens; a BOS token that begins the prompt, and is nowhere else in it, stays."""
    if len(prompt) <= room:
        return prompt
    cut = prompt[len(prompt) - room :]
    begins = bos is not None and prompt[:1].tolist() == [bos] and np.count_nonzero(prompt == bos) == 1
    return np.concatenate([prompt[:1], cut[1:]]) if begins and room > 1 else cut


@dataclasses.dataclass
class DataReport:
    """What happened to the pairs of one file. Every pair that was read is kept, or dropped for one reason."""

    noun: str = "pair"
    rule: CutRule = WHOLE_RULE
    read: int = 0
    truncated: int = 0  # kept, and shorter than they were
    prompts_cut: int = 0  # of these, the prompt; both counts may hold the same pair
    completions_cut: int = 0  # of these, an answer
    identical: int = 0  # dropped: the answers were the same from the start
    became_identical: int = 0  # dropped: the answers were the same after cutting
    empty_answer: int = 0  # dropped: an answer says nothing, so that only its end would be learnt
    empty: int = 0  # dropped: a side had no tokens
    became_empty: int = 0  # dropped: the prompt left no room for the answer
    over_long: int = 0  # dropped: the mode is drop
    refused_by_template: int = 0
    template_message: str = ""
    # For the judgement of max_length: only pairs that are fit to be learnt from once the parts' own bounds are kept,
    # for no other is helped by a longer one.
    lengths: list[int] = dataclasses.field(default_factory=list)  # of each, before max_length cut it
    left: int = 0  # of these, what max_length did not leave without an answer or drop whole
    # Of these, cut by it to fewer than STUMP_TOKENS of prompt or answer, or to the same answers.
    stumps: int = 0

    def too_long(self, max_length: int) -> int:
        """Pairs that max_length itself cuts or drops."""
        return sum(length > max_length for length in self.lengths)

    @property
    def is_mostly_stumps(self) -> bool:
        """Whether cutting to max_length left nothing to compare in most of the pairs that it left at all."""
        return self.stumps > STUMP_SHARE * self.left

    def is_notably_cut(self, max_length: int) -> bool:
        return self.too_long(max_length) > NOTABLE_SHARE * self.read

    def enough_tokens(self) -> int:
        """The least tokens for a prompt with one answer that leave WHOLE_SHARE of the pairs whole."""
        return sorted(self.lengths)[math.ceil(WHOLE_SHARE * len(self.lengths)) - 1]

    @property
    def dropped(self) -> int:
        return (
            self.identical + self.became_identical + self.empty_answer + self.empty + self.became_empty
            + self.over_long + self.refused_by_template
        )  # fmt: skip

    def counts(self) -> DataCounts:
        return {
            "read": self.read,
            "kept": self.read - self.dropped,
            "truncated": self.truncated,
            "prompts_cut": self.prompts_cut,
            "completions_cut": self.completions_cut,
            "dropped": self.dropped,
            "identical": self.identical,
            "became_identical": self.became_identical,
            "empty_answer": self.empty_answer,
            "empty": self.empty,
            "became_empty": self.became_empty,
            "over_long": self.over_long,
            "refused_by_template": self.refused_by_template,
        }

    def sentences(self, split: str, max_length: int) -> Iterator[str]:
        """For the log. The first says what was cut, each of the others why pairs were dropped."""
        if self.truncated:
            parts = self.rule.max_prompt_length or self.rule.max_completion_length
            limit = f"{max_length} tokens" + (" or than a part may be" if parts else "")
            yield (
                f"{self.truncated} of {self.read} {split} {self.noun}s were longer than {limit} and "
                f"were cut: {self.rule.sentence()}."
            )
        for count, reason in (
            (self.identical, "their answers are the same"),
            (self.became_identical, "cut to their length, their answers are the same"),
            (self.empty_answer, "an answer is empty text"),
            (self.empty, "a side has no tokens"),
            (self.became_empty, f"their prompt fills the {max_length} tokens and leaves none for the answer"),
            (self.over_long, f"they are longer than {max_length} tokens, or a part than it may be"),
            (self.refused_by_template, f"the model's chat template refused them ({self.template_message})"),
        ):
            if count:
                yield f"{count} {split} {self.noun}s were dropped: {reason}."
