"""The packed layout gives what the padded one gives, for hidden states and for gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.architectures import ARCHITECTURES
from tests.tiny import build_tiny_model
from training.engine import attention_kernels, pair_layout
from training.engine.data import TokenizedPair
from training.engine.packed import choose_layout, packed_states, use_shared_prefix
from training.engine.plain import padded_states

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    folder = build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    use_shared_prefix(loaded)
    return loaded


def some_pairs(count: int = 5, longest: int = 40) -> list[TokenizedPair]:
    draw = np.random.default_rng(3)

    def ids() -> Any:
        return draw.integers(3, 250, size=int(draw.integers(1, longest))).astype(np.int32)

    return [TokenizedPair(str(number), ids(), ids(), ids()) for number in range(count)]


def states_and_gradient(model: Any, layout: Any, pairs: list[TokenizedPair]) -> tuple[Any, torch.Tensor]:
    model.zero_grad()
    states = layout(model.model, pairs, CPU)
    weights = torch.linspace(-1, 1, states.hidden.numel(), dtype=states.hidden.dtype).view_as(states.hidden)
    (states.hidden * weights).sum().backward()
    return states, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("kernel", ["flash", "matmul"])
def test_packed_states_and_gradients_equal_padded_ones(
    model: Any, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "choose_kernel", lambda *_, **__: kernel)
    pairs = some_pairs()
    packed, packed_gradient = states_and_gradient(model, packed_states, pairs)
    padded, padded_gradient = states_and_gradient(model, padded_states, pairs)
    assert torch.equal(packed.labels, padded.labels)
    assert torch.equal(packed.owner, padded.owner)
    torch.testing.assert_close(packed.hidden, padded.hidden, rtol=1e-6, atol=1e-6)
    assert (packed_gradient - padded_gradient).norm() / padded_gradient.norm() < 1e-6


def test_a_pair_gives_the_same_states_alone_and_among_others(model: Any) -> None:
    pairs = some_pairs()
    together = packed_states(model.model, pairs, CPU)
    alone = packed_states(model.model, pairs[2:3], CPU)
    mine = together.hidden[(together.owner == 4) | (together.owner == 5)]
    torch.testing.assert_close(mine, alone.hidden, rtol=1e-6, atol=1e-6)


def test_the_rejected_side_does_not_see_the_chosen_side(model: Any) -> None:
    pair = some_pairs(1)[0]
    other = TokenizedPair(pair.id, pair.prompt, pair.chosen[::-1].copy(), pair.rejected)
    before, after = packed_states(model.model, [pair], CPU), packed_states(model.model, [other], CPU)
    assert torch.equal(before.hidden[before.owner == 1], after.hidden[after.owner == 1])
    assert not torch.equal(before.hidden[before.owner == 0], after.hidden[after.owner == 0])


def test_the_layout_is_chosen_by_trying_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, reason = choose_layout(model.model, some_pairs(), CPU, dtype=torch.float64)
    assert layout is packed_states and reason == ""

    def sees_everything(_: Any, part: pair_layout.Part, dtype: torch.dtype) -> torch.Tensor | None:
        return None if part.causal else torch.zeros(part.queries.length, part.num_keys, dtype=dtype)

    monkeypatch.setattr(pair_layout.PairLayout, "mask", sees_everything)
    layout, reason = choose_layout(model.model, some_pairs(), CPU, dtype=torch.float64)
    assert layout is padded_states
    assert "other hidden states" in reason


def test_a_mask_that_bites_only_beyond_the_tried_pairs_is_found(tmp_path: Path) -> None:
    """A window that the layers do not name: the two pairs that are tried are shorter than it."""
    from transformers import AutoModelForCausalLM

    folder = ARCHITECTURES["qwen2 with windows"].build(tmp_path, sliding_window=50)
    windowed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    use_shared_prefix(windowed)
    short, long = some_pairs(2, longest=20), some_pairs(9, longest=60)
    assert max(len(pair.prompt) + len(pair.chosen) for pair in long) > 50
    for pairs in (short, [*short, *long]):
        assert choose_layout(windowed.model, pairs, CPU, dtype=torch.float64) == (packed_states, "")
    for layer in windowed.model.layers:
        layer.self_attn.sliding_window = None
    assert choose_layout(windowed.model, short, CPU, dtype=torch.float64) == (packed_states, "")
    layout, reason = choose_layout(windowed.model, [*short, *long], CPU, dtype=torch.float64)
    assert layout is padded_states
    assert "its attention mask is not causal" in reason
