"""What is odd about a pair, or about all pairs together, without being an error. No Django.

Memory grows by hashes only, and no further than `MAX_REMEMBERED` pairs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from itertools import pairwise

from datasets_app.findings import Finding
from datasets_app.formats.pair import Message, Pair, prompt_key, shorten
from datasets_app.lengths import estimate_tokens

FEWEST, MOST = 100, 100_000  # recommended number of pairs
LONG_TOKENS = 32_768  # longer than the context of most models
MAX_REMEMBERED = 2_000_000
MAX_UNKNOWN_KEYS = 50
LENGTH_BIAS = 0.8  # share of pairs with one side longer that is worth saying


class PairChecks:
    """Looks at every pair in turn, and remembers what it needs to compare it with the earlier ones."""

    def __init__(self) -> None:
        self.prompts: set[bytes] = set()
        self.unknown: Counter[str] = Counter()
        self.full = False  # more pairs came than are remembered
        self._lines: dict[bytes, int] = {}

    def notice_unknown(self, keys: set[str]) -> None:
        for key in keys:
            if key in self.unknown or len(self.unknown) < MAX_UNKNOWN_KEYS:
                self.unknown[key] += 1

    def of_pair(self, pair: Pair, *, line: int, item: int) -> Iterator[Finding]:
        for code, field, found, expected, advice in (*_roles(pair), *_texts(pair)):
            yield _warning(code, line, item, field, found, expected, advice)
        yield from self._repeats(pair, line, item)

    def _repeats(self, pair: Pair, line: int, item: int) -> Iterator[Finding]:
        prompt = prompt_key(pair["prompt"])
        if len(self._lines) >= MAX_REMEMBERED:
            self.full = True
            return
        self.prompts.add(prompt)
        chosen, rejected = _digest(pair["chosen"]), _digest(pair["rejected"])
        same, swapped = (
            blake2b(prompt + first + second, digest_size=8).digest()
            for first, second in ((chosen, rejected), (rejected, chosen))
        )
        place = item or line
        word = "record" if item else "line"
        if same in self._lines:
            yield _warning(
                "duplicate_pair",
                line,
                item,
                "(record)",
                f"the same pair as {word} {self._lines[same]:,}",
                "every pair once",
                "Remove one of them, unless it is meant to count twice.",
            )
        elif swapped in self._lines:
            yield _warning(
                "contradiction",
                line,
                item,
                "chosen, rejected",
                f"the pair of {word} {self._lines[swapped]:,} with the sides swapped",
                "one answer preferred for one prompt",
                "Decide which answer is better and remove the other record.",
            )
        self._lines.setdefault(same, place)

    def of_all(self, num_pairs: int) -> Iterator[Finding]:
        """What can be said at the end."""
        for key, count in self.unknown.most_common():
            yield Finding(
                level="warning",
                code="unknown_key",
                field=shorten(key.encode("utf-8", "replace").decode()),
                found=f"a key that is not used, in {count:,} {'record' if count == 1 else 'records'}",
                expected="only keys of the format",
                next_step="Nothing to do if it was not meant to matter; it is not trained on.",
            )
        if self.full:
            yield Finding(
                level="warning",
                code="not_compared",
                found=f"more than {MAX_REMEMBERED:,} pairs",
                expected="fewer, for duplicates to be looked for among all of them",
                next_step="Duplicates and contradictions were looked for among the first ones only.",
            )
        if 0 < num_pairs < FEWEST or num_pairs > MOST:
            few = num_pairs < FEWEST
            yield Finding(
                level="warning",
                code="few_pairs" if few else "many_pairs",
                found=f"{num_pairs:,} {'pair' if num_pairs == 1 else 'pairs'}",
                expected=f"{FEWEST:,} to {MOST:,} pairs",
                next_step=_ADD if few else _FEWER,
            )


_ADD = "It can be trained on, but expect little from it: add pairs if you can."
_FEWER = "It can be trained on, but quality counts for more: a smaller, cleaner set is often as good."


def _warning(
    code: str, line: int, item: int, field: str, found: str, expected: str, next_step: str
) -> Finding:
    return Finding(
        level="warning",
        code=code,
        line=line,
        item=item,
        field=field,
        found=found,
        expected=expected,
        next_step=next_step,
    )


def _digest(messages: list[Message]) -> bytes:
    return blake2b(json.dumps(messages).encode(), digest_size=16).digest()


_Said = tuple[str, str, str, str, str]


def _roles(pair: Pair) -> Iterator[_Said]:
    prompt = pair["prompt"]
    roles = [message["role"] for message in prompt]
    if roles[-1] not in ("user", "tool"):
        yield (
            "prompt_ends_without_user",
            "prompt",
            f"{roles[-1]} as the last role",
            "the user's message right before the answer",
            "Check whether the roles are swapped or a message is missing.",
        )
    if "system" in roles[1:]:
        yield (
            "system_not_first",
            "prompt",
            f"a system message at place {roles.index('system', 1) + 1}",
            "a system message only at the beginning",
            "Move it to the beginning: many chat templates refuse it elsewhere.",
        )
    talk = [role for role in roles if role != "system"]
    if talk and talk[0] == "assistant":
        yield (
            "starts_with_assistant",
            "prompt",
            "assistant as the first role",
            "the user's message first",
            "Check whether the roles are swapped: many chat templates refuse this.",
        )
    elif any(first == second != "tool" for first, second in pairwise(talk)):
        yield (
            "roles_do_not_alternate",
            "prompt",
            "two messages of the same role in a row",
            "user and assistant in turn",
            "Join the two messages: many chat templates refuse this.",
        )


def _texts(pair: Pair) -> Iterator[_Said]:
    chosen, rejected = pair["chosen"], pair["rejected"]
    last = pair["prompt"][-1]["content"]
    if len(last) > 20 and all(side[0]["content"].startswith(last) for side in (chosen, rejected)):
        yield (
            "repeats_prompt",
            "chosen, rejected",
            "both answers begin with the text of the prompt",
            "answers without the prompt",
            "Remove the prompt from the answers, or the model learns to repeat the question.",
        )
    if [m["content"].split() for m in chosen] == [m["content"].split() for m in rejected]:
        yield (
            "nearly_identical",
            "rejected",
            "the chosen answer with other white space",
            "answers that differ in what they say",
            "Remove the record, or write an answer that is worse.",
        )
    longest = max(
        sum(estimate_tokens(m["content"]) for m in part) for part in (pair["prompt"], chosen, rejected)
    )
    if longest > LONG_TOKENS:
        yield (
            "very_long",
            "(record)",
            f"a text of about {longest:,.0f} tokens",
            f"at most {LONG_TOKENS:,} tokens",
            "Shorten it: it will be cut at max_context_length, or the pair left out.",
        )
