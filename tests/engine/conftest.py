"""A tiny model shared by all engine tests, run directories over it, and the engine called in this process."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.tiny import build_tiny_model, build_tiny_pairs
from training.contract import RunConfig
from training.engine import products, shared_attention

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """Of the tiny model. A module's own: a test may change its template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model, local_files_only=True)


CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """What a test that takes it runs on: the CPU, and a GPU where there is one."""
    return str(request.param)


@dataclasses.dataclass
class RunFolder:
    """A run directory and how to run it here."""

    path: Path
    config: RunConfig

    def write(self, **changes: Any) -> RunFolder:
        self.config = dataclasses.replace(self.config, **changes)
        (self.path / "config.json").write_text(self.config.to_json())
        return self

    def train(self, interrupts: Any = None) -> int:
        from training.engine.events import EventLog
        from training.engine.interrupts import Interrupts
        from training.engine.session import run

        with EventLog(self.path) as events:
            return int(run(self.path, events=events, interrupts=interrupts or Interrupts(self.path)))

    @property
    def result(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "result.json").read_text()))

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "events.jsonl").read_text().splitlines()]

    def texts(self) -> str:
        return "\n".join(event["text"] for event in self.events if event["type"] == "log")

    def points(self, split: str) -> dict[int, dict[str, Any]]:
        """Metric values by step, without what the clock says."""
        return {
            event["step"]: {k: v for k, v in event["values"].items() if k != "tokens_per_second"}
            for event in self.events
            if event["type"] == "metrics" and event["split"] == split
        }


NewRun = Callable[..., RunFolder]


def run_maker(folder: Path, model: Path) -> NewRun:
    """`make("a", learning_rate=…)`: a run directory in `folder` with its own small pairs and fast settings."""

    def make(name: str = "run", *, pairs: int = 16, eval_pairs: int = 4, **settings: Any) -> RunFolder:
        path = folder / name
        path.mkdir()
        train = build_tiny_pairs(folder / f"train-{pairs}.jsonl", pairs)
        held_out = build_tiny_pairs(folder / f"eval-{eval_pairs}.jsonl", eval_pairs) if eval_pairs else ""
        defaults: dict[str, Any] = {
            "run_id": name,
            "model_path": str(model),
            "train_path": str(train),
            "eval_path": str(held_out),
            "reference_cache_dir": str(folder / "reference"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 2e-3,
            "save_steps": 2,
            "watch_prompts": 0,
            "device": "cpu",
        }
        return RunFolder(path, RunConfig(**(defaults | settings))).write()

    return make


@pytest.fixture
def new_run(tmp_path: Path, tiny_model: Path) -> NewRun:
    return run_maker(tmp_path, tiny_model)


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products and attention take bfloat16, on a CPU too, and products give what a GPU's give: float32 sums."""
    for module in (products, shared_attention):
        monkeypatch.setattr(module, "computes_low", lambda device: True)
    monkeypatch.setattr(products, "_mixed", lambda x, y: x.float() @ y.float())
    products.gives_float32.cache_clear()
    yield
    products.gives_float32.cache_clear()
