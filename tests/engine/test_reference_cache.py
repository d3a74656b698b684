"""The size of the shared cache, and processes that read, write, damage and evict it at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.conftest import NewRun
from tests.engine.policies import tiny_config, tiny_data, tiny_policy
from training.contract import ConfigError
from training.engine.data import TokenizedPair
from training.engine.logps import token_logps
from training.engine.reference import ReferenceLogps, score_reference
from training.reference_cache import GRACE_SECONDS, TEMPORARY_SECONDS, UNUSED_SECONDS, evict

ROOT = Path(__file__).parents[2]
NOW = 1_700_000_000.0
HOUR = 3600.0


def put(folder: Path, name: str, size: int, age: float) -> Path:
    path = folder / "a reference" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (NOW - age, NOW - age))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*/*"))


def test_the_least_recently_used_go_first_until_it_fits(tmp_path: Path) -> None:
    for name, hours in (("a", 2), ("b", 5), ("c", 9), ("d", 3)):
        put(tmp_path, f"{name}.safetensors", 10, hours * HOUR)
    found = evict(tmp_path, limit_bytes=20, now=NOW)
    assert names(tmp_path) == ["a", "d"]
    assert (found.removed_files, found.removed_bytes, found.left_bytes) == (2, 20, 20)


def test_what_a_run_uses_stays_even_over_the_limit(tmp_path: Path) -> None:
    mine = put(tmp_path, "mine.safetensors", 10, 40 * 86_400)
    put(tmp_path, "other.safetensors", 10, 2 * HOUR)
    put(tmp_path, "fresh.safetensors", 10, GRACE_SECONDS / 2)
    found = evict(tmp_path, limit_bytes=1, keep=[mine], now=NOW)
    assert names(tmp_path) == ["fresh", "mine"]
    assert found.left_bytes == 20


def test_without_a_limit_only_what_nobody_used_for_a_month_goes(tmp_path: Path) -> None:
    put(tmp_path, "old.safetensors", 10, UNUSED_SECONDS + 1)
    put(tmp_path, "read.safetensors", 10**6, UNUSED_SECONDS - 1)
    evict(tmp_path, limit_bytes=0, now=NOW)
    assert names(tmp_path) == ["read"]


def test_a_half_written_file_goes_when_its_writer_must_be_dead(tmp_path: Path) -> None:
    put(tmp_path, ".dead.tmp", 10, TEMPORARY_SECONDS + 1)
    writing = put(tmp_path, ".writing.tmp", 10, HOUR)
    foreign = put(tmp_path, "notes.txt", 10, 99 * UNUSED_SECONDS)
    evict(tmp_path, limit_bytes=1, now=NOW)
    assert sorted((tmp_path / "a reference").iterdir()) == [writing, foreign]


@given(
    files=st.lists(st.tuples(st.integers(0, 9), st.floats(0, 40 * 86_400)), max_size=8),
    limit=st.integers(0, 40), kept=st.sets(st.integers(0, 7)),
)  # fmt: skip
def test_eviction_keeps_its_promises(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[int, float]], limit: int, kept: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    paths = [put(folder, f"{i}.safetensors", size, age) for i, (size, age) in enumerate(files)]
    found = evict(folder, limit_bytes=limit, keep=[paths[i] for i in kept if i < len(paths)], now=NOW)
    left = [i for i, path in enumerate(paths) if path.exists()]
    assert found.left_bytes == sum(files[i][0] for i in left)
    assert kept & set(range(len(paths))) <= set(left)
    for i, (_, age) in enumerate(files):
        if i in left and i not in kept:
            assert age <= UNUSED_SECONDS
        elif i not in left:
            assert age > GRACE_SECONDS
    over = limit and found.left_bytes > limit
    assert not over or all(i in kept or files[i][1] <= GRACE_SECONDS + 1 for i in left)


def test_the_engine_limits_the_cache_at_its_end_and_spares_what_it_used(
    new_run: NewRun, tmp_path: Path
) -> None:
    stale = tmp_path / "reference/another reference/aa.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"x")
    os.utime(stale, (time.time() - 2 * GRACE_SECONDS,) * 2)
    first = new_run("first", max_steps=1, reference_cache_bytes=1)
    assert first.train() == 0
    assert not stale.exists()
    assert "holds 0 MB, more than its" in first.texts()
    shards = sorted((tmp_path / "reference").glob("*/*.safetensors"))
    assert shards
    for path in shards:  # a long run: what it read is old at its end
        os.utime(path, (time.time() - 2 * GRACE_SECONDS,) * 2)
    loaded = new_run("second", max_steps=1, reference_cache_bytes=1)
    assert loaded.train() == 0
    assert sorted((tmp_path / "reference").glob("*/*.safetensors")) == shards


def test_a_limit_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name its folder"):
        tiny_config(tmp_path, reference_cache_bytes=5)
    with pytest.raises(ConfigError, match="must be 0"):
        tiny_config(tmp_path, reference_cache_dir="/x", reference_cache_bytes=-1)


def test_with_dropout_off_the_policy_s_first_values_are_the_cached_ones(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The reference is what the policy starts from: kept and computed while training they are one number."""
    policy = tiny_policy(tiny_config(tiny_model), bent=False)
    pairs = tiny_data(tiny_model, 9)
    records = score_reference(policy, pairs, tmp_path, progress=lambda done, total: None)
    policy.model.train()
    states = policy.scorer(pairs)
    online = token_logps(states.hidden, states.labels, policy.head).detach().float()
    cached = records.token_logps(pairs, torch.device("cpu"))
    torch.testing.assert_close(cached, online, rtol=1e-5, atol=2e-5)
    dropping = tiny_policy(tiny_config(tiny_model, lora_dropout=0.5))
    again = score_reference(dropping, pairs, tmp_path / "other", progress=lambda done, total: None)
    torch.testing.assert_close(again.token_logps(pairs, torch.device("cpu")), cached, rtol=0, atol=0)


