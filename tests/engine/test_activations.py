"""A run decides from its own pairs and machine whether activations are kept, and says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.architectures import Architecture
from tests.engine.conftest import NewRun
from tests.engine.policies import tiny_config, tiny_data
from training import estimates
from training.activation_memory import bytes_per_layer, bytes_per_token
from training.engine import activations, estimating
from training.engine.activations import use_activations
from training.engine.adapters import POLICY
from training.engine.data import TokenizedPair
from training.engine.fused import fuse
from training.engine.policy import Placement, Policy, load_policy, use_fast_layout

# Shapes of SmolLM2, Qwen3 and Gemma 3 at a third of their width.
SHAPES: dict[str, Any] = {
    "smollm2": ("LlamaConfig", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "gemma3": ("Gemma3TextConfig", {"num_attention_heads": 4, "num_key_value_heads": 1}),
}


PLANNED_BY = ("dropout", "size", "fused", "rank", "dora")


def kept_bytes(policy: Policy, pairs: list[TokenizedPair]) -> int:
    """Distinct memory that autograd holds after a forward, weights aside."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in policy.model.parameters()}
    sizes, held = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(tensor)  # else its address could be another's soon
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    policy.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = policy.scorer(pairs)
    assert states.hidden.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("name", "dtype", "settings", "fused"),
    [
        ("smollm2", "float32", {}, True),
        ("smollm2", "float32", {"lora_dropout": 0.0}, True),
        ("smollm2", "bfloat16", {}, True),
        ("smollm2", "float32", {"target_modules": ["attention"], "lora_dropout": 0.0}, False),
        ("qwen3", "bfloat16", {"lora_dropout": 0.0}, True),
        ("qwen3", "float32", {}, True),
        ("gemma3", "float32", {"lora_dropout": 0.0}, False),
        ("gemma3", "bfloat16", {}, False),
        ("gemma3", "bfloat16", {"lora_dropout": 0.0}, False),
        ("gemma3", "bfloat16", {"lora_dropout": 0.0, "target_modules": ("attention",)}, False),
        ("smollm2", "float32", {"use_dora": True}, False),
        ("smollm2", "bfloat16", {"use_dora": True}, False),
        ("smollm2", "bfloat16", {"use_dora": True, "lora_dropout": 0.0}, False),
    ],
)
def test_the_plan_is_at_least_what_is_really_kept_and_not_much_more(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: str,
    settings: dict[str, Any],
    fused: bool,
) -> None:
    """As a run does it: packed, then fused. Two models of two and four layers: their difference is two layers."""
    planned: list[dict[str, Any]] = []
    real = activations.plan_activations

    def noted(shape: Any, **keywords: Any) -> Any:
        planned.append(keywords | {"shape": shape})
        return real(shape, **keywords)

    monkeypatch.setattr(activations, "plan_activations", noted)
    kept = []
    for layers in (2, 4):
        cls, heads = SHAPES[name]
        shape = {"hidden_size": 192, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": layers}
        folder = Architecture(cls, heads | shape).build(tmp_path / str(layers))
        config = tiny_config(folder, **({"dtype": dtype, "lora_r": 8, "lora_dropout": 0.05} | settings))
        pairs = tiny_data(folder, 4)
        policy = load_policy(config, Placement.choose(config), pairs[:1])
        assert "both of its answers" in use_fast_layout(policy, pairs)
        fuse(policy.model, POLICY)
        use_activations(policy, config, pairs)
        kept.append(kept_bytes(policy, pairs))
    assert planned[0]["fused"] is fused
    assert estimates.is_fused(planned[0]["shape"], dataclasses.asdict(config)) is fused
    planned_layer = bytes_per_layer(planned[0]["shape"], **{key: planned[0][key] for key in PLANNED_BY})
    measured = (kept[1] - kept[0]) / 2 / sum(pair.num_tokens for pair in pairs)
    assert 0.98 <= planned_layer / measured <= (1.25 if fused else 1.55)
    whole = bytes_per_token(
        planned[0]["shape"], checkpointed=False,
        **{key: planned[0][key] for key in PLANNED_BY},
    )  # fmt: skip
    assert whole * sum(pair.num_tokens for pair in pairs) > kept[0]


@pytest.mark.parametrize(("dtype", "bytes_per_number"), [("float32", 0), ("bfloat16", 2 + 4)])
def test_copies_of_the_head_are_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, bytes_per_number: int
) -> None:
    """In bfloat16 a CPU keeps the projection lower than the embeddings that it shares, and multiplies in float32."""
    planned: list[int] = []
    real = activations.plan_activations

    def watched(*arguments: Any, fixed_bytes: int, **keywords: Any) -> Any:
        planned.append(fixed_bytes)
        return real(*arguments, fixed_bytes=fixed_bytes, **keywords)

    monkeypatch.setattr(activations, "plan_activations", watched)
    folder = Architecture("LlamaConfig", {"vocab_size": 5000, "tie_word_embeddings": True}).build(tmp_path)
    config = tiny_config(folder, dtype=dtype)
    pairs = tiny_data(folder, 4)
    policy = load_policy(config, Placement.choose(config), pairs[:1])
    use_activations(policy, config, pairs)
    monkeypatch.setattr(activations, "_head_copies", lambda policy: 0)
    use_activations(policy, config, pairs)
    assert planned[0] - planned[1] == bytes_per_number * policy.head.weight.numel()


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
