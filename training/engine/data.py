"""Pairs as token ids: reading, the chat template, the rule for over-long pairs. Knows no model.

The rule for a pair whose longer side passes `max_length`: the prompt loses tokens from its left first, down
to an eighth of `max_length` (a leading BOS token stays), then the completions lose their ends. A pair whose
two completions are then the same, or one of them empty, is dropped. Everything cut or dropped is counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training.engine.errors import RefusedError

Ids = npt.NDArray[np.int32]
RENDER_BATCH = 64  # pairs handed to the tokenizer at once
PROMPT_SHARE = 8  # a cut prompt keeps at least max_length / PROMPT_SHARE tokens


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class TokenizedPair:
    """One prompt and its two completions. The prompt is never empty: its last token predicts their first."""

    id: str
    prompt: Ids
    chosen: Ids
    rejected: Ids

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


@dataclasses.dataclass
class DataReport:
    """What happened to the pairs of one file."""

    read: int = 0
    truncated: int = 0
    identical: int = 0
    empty: int = 0
    refused_by_template: int = 0
    template_message: str = ""

    @property
    def dropped(self) -> int:
        return self.identical + self.empty + self.refused_by_template

    def sentences(self, split: str, max_length: int) -> Iterator[str]:
        if self.truncated:
            yield (
                f"{self.truncated} of {self.read} {split} pairs were longer than {max_length} tokens and "
                "were cut: the start of the prompt first, then the ends of the answers."
            )
        if self.identical:
            yield f"{self.identical} {split} pairs were dropped: their answers are the same (after cutting)."
        if self.empty:
            yield f"{self.empty} {split} pairs were dropped: a side had no tokens left."
        if self.refused_by_template:
            yield (
                f"{self.refused_by_template} {split} pairs were dropped: the model's chat template refused "
                f"them ({self.template_message})."
            )


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The canonical pairs of a file, one JSON object a line."""
    pairs = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    pairs.append(_parse_pair(line, path, number))
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path.name} cannot be read: {error}.", "Prepare the dataset again.") from None
    return pairs


def _parse_pair(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        pair = json.loads(line)
        for key in ("prompt", "chosen", "rejected"):
            for message in pair[key]:
                if not (isinstance(message["role"], str) and isinstance(message["content"], str)):
                    raise TypeError(key)
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(
            f"Line {number} of {path.name} is not a preference pair ({type(error).__name__}: {error}).",
            "Prepare the dataset again.",
        ) from None
    pair.setdefault("id", str(number))
    return dict(pair)


def tokenize_pairs(
    pairs: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[TokenizedPair], DataReport]:
    """Render with the chat template, tokenise, cut. A completion is what the template adds to the prompt."""
    report = DataReport(read=len(pairs))
    kept: list[TokenizedPair] = []
    for start in range(0, len(pairs), RENDER_BATCH):
        rendered = []
        for pair in pairs[start : start + RENDER_BATCH]:
            texts = _render(pair, tokenizer, report)
            if texts is not None:
                rendered.append((str(pair["id"]), texts))
        flat = [text for _, texts in rendered for text in texts]
        ids = tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else []
        for index, (name, _) in enumerate(rendered):
            whole = _split_completions(name, *ids[3 * index : 3 * index + 3])
            cut = cut_pair(whole, max_length=max_length, bos=tokenizer.bos_token_id)
            if _keep(cut, report):
                report.truncated += cut.num_tokens < whole.num_tokens
                kept.append(cut)
        progress(min(start + RENDER_BATCH, len(pairs)), len(pairs))
    return kept, report


def _render(pair: dict[str, Any], tokenizer: Any, report: DataReport) -> list[str] | None:
    """Texts of prompt, prompt + chosen, prompt + rejected; None when the template refuses them."""
    from jinja2.exceptions import TemplateError

    def render(messages: list[dict[str, str]], *, generation: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))

    try:
        return [
            render(pair["prompt"], generation=True),
            render(pair["prompt"] + pair["chosen"], generation=False),
            render(pair["prompt"] + pair["rejected"], generation=False),
        ]
    except (TemplateError, IndexError) as error:
        report.refused_by_template += 1
        report.template_message = report.template_message or str(error)
        return None


def _split_completions(name: str, prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
    """Where a tokenizer merges across the border, the prompt ends at the last token that all three share."""
    ids = [np.array(sequence, dtype=np.int32) for sequence in (prompt, chosen, rejected)]
    shared = min(_common_prefix(ids[0], ids[1]), _common_prefix(ids[0], ids[2]))
    return TokenizedPair(name, ids[0][:shared], ids[1][shared:], ids[2][shared:])


def _common_prefix(left: Ids, right: Ids) -> int:
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length


def cut_pair(pair: TokenizedPair, *, max_length: int, bos: int | None = None) -> TokenizedPair:
    """The module's rule; both sides keep the same prompt, so that it is computed once."""
    longest = max(len(pair.chosen), len(pair.rejected))
    if len(pair.prompt) + longest <= max_length:
        return pair
    floor = max(1, min(len(pair.prompt), max_length // PROMPT_SHARE))
    room = min(len(pair.prompt), max(floor, max_length - longest))
    prompt = pair.prompt[len(pair.prompt) - room :]
    begins = (
        bos is not None and pair.prompt[:1].tolist() == [bos] and np.count_nonzero(pair.prompt == bos) == 1
    )
    if begins and room > 1:
        prompt = np.concatenate([pair.prompt[:1], prompt[1:]])
    rest = max_length - room
    return TokenizedPair(pair.id, prompt, pair.chosen[:rest], pair.rejected[:rest])


def _keep(pair: TokenizedPair, report: DataReport) -> bool:
    if not (len(pair.prompt) and len(pair.chosen) and len(pair.rejected)):
        report.empty += 1
        return False
    if np.array_equal(pair.chosen, pair.rejected):
        report.identical += 1
        return False
    return True


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
