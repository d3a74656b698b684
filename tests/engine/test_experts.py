"""Adapters on the experts of a mixture: they train, are written, and another run goes on from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.engine.architectures import ARCHITECTURES
from tests.engine.conftest import NewRun, run_maker


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("moe")
    return {name: ARCHITECTURES[name].build(folder / name) for name in ("qwen3-moe", "gpt-oss")}


@pytest.mark.parametrize(
    ("name", "targets"),
    [("qwen3-moe", ["all-linear"]), ("qwen3-moe", ["attention", "experts"]), ("gpt-oss", ["experts"])],
)
def test_a_run_trains_them_and_another_goes_on(
    tmp_path: Path, models: dict[str, Path], name: str, targets: list[str]
) -> None:
    make: NewRun = run_maker(tmp_path, models[name])
    settings: dict[str, Any] = {"lora_dropout": 0.0, "max_steps": 2, "pairs": 8, "learning_rate": 2e-2}
    first = make("first", target_modules=tuple(targets), **settings)
    assert first.train() == 0, first.result
    weights = (first.path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert b"experts" in weights[:20_000]
    assert (b"self_attn" in weights[:20_000]) == (targets != ["experts"])
    start = first.points("eval")[0]
    coefficient = json.loads((models[name] / "config.json").read_text())["router_aux_loss_coef"]
    assert coefficient > 0
    assert start["eval_loss"] - coefficient * start["eval_aux_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first.points("eval")[2]["eval_rewards/margins"]) > 1e-4
    second = make("second", adapter_path=str(first.path / "adapter"), **settings)
    assert second.train() == 0, second.result
    again = second.points("eval")[0]
    assert again["eval_loss"] - coefficient * again["eval_aux_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert again["eval_logps/chosen"] == pytest.approx(first.points("eval")[2]["eval_logps/chosen"], rel=1e-5)


@pytest.mark.parametrize("targets", [(), ("experts",)])
def test_dropout_on_experts_is_refused_with_what_to_do(
    tmp_path: Path, models: dict[str, Path], targets: tuple[str, ...]
) -> None:
    run = run_maker(tmp_path, models["qwen3-moe"])("run", lora_dropout=0.05, target_modules=targets)
    assert run.train() == 2
    assert "Adapters on experts cannot have dropout" in run.result["error"]
    assert "lora_dropout to 0" in run.result["next_step"]


def test_with_dropout_an_adapter_goes_on_attention(tmp_path: Path, models: dict[str, Path]) -> None:
    make = run_maker(tmp_path, models["qwen3-moe"])
    run = make("run", lora_dropout=0.05, target_modules=("attention",), max_steps=1)
    assert run.train() == 0, run.result
    assert run.points("train")[1]["aux_loss"] > 0


def test_a_model_without_experts_says_what_it_has(tmp_path: Path, tiny_model: Path) -> None:
    run = run_maker(tmp_path, tiny_model)("run", target_modules=("experts",))
    assert run.train() == 2
    assert "no 'experts'" in run.result["error"]
