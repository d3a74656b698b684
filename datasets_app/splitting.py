"""Training and validation sets from one file of pairs: by prompt, so that no prompt stands on both sides.

Pure and deterministic: the same pairs, share and seed give the same two files on every machine. No Django.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from datasets_app.formats.pair import prompt_key


@dataclass(frozen=True, slots=True)
class SplitSummary:
    num_train: int
    num_eval: int
    num_train_prompts: int
    num_eval_prompts: int


def split_by_prompt(
    pairs_path: Path, *, share: float, seed: int, train_path: Path, eval_path: Path
) -> SplitSummary:
    """Writes both files (each complete or not there), in the order of `pairs_path`.

    The validation side gets whole prompts until it holds `share` of the pairs, never more; but at least one
    prompt when there are two or more and the share is above 0.
    """
    sizes, chosen = _choose(pairs_path, share, seed)
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in (train_path, eval_path)}
    num_train = num_eval = 0
    with partial[train_path].open("wb") as train, partial[eval_path].open("wb") as evaluation:
        for key, raw in _keys(pairs_path):
            if key in chosen:
                evaluation.write(raw)
                num_eval += 1
            else:
                train.write(raw)
                num_train += 1
        for file in (train, evaluation):
            file.flush()
            os.fsync(file.fileno())
    for path, temporary in partial.items():
        temporary.replace(path)
    return SplitSummary(num_train, num_eval, len(sizes) - len(chosen), len(chosen))


def count_split(pairs_path: Path, share: float, seed: int) -> tuple[int, int]:
    """How many pairs each side of `split_by_prompt` would get."""
    sizes, chosen = _choose(pairs_path, share, seed)
    num_eval = sum(sizes[key] for key in chosen)
    return sum(sizes.values()) - num_eval, num_eval


def _keys(pairs_path: Path) -> Iterator[tuple[bytes, bytes]]:
    with pairs_path.open("rb") as file:
        for raw in file:
            if raw.strip():
                yield prompt_key(json.loads(raw)["prompt"]), raw.rstrip(b"\n") + b"\n"


def _choose(pairs_path: Path, share: float, seed: int) -> tuple[dict[bytes, int], set[bytes]]:
    """Pairs per prompt, and the prompts of the validation side, drawn in the order of a keyed hash."""
    if not 0.0 <= share < 1.0:
        raise ValueError(f"The validation share must be from 0 to below 1, found {share!r}.")
    sizes: dict[bytes, int] = {}
    for key, _ in _keys(pairs_path):
        sizes[key] = sizes.get(key, 0) + 1
    chosen: set[bytes] = set()
    if share == 0.0 or len(sizes) < 2:
        return sizes, chosen
    salt = str(seed).encode()
    order = sorted(sizes, key=lambda key: blake2b(key, key=salt, digest_size=16).digest())
    left = round(share * sum(sizes.values()))
    for key in order:
        if len(chosen) == len(sizes) - 1:
            break
        if sizes[key] <= left:
            chosen.add(key)
            left -= sizes[key]
    if not chosen:  # every prompt has more pairs than the share allows: one is needed all the same
        chosen.add(min(order, key=lambda key: sizes[key]))
    return sizes, chosen
