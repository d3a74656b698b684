"""The engine's Python face. Importing it loads no torch; the functions do when they are called.

from training.engine import RunConfig, train

result = train(RunConfig(run_id="first", model_path=..., train_path=...), run_dir="runs/first")
"""

from __future__ import annotations

from training.contract import Result, RunConfig
from training.engine.api import estimate, evaluate, generate, merge, train
from training.engine.errors import DivergedError, EngineError, InterruptedRunError, RefusedError

__all__ = [
    "DivergedError",
    "EngineError",
    "InterruptedRunError",
    "RefusedError",
    "Result",
    "RunConfig",
    "estimate",
    "evaluate",
    "generate",
    "merge",
    "train",
]