# --- several processes ------------------------------------------------------------------------------

WORK = """
import sys, time
from pathlib import Path
from tests.engine.test_reference_cache import any_pair, values_of
from training.engine.reference import ReferenceLogps
from training.reference_cache import evict
import training.reference_cache as rule
folder, seed, end = Path(sys.argv[1]), int(sys.argv[2]), time.time() + float(sys.argv[3])
rule.GRACE_SECONDS = 0.0  # everything may be evicted at any moment
rounds = read = 0
while time.time() < end:
    pairs = [any_pair((seed * 7 + rounds * 3 + i) % 40) for i in range(12)]
    records = ReferenceLogps(folder / "reference")
    records.load(pairs)
    for pair in pairs:
        if pair in records:
            read += 1
            found = records.token_logps([pair], "cpu").numpy()
            assert (found == values_of(pair)).all(), pair.id
        else:
            records.add(pair, values_of(pair))
            if rounds % 3 == 0:
                records.flush()
    records.flush()
    if rounds % 5 == 0:
        evict(folder, limit_bytes=4000, keep=records.used if rounds % 2 else ())
    rounds += 1
print(rounds, read)
"""


def any_pair(number: int) -> TokenizedPair:
    draw = np.random.default_rng(number)
    parts = [draw.integers(0, 99, size, dtype=np.int32) for size in draw.integers(1, 30, 3)]
    return TokenizedPair(str(number), *parts)


def values_of(pair: TokenizedPair) -> Any:
    """What the model would say: a function of the pair."""
    return np.random.default_rng(list(pair.digest())).random(pair.num_completion_tokens, dtype=np.float32)


@pytest.mark.slow
def test_processes_that_write_read_damage_and_evict_at_once_never_read_a_wrong_value(tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(tmp_path), str(seed), "4"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for seed in (1, 2)
    ]  # fmt: skip
    draw = np.random.default_rng(0)
    while any(process.poll() is None for process in running):
        for path in tmp_path.glob("reference/*.safetensors"):
            if draw.random() < 0.02:  # a disk that loses the end of a file, or a bit
                content = path.read_bytes() if path.exists() else b""
                path.write_bytes(content[: len(content) // 2] if draw.random() < 0.5 else content[:-1] + b"?")
        time.sleep(0.01)
    for process in running:
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        rounds, read = map(int, output.split())
        assert rounds > 20
        assert read > 20
    left = ReferenceLogps(tmp_path / "reference")
    left.load(any_pair(number) for number in range(40))
    known = [any_pair(number) for number in range(40) if any_pair(number) in left]
    for pair in known:
        assert left.token_logps([pair], torch.device("cpu")).tolist() == values_of(pair).tolist()
