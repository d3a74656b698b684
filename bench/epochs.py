"""A whole run each, from a folder and a file of pairs to a saved adapter, through each one's own `train()`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.contenders import quiet, run_config, trl_trainer


@dataclasses.dataclass(frozen=True)
class Seconds:
    trl: float  # online reference, as it is by default
    cold: float  # ours, the reference pass included
    warm: float  # ours again, another beta, the reference in the cache


def one_round(model: Path, rows: list[dict[str, Any]], batch_size: int, folder: Path) -> Seconds:
    """Interleaved in this process, one precision on both sides."""
    folder.mkdir(parents=True)
    return Seconds(
        trl=trl_run(model, rows, batch_size, folder / "trl"),
        cold=our_run(model, rows, batch_size, folder / "cold", folder / "cache", beta=0.1),
        warm=our_run(model, rows, batch_size, folder / "warm", folder / "cache", beta=0.3),
    )


def trl_run(model: Path, rows: list[dict[str, Any]], batch_size: int, folder: Path) -> float:
    began = time.monotonic()
    with quiet():
        trainer = trl_trainer(model, rows, folder, per_device_train_batch_size=batch_size)
        trainer.train()
        trainer.save_model(str(folder / "adapter"))
    return time.monotonic() - began


def our_run(
    model: Path, rows: list[dict[str, Any]], batch_size: int, folder: Path, cache: Path, *, beta: float
) -> float:
    from training.engine import train

    folder.mkdir()
    path = written(rows, folder)
    config = run_config(
        model,
        train_path=str(path),
        reference_cache_dir=str(cache),
        beta=beta,
        per_device_train_batch_size=batch_size,
    )
    began = time.monotonic()
    with quiet():
        train(config, run_dir=folder / "run")
    return time.monotonic() - began


def startup_seconds(model: Path, rows: list[dict[str, Any]], folder: Path) -> tuple[float, float]:
    """A fresh process with the reference in its cache: seconds until the first step begins, and until it is done."""
    from training.contract import CONFIG_FILE, EVENTS_FILE

    folder.mkdir(parents=True)
    path = written(rows, folder)
    times: tuple[float, float] = (0.0, 0.0)
    for attempt in ("cold", "warm"):
        run_dir = folder / attempt
        run_dir.mkdir()
        config = run_config(
            model, train_path=str(path), reference_cache_dir=str(folder / "cache"), max_steps=1,
            per_device_train_batch_size=1,
        )  # fmt: skip
        (run_dir / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        began = time.time()
        command = [sys.executable, "-m", "training.engine", "train", str(run_dir)]
        subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, check=True, capture_output=True)
        events = [
            json.loads(line) for line in (run_dir / EVENTS_FILE).read_text(encoding="utf-8").splitlines()
        ]
        begins = next(e["time"] for e in events if e["type"] == "phase" and e["phase"] == "training")
        done = next(e["time"] for e in events if e["type"] == "metrics" and e["split"] == "train")
        times = (begins - began, done - began)
    return times


def written(rows: list[dict[str, Any]], folder: Path) -> Path:
    """The pairs as the engine reads them, one a line."""
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
