"""The faster library is taken where it is one and gives the same; everything else stays with torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engine.conftest import run_maker
from tests.engine.policies import tiny_config
from tests.engine.test_bfloat16 import SMOLLM2, engine, wide_pairs
from tests.tiny import build_tiny_model
from training import processor
from training.engine import cpu_products, outputs, products
from training.engine import policy as policy_module
from training.engine.adapters import POLICY
from training.engine.cpu_products import multiply
from training.engine.fused import fuse
from training.engine.outputs import fingerprint
from training.engine.policy import Placement, load_policy, use_fast_layout
from training.engine.products import widen
from training.engine.reference import reference_key

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
has_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch comes without oneDNN"
)


@pytest.fixture
def fast_amd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the processor is."""
    monkeypatch.setattr(cpu_products, "is_amd_with_avx512", lambda: True)
    cpu_products.prefers_onednn.cache_clear()
    yield
    cpu_products.prefers_onednn.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, fast_amd: None) -> list[tuple[int, ...]]:
    """Shapes of the weights that oneDNN's products were asked for; of any size."""
    seen: list[tuple[int, ...]] = []
    kernel: Kernel = cpu_products._onednn

    def watched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(weight.shape))
        return kernel(x, weight)

    monkeypatch.setattr(cpu_products, "WEIGHT", 0)
    monkeypatch.setattr(cpu_products, "SUMMED", 0)
    assert cpu_products.prefers_onednn()
    monkeypatch.setattr(cpu_products, "_onednn", watched)
    return seen


@has_onednn
@pytest.mark.parametrize("rows", [4, 7, 300])
@pytest.mark.parametrize(("summed", "columns"), [(576, 192), (100, 90), (64, 16), (1536, 576)])
def test_products_are_those_of_float32(
    calls: list[tuple[int, ...]], rows: int, summed: int, columns: int
) -> None:
    x, weight = torch.randn(rows, summed), torch.randn(columns, summed)
    exact = x.double() @ weight.double().T
    for left in (x, x.T.contiguous().T):
        for right in (weight, weight.T.contiguous().T):
            found = multiply(left, right)
            assert found.dtype == torch.float32
            assert (found.double() - exact).norm() / exact.norm() < 1e-6
    assert len(calls) == 4


@has_onednn
def test_small_products_other_types_and_no_rows_stay_with_torch(
    fast_amd: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise AssertionError("this product is not oneDNN's")

    assert cpu_products.prefers_onednn()
    monkeypatch.setattr(cpu_products, "_onednn", never)
    big = torch.randn(128, 512)
    assert multiply(torch.randn(5, 16), torch.randn(1024, 16)).shape == (5, 1024)
    assert multiply(torch.randn(5, 64), torch.randn(8, 64)).shape == (5, 8)
    for rows in (0, 1, 3):
        assert multiply(torch.randn(rows, 512), big).shape == (rows, 128)
    for dtype in (torch.float64, torch.bfloat16):
        assert multiply(torch.randn(5, 512).to(dtype), big.to(dtype)).dtype == dtype


@has_onednn
def test_where_autograd_watches_torch_multiplies(fast_amd: None) -> None:
    x, weight = torch.randn(4, 128, requires_grad=True), torch.randn(256, 128)
    multiply(x, weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, -1), rtol=1e-5, atol=1e-5)


def _rounded(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.bfloat16() @ weight.bfloat16().T).float()


def _gone(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such operator")


@pytest.mark.parametrize("kernel", [_rounded, _gone])
def test_a_kernel_that_rounds_more_or_is_not_there_is_not_taken(
    fast_amd: None, monkeypatch: pytest.MonkeyPatch, kernel: Kernel
) -> None:
    monkeypatch.setattr(cpu_products, "_onednn", kernel)
    assert not cpu_products.prefers_onednn()
    x, weight = torch.randn(4, 128), torch.randn(256, 128)
    assert torch.equal(multiply(x, weight), x @ weight.T)


CPUINFO = """\
processor	: 0
vendor_id	: {vendor}
flags		: fpu fma avx2 {flag}

processor	: 1
vendor_id	: {vendor}
"""


@pytest.mark.parametrize(
    ("vendor", "flag", "fast"),
    [("AuthenticAMD", "avx512f", True), ("GenuineIntel", "avx512f", False), ("AuthenticAMD", "sse4a", False)],
)
def test_it_is_taken_where_it_was_measured_to_be_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, flag: str, fast: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(vendor=vendor, flag=flag))
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu_products, "_onednn", lambda x, weight: x @ weight.T)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for cached in (processor.is_amd_with_avx512, cpu_products.prefers_onednn):
        cached.cache_clear()
    assert cpu_products.prefers_onednn() is fast
    (tmp_path / "cpuinfo").unlink()
    for cached in (processor.is_amd_with_avx512, cpu_products.prefers_onednn):
        cached.cache_clear()
    assert not cpu_products.prefers_onednn()
    for cached in (processor.is_amd_with_avx512, cpu_products.prefers_onednn):
        cached.cache_clear()


