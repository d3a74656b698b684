"""A run decides from its own pairs and machine whether activations are kept, and says so."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.conftest import NewRun
from training import estimates
from training.engine import estimating


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_to(gib: float) -> None:
        machine = estimates.cpu_machine(memory_bytes=int(gib * 2**30), cores=1)
        monkeypatch.setattr(estimating, "this_machine", lambda _device: machine)

    return set_to


def test_a_run_computes_activations_again_only_where_they_would_not_fit(new_run: NewRun, memory: Any) -> None:
    runs = {}
    for name, gib in (("roomy", 64), ("tight", 1.0)):
        memory(gib)
        runs[name] = new_run(name, max_steps=2)
        assert runs[name].train() == 0
    assert runs["roomy"].result["gradient_checkpointing"] is False
    assert "Activations are kept" in runs["roomy"].texts()
    assert runs["tight"].result["gradient_checkpointing"] is True
    assert "computed again in the backward pass" in runs["tight"].texts()
    assert runs["tight"].result["activations"] in runs["tight"].texts()
    assert runs["tight"].points("train")[2] == pytest.approx(runs["roomy"].points("train")[2], rel=1e-5)


@pytest.mark.parametrize(("switch", "expected"), [("on", True), ("off", False)])
def test_what_the_person_said_is_done(new_run: NewRun, memory: Any, switch: str, expected: bool) -> None:
    memory(1.0 if switch == "off" else 64)
    run = new_run(max_steps=1, gradient_checkpointing=switch)
    assert run.train() == 0
    assert run.result["gradient_checkpointing"] is expected
