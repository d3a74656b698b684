"""The fused modules give what peft and transformers give, keep less, and leave alone what is not theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.policies import bend, gradients, tiny_config, tiny_data, tiny_policy
from training.engine.adapters import POLICY
from training.engine.fused import Lora, _GatedLoraLinear, _LoraLinear, _RmsNorm, fuse
from training.engine.logps import token_logps
from training.engine.policy import Policy

ROWS, WIDE, NARROW, RANK = 5, 6, 4, 2


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def seeded(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same dropout each time that gradcheck calls it."""

    def call(*arguments: Any) -> torch.Tensor:
        torch.manual_seed(3)
        return function(*arguments)

    return call


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_of_a_lora_layer(dropout: float, biased: bool) -> None:
    weight = drawn(WIDE, NARROW).detach()
    lora = Lora(weight, weight[:, 0].clone() if biased else None, 0.7, dropout)
    inputs = (drawn(2, ROWS, NARROW), drawn(RANK, NARROW), drawn(WIDE, RANK))
    assert torch.autograd.gradcheck(seeded(lambda *x: _LoraLinear.apply(*x, lora)), inputs)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_a_gated_mlp(dropout: float) -> None:
    lora = Lora(drawn(NARROW, WIDE).detach(), None, 0.7, dropout)
    inputs = (drawn(1, ROWS, WIDE), drawn(1, ROWS, WIDE), drawn(RANK, WIDE), drawn(NARROW, RANK))
    assert torch.autograd.gradcheck(seeded(lambda *x: _GatedLoraLinear.apply(*x, lora)), inputs)  # type: ignore[no-untyped-call]


def test_gradients_of_an_rms_norm() -> None:
    weight = drawn(NARROW).detach()
    norm = lambda x: _RmsNorm.apply(x, weight, 1e-5)  # type: ignore[no-untyped-call]  # noqa: E731
    assert torch.autograd.gradcheck(norm, (drawn(2, ROWS, NARROW),))


def test_dropout_keeps_the_mean_and_hits_the_adapter_only() -> None:
    torch.manual_seed(0)
    x, weight = torch.ones(4000, 8), torch.zeros(3, 8)
    a, b = torch.ones(1, 8), torch.ones(3, 1)
    y = _LoraLinear.apply(x, a, b, Lora(weight, None, 1.0, 0.25))  # type: ignore[no-untyped-call]
    assert y.mean().item() == pytest.approx(8.0, rel=0.02)
    assert y.std().item() > 1
    frozen = _LoraLinear.apply(x, a, b * 0, Lora(weight + 1, None, 1.0, 0.25))  # type: ignore[no-untyped-call]
    assert frozen.unique().tolist() == [8.0]


def policies(model: Path, **settings: Any) -> tuple[Policy, Policy, int]:
    """Two with the same bent adapter: as peft has it, and fused."""
    plain, fused = (tiny_policy(tiny_config(model, **settings), bent=False) for _ in range(2))
    count = fuse(fused.model, POLICY)
    for policy in (plain, fused):
        bend(policy)
        policy.model.train()
    return plain, fused, count


def scored(policy: Policy, model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    states = policy.scorer(tiny_data(model))
    logps = token_logps(states.hidden, states.labels, policy.head)
    logps.sum().backward()  # type: ignore[no-untyped-call]
    return logps.detach(), gradients(policy)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_log_probabilities_and_gradients_are_those_of_peft(tiny_model: Path, checkpointed: bool) -> None:
    plain, fused, count = policies(tiny_model)
    layers = fused.model.config.num_hidden_layers
    assert count == layers * (7 + 1 + 2) + 1, "seven linears, the gated MLP, two norms, and the last norm"
    if checkpointed:
        fused.model.get_base_model().activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    (expected, expected_gradient), (found, gradient) = (scored(p, tiny_model) for p in (plain, fused))
    assert (found - expected).abs().max() < 1e-5
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-5


def test_the_reference_and_evaluation_are_untouched(tiny_model: Path) -> None:
    plain, fused, _ = policies(tiny_model)
    pairs = tiny_data(tiny_model)
    for inside in ("reference", "inference"):
        hidden = []
        for policy in (plain, fused):
            with getattr(policy, inside)():
                hidden.append(policy.scorer(pairs).hidden)
        assert torch.equal(*hidden), inside


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.8), (0.1, 0.65)])
def test_less_is_kept_for_the_backward_pass(tiny_model: Path, dropout: float, share: float) -> None:
    kept = []
    for policy in policies(tiny_model, lora_dropout=dropout)[:2]:
        weights = {tensor.untyped_storage().data_ptr() for tensor in policy.model.parameters()}
        seen: dict[int, tuple[int, torch.Tensor]] = {}

        def note(tensor: torch.Tensor, seen: Any = seen, weights: Any = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            policy.scorer(tiny_data(tiny_model))
        kept.append(sum(size for size, _ in seen.values()))
    assert kept[1] < share * kept[0], kept


class Gelu(nn.Module):
    """Names as a gated MLP has them, another activation."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj, mlp.up_proj, mlp.down_proj, nn.GELU()
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ShiftedRMSNorm(nn.Module):
    """Gemma's way: 1 + weight."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return scaled * (1 + self.weight)


class GatedRMSNorm(nn.Module):
    """As hybrid models have it: without its gate the same as any other."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        x = x if gate is None else x * nn.functional.silu(gate)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def test_what_computes_otherwise_is_left_alone(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_config(tiny_model), bent=False)
    layer = policy.scorer.decoder.layers[0]  # type: ignore[union-attr,index]
    gelu, shifted = Gelu(layer.mlp), ShiftedRMSNorm(layer.input_layernorm)
    with torch.no_grad():
        layer.mlp.gate_proj.base_layer.weight.mul_(1e-3)  # near 0 a GELU looks like a SiLU
    for module in (gelu, shifted, GatedRMSNorm(layer.input_layernorm)):
        assert fuse(copy.deepcopy(module), "nobody") == 0
    alone = nn.ModuleList([gelu])
    assert fuse(alone, POLICY) == 3, "its three linears"
    assert "forward" not in vars(gelu)


def test_dora_is_left_alone(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    fuse(model, "default")
    assert not [
        name for name, module in model.named_modules() if "forward" in vars(module) and "norm" not in name
    ]


def test_a_merged_adapter_is_not_added_again(tiny_model: Path) -> None:
    policy, pairs = tiny_policy(tiny_config(tiny_model)), tiny_data(tiny_model, 2)
    fuse(policy.model, POLICY)
    policy.model.eval()
    before = policy.scorer(pairs).hidden.detach()
    policy.model.merge_adapter()
    torch.testing.assert_close(policy.scorer(pairs).hidden.detach(), before, rtol=1e-4, atol=1e-5)