@has_onednn
def test_under_autocast_a_float32_layer_rounds_as_it_did(fast_amd: None) -> None:
    layer, plain = (nn.Linear(128, 96).requires_grad_(False) for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    assert widen(nn.ModuleList([layer])) == 1
    x = torch.randn(3, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(x))


@has_onednn
def test_trained_layers_are_left_alone(fast_amd: None) -> None:
    assert widen(nn.ModuleList([nn.Linear(128, 96)])) == 0


@has_onednn
def test_training_its_backward_pass_and_the_reference_are_computed_by_it_and_give_the_same(
    tmp_path: Path, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = wide_pairs(2, SMOLLM2.settings["vocab_size"], longest=20)
    folder = SMOLLM2.build(tmp_path)

    def results() -> tuple[torch.Tensor, torch.Tensor, dict[str, list[tuple[int, ...]]]]:
        config = tiny_config(folder, dtype="float32")
        policy = load_policy(config, Placement.choose(config), pairs[:1])
        use_fast_layout(policy, pairs)
        fuse(policy.model, POLICY)
        shapes = {}
        calls.clear()
        with policy.reference():
            reference = torch.cat(engine(policy, pairs))
        shapes["reference"] = list(calls)
        calls.clear()
        tokens = torch.cat(engine(policy, pairs))
        shapes["forward"] = list(calls)
        calls.clear()
        weights = list(policy.trainable.values())
        gradients = torch.autograd.grad(tokens.sum(), weights)
        shapes["backward"] = list(calls)
        assert torch.allclose(tokens.detach(), reference, atol=2e-5)
        return reference, torch.cat([gradient.flatten() for gradient in gradients]), shapes

    reference, gradient, shapes = results()
    hidden, inner, vocabulary = 96, 256, SMOLLM2.settings["vocab_size"]
    for where in ("reference", "forward"):
        assert {(inner, hidden), (hidden, inner), (vocabulary, hidden)} <= set(shapes[where])
    assert {(inner, hidden), (hidden, inner)} <= set(shapes["backward"])
    with monkeypatch.context() as without:
        for module in (cpu_products, products):
            without.setattr(module, "prefers_onednn", lambda: False)
        own_reference, own_gradient, none = results()
    assert not any(none.values())
    assert torch.allclose(reference, own_reference, atol=2e-5)
    assert (gradient - own_gradient).norm() / own_gradient.norm() < 1e-5


@has_onednn
@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_what_is_trained_and_its_reference_round_alike(
    tmp_path: Path, fast_amd: None, finetuning_type: str
) -> None:
    run = run_maker(tmp_path, build_tiny_model(tmp_path / "model", hidden_size=128))(
        max_steps=1, finetuning_type=finetuning_type, learning_rate=1e-6
    )
    assert run.train() == 0
    start = run.points("eval")[0]
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert start["eval_rewards/margins"] == start["eval_kl"] == start["eval_rewards/accuracies"] == 0


@has_onednn
def test_the_cache_and_a_checkpoint_know_who_multiplied(
    tmp_path: Path, fast_amd: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_maker(tmp_path, build_tiny_model(tmp_path / "model"))(max_steps=1)
    placement = Placement.choose(run.config)

    def facts() -> tuple[str, str]:
        policy = load_policy(run.config, placement, wide_pairs(1, 200, longest=9))
        return reference_key(policy), str(fingerprint(placement, "", run.config))

    by_onednn = facts()
    for module in (products, policy_module, outputs):
        monkeypatch.setattr(module, "prefers_onednn", lambda: False)
    assert not {*by_onednn} & {*facts()}
