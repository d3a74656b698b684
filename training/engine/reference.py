"""Log-probabilities of the reference, computed once and kept on disk for every later run.

Content-addressed: a folder per reference (its weights and precision), a record per pair named by the hash
of the token ids that the reference saw: tokenizer, template and `max_length` are in that. A shard's file
name is the hash of its bytes: a half-written or damaged one does not match its name and is removed. Each
run writes its own shards, so any number of them may share the folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from training.contract import RunConfig
from training.engine.data import TokenizedPair, length_sorted_batches
from training.engine.events import EventLog
from training.engine.logps import token_logps
from training.engine.policy import Placement, Policy
from training.engine.step_files import write_durably
from training.reference_cache import SHARD, evict

FORMAT = 1  # raise it when the numbers in a shard would change
SHARD_PAIRS = 512
SHARD_SECONDS = 60.0  # a killed pass loses at most this much
# Tokens a forward pass without gradient: enough to fill the device, few enough to report progress often.
TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}

Floats = npt.NDArray[np.float32]
logger = logging.getLogger(__name__)


def reference_key(policy: Policy) -> str:
    """Names the folder of one reference."""
    placement = policy.scorer.placement
    parts: tuple[object, ...] = (FORMAT, policy.reference_sha256, placement.device.type, placement.dtype_name)
    if policy.numerics:
        parts = (*parts, policy.numerics)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def token_budget(placement: Placement) -> int:
    return TOKEN_BUDGET[placement.device.type]


class ReferenceLogps:
    """Per pair the log-probability of each completion token [chosen + rejected], float32, on the CPU."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._records: dict[bytes, Floats] = {}
        self._unsaved: dict[bytes, Floats] = {}
        self._written = time.monotonic()
        self.used: set[Path] = set()  # shards that this run read from or wrote

    def __contains__(self, pair: TokenizedPair) -> bool:
        return pair.digest() in self._records

    def token_logps(self, pairs: Sequence[TokenizedPair], device: torch.device) -> torch.Tensor:
        """[C] in the order of `CompletionStates`."""
        return torch.from_numpy(np.concatenate([self._records[pair.digest()] for pair in pairs])).to(device)

    def add(self, pair: TokenizedPair, values: Floats) -> None:
        self._records[pair.digest()] = self._unsaved[pair.digest()] = values
        due = time.monotonic() - self._written >= SHARD_SECONDS
        if due or len(self._unsaved) >= SHARD_PAIRS:
            self.flush()

    def load(self, wanted: Iterable[TokenizedPair]) -> None:
        """Take what the folder has of these pairs."""
        missing = {pair.digest(): pair.num_completion_tokens for pair in wanted}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                content = path.read_bytes()  # read once: what is taken is what was verified
                if hashlib.sha256(content).hexdigest() != path.stem:
                    raise ValueError("the bytes do not match the name")
                if self._take(content, missing):
                    self.used.add(path)
                    os.utime(path)  # see `training.reference_cache`: what nobody reads goes first
            except FileNotFoundError:
                continue  # evicted meanwhile
            except (OSError, ValueError, KeyError) as error:
                logger.warning("reference shard %s is removed: %s", path.name, error)
                path.unlink(missing_ok=True)

    def _take(self, content: bytes, missing: dict[bytes, int]) -> bool:
        """Whether the shard had anything of what is missing."""
        from safetensors.numpy import load

        shard = load(content)
        ends = np.cumsum(shard["lengths"])
        before = len(self._records)
        for row, end, length in zip(shard["keys"], ends, shard["lengths"], strict=True):
            key = row.tobytes()
            if missing.get(key) == length:
                self._records[key] = shard["logps"][end - length : end].copy()
        return len(self._records) > before

    def require(self, pairs: Iterable[TokenizedPair]) -> None:
        """Raises `OSError` when another rank's values did not arrive: the folder must be the same for all."""
        if not all(pair in self for pair in pairs):
            raise OSError("log-probabilities of the reference vanished from the cache during the pass")

    def flush(self) -> None:
        """Write what is new as one shard: beside, to disk, then under its name."""
        from safetensors.numpy import save

        if not self._unsaved:
            return
        content = save(
            {
                "keys": np.stack([np.frombuffer(key, dtype=np.uint8) for key in self._unsaved]),
                "lengths": np.array([len(values) for values in self._unsaved.values()], dtype=np.int64),
                "logps": np.concatenate(list(self._unsaved.values())),
            }
        )
        path = self._folder / f"{hashlib.sha256(content).hexdigest()}{SHARD}"
        write_durably(path, content)
        self.used.add(path)
        self._unsaved.clear()
        self._written = time.monotonic()


def score_reference(
    policy: Policy,
    pairs: Sequence[TokenizedPair],
    folder: Path,
    *,
    progress: Callable[[int, int], None],
    check: Callable[[], None] = lambda: None,
) -> ReferenceLogps:
    """One length-sorted pass over the pairs that the cache does not have. `check` may raise to leave."""
    records = ReferenceLogps(folder / reference_key(policy))
    records.load(pairs)
    world = policy.scorer.placement.world
    missing = world.on_main(lambda: [index for index, pair in enumerate(pairs) if pair not in records])
    todo = {pairs[index].digest(): pairs[index] for index in missing}
    done = len(pairs) - len(todo)
    progress(done, len(pairs))
    batches = list(length_sorted_batches(todo.values(), budget=token_budget(policy.scorer.placement)))

    def score_share() -> None:
        nonlocal done
        try:
            for batch, counts in world.share(batches, lambda batch: sum(pair.num_tokens for pair in batch)):
                check()
                states = policy.scorer(batch)
                values = token_logps(states.hidden, states.labels, policy.head).float().cpu()
                if not counts:
                    continue
                lengths = [pair.num_completion_tokens for pair in batch]
                for pair, part in zip(batch, torch.split(values, lengths), strict=True):
                    records.add(pair, part.numpy().copy())
                done += len(batch) * world.size  # the others are about as far
                progress(min(done, len(pairs)), len(pairs))
        finally:
            records.flush()

    if missing:
        with policy.reference():
            world.together(score_share)
    if world.size > 1:
        progress(len(pairs), len(pairs))
        records.load(pairs)  # what the others have computed
        world.together(lambda: records.require(pairs))
    logger.info("reference log-probabilities of %d pairs, %d of them computed", len(pairs), len(todo))
    return records


def limit_cache(config: RunConfig, records: ReferenceLogps | None, events: EventLog) -> None:
    """At a run's end: what no run has used for long leaves the shared cache. What this run used stays."""
    if not config.reference_cache_dir:
        return
    folder, limit = Path(config.reference_cache_dir), config.reference_cache_bytes
    found = evict(folder, limit_bytes=limit, keep=records.used if records else ())
    if found.removed_files:
        logger.info(
            "the reference cache gave up %d files, %d bytes", found.removed_files, found.removed_bytes
        )
    if limit and found.left_bytes > limit:
        events.log(
            f"The cache of reference log-probabilities holds {found.left_bytes / 1e6:.0f} MB, more than its "
            f"{limit / 1e6:.0f} MB: what runs use now is not removed. A larger limit would keep it for the next runs.",
            "warning",
        )
