"""Products of low weights: what they give, on which device, with which gradient; policy and evaluation round alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.engine import products
from training.engine.products import product, wide_product, widen


def low(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def test_a_cpu_multiplies_in_float32() -> None:
    x, weight = torch.randn(5, 16), low(7, 16)
    assert torch.equal(product(x, weight), x @ weight.float().T)


def test_a_gpu_rounds_operands_and_nothing_else(like_a_gpu: None) -> None:
    x, weight = torch.randn(5, 16), low(7, 16)
    assert torch.equal(product(x, weight), x.bfloat16().float() @ weight.float().T)


def test_a_device_without_such_products_gives_rounded_ones_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As torch's CPU is."""
    products.gives_float32.cache_clear()
    x, weight = low(5, 16), low(7, 16)
    with caplog.at_level("INFO"):
        found = wide_product(x, weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, (x @ weight.T).float())
    assert "are rounded to it" in caplog.text


def test_a_full_memory_is_not_taken_for_a_device_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    products.gives_float32.cache_clear()
    monkeypatch.setattr(products, "_mixed", full)
    with pytest.raises(torch.OutOfMemoryError):
        products.gives_float32("cpu", torch.bfloat16)
    monkeypatch.setattr(products, "_mixed", lambda x, y: x.float() @ y.float())
    assert products.gives_float32("cpu", torch.bfloat16)
    products.gives_float32.cache_clear()


@pytest.mark.parametrize("biased", [False, True])
def test_a_widened_layer_has_the_gradient_of_a_plain_one(biased: bool) -> None:
    layer = nn.Linear(16, 7, bias=biased).requires_grad_(False)
    plain = nn.Linear(16, 7, bias=biased).requires_grad_(False)
    layer.bfloat16()
    plain.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()})
    assert widen(nn.ModuleList([layer])) == 1
    x = torch.randn(2, 5, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    expected = plain(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(y, x, upstream)[0] for y in (found, expected))
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() / theirs.norm() < 0.01


def test_no_rows_give_no_rows() -> None:
    """An expert that no token was sent to."""
    layer = nn.Linear(16, 7).requires_grad_(False).bfloat16()
    widen(nn.ModuleList([layer]))
    assert layer(torch.zeros(0, 16)).shape == (0, 7)
