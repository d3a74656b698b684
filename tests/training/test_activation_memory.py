"""When activations are kept, when forwards get shorter, and when activations are computed again."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from training.activation_memory import ActivationPlan, bytes_per_layer, bytes_per_token, plan_activations

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Shape:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    attention_width: int
    key_value_width: int
    experts_per_token: int = 1


SMALL = Shape(576, 1536, 30, 576, 192)  # SmolLM2-135M
LARGE = Shape(4096, 14336, 32, 4096, 1024)  # Llama 3 8B


def plan(shape: Shape, **changes: Any) -> ActivationPlan:
    settings: dict[str, Any] = {
        "device": "cuda", "size": 2, "dropout": False, "batch_size": 64, "longest": 1500,
        "fixed_bytes": 2 * GIB, "memory_bytes": 80 * GIB,
    }  # fmt: skip
    return plan_activations(shape, **(settings | changes))


def test_what_fits_is_kept() -> None:
    found = plan(SMALL)
    assert (found.checkpointed, found.token_budget, found.tokens) == (False, 32768, 32768)
    float32, lowered = 4 * 576 + 3 * (576 + 192) + 3 * 1536, 5 * 576 + 576 + 1536
    assert found.activation_bytes == found.kept_bytes == 32768 * 31 * (4 * float32 + 2 * lowered)


def test_the_engine_s_own_functions_and_the_rank_are_counted() -> None:
    """In float32 a norm's result is kept once, in bfloat16 once for each layer that reads it."""
    for size, read in ((4, 2 * 576), (2, 5 * 576 + 576)):
        found = bytes_per_layer(SMALL, dropout=False, size=size, fused=True, rank=16)
        assert found == 4 * (2 * 576 + 3 * (576 + 192)) + size * (read + 2 * 1536 + 7 * 16)
        assert bytes_per_layer(SMALL, dropout=True, size=size, fused=True, rank=16) - found == 6 * 576 + 1536
        assert bytes_per_layer(SMALL, dropout=False, size=size, rank=16) > 1.3 * found


def test_a_gpu_with_less_room_gets_shorter_forwards_before_anything_is_computed_twice() -> None:
    budgets = [plan(SMALL, memory_bytes=memory * GIB).token_budget for memory in (80, 40, 20, 12)]
    assert budgets == [32768, 16384, 8192, 4096]
    assert not plan(SMALL, memory_bytes=12 * GIB).checkpointed
    assert plan(SMALL, memory_bytes=4 * GIB).checkpointed


def test_what_the_engine_keeps_less_of_is_not_computed_again_for_nothing() -> None:
    assert plan(SMALL, memory_bytes=7 * GIB).checkpointed
    assert not plan(SMALL, memory_bytes=7 * GIB, fused=True).checkpointed
    assert plan(SMALL, memory_bytes=7 * GIB, fused=True, rank=1024).checkpointed


def test_a_large_model_computes_again_with_as_many_tokens_as_then_fit() -> None:
    found = plan(LARGE, fixed_bytes=18 * GIB, memory_bytes=48 * GIB)
    assert (found.checkpointed, found.token_budget) == (True, 16384)
    assert found.activation_bytes < found.kept_bytes / 8
    assert plan(LARGE, fixed_bytes=18 * GIB, memory_bytes=160 * GIB).token_budget == 8192
    assert not plan(LARGE, fixed_bytes=18 * GIB, memory_bytes=160 * GIB).checkpointed


def test_the_longest_pair_and_the_batch_bound_a_forward() -> None:
    assert plan(SMALL, batch_size=2).tokens == 3000
    long = plan(SMALL, longest=40_000)
    assert (long.tokens, long.checkpointed) == (40_000, False)
    assert plan(SMALL, longest=200_000).checkpointed


def test_a_cpu_plans_with_half_of_its_memory_and_keeps_its_budget() -> None:
    cpu: dict[str, Any] = {"device": "cpu", "size": 4, "fixed_bytes": GIB, "longest": 800}
    roomy, tight = (plan(SMALL, memory_bytes=memory * GIB, **cpu) for memory in (8, 3))
    assert (roomy.checkpointed, roomy.token_budget, roomy.tokens) == (False, 512, 800)
    assert (tight.checkpointed, tight.token_budget) == (True, 512)


def test_dropout_costs_memory_and_experts_do() -> None:
    plain = bytes_per_token(SMALL, dropout=False, size=2, checkpointed=False)
    assert bytes_per_token(SMALL, dropout=True, size=2, checkpointed=False) > 1.25 * plain
    mixture = dataclasses.replace(SMALL, experts_per_token=8)
    assert bytes_per_token(mixture, dropout=False, size=2, checkpointed=False) > 3 * plain


@pytest.mark.parametrize(("switch", "expected"), [("on", True), ("off", False)])
def test_the_person_decides_where_they_said_so(switch: str, expected: bool) -> None:
    for memory in (4, 800):
        assert plan(SMALL, memory_bytes=memory * GIB, switch=switch).checkpointed is expected


def test_without_knowing_the_memory_everything_is_kept() -> None:
    assert not plan(LARGE, memory_bytes=0).checkpointed


def test_the_sentence_says_which_and_how_much() -> None:
    assert "are kept" in plan(SMALL).sentence and "45,384 MB for 32,768" in plan(SMALL).sentence
    assert "again in the backward pass" in plan(LARGE, memory_bytes=24 * GIB).sentence
