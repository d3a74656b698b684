"""bfloat16: lowered matrices with float32 between them are nearer to the truth than TRL's way.

TRL keeps weights in float32 and computes under autocast, logits too. Measured on what a loss is made of, the
summed log-probabilities of answers, and on gradients, over several pairs: one loss is a matter of luck.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.architectures import ARCHITECTURES, Architecture
from tests.engine.policies import bend, tiny_config
from tests.engine.test_architectures import in_float64
from tests.starter import starter_folder
from training.engine import fused
from training.engine.adapters import POLICY
from training.engine.data import TokenizedPair
from training.engine.fused import fuse
from training.engine.logps import token_logps
from training.engine.policy import Placement, Policy, load_policy, use_fast_layout

# Most that our error may be of TRL's: of summed log-probabilities, and of gradients. Products of a CPU are in
# float32; those of a GPU round their operands, but not what they give.
OF_TRLS = {"cpu": (0.6, 0.8), "cuda": (1.0, 0.95)}

SMOLLM2 = Architecture(
    "LlamaConfig",
    {
        "vocab_size": 49_152, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "initializer_range": 0.04,
    },
)  # fmt: skip


def wide_pairs(count: int, vocabulary: int, longest: int) -> list[TokenizedPair]:
    draw = np.random.default_rng(5)

    def ids() -> Any:
        return draw.integers(3, vocabulary, size=int(draw.integers(8, longest))).astype(np.int32)

    return [TokenizedPair(str(number), ids(), ids(), ids()) for number in range(count)]


def kept_low(folder: Path) -> Path:
    """The checkpoint as most are published: in bfloat16, so that lowering it loses nothing."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def own_logits(model: Any, pairs: list[TokenizedPair]) -> list[torch.Tensor]:
    """log p of each completion's tokens from `model(...).logits`, one sequence at a time."""
    found = []
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):
            ids = torch.tensor([[*pair.prompt.tolist(), *side.tolist()]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0]
            logps = torch.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=-1)
            tokens = logps[:-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
            found.append(tokens[len(pair.prompt) - 1 :])
    return found


def engine(policy: Policy, pairs: list[TokenizedPair]) -> list[torch.Tensor]:
    states = policy.scorer(pairs)
    values = token_logps(states.hidden, states.labels, policy.head)
    return [values[states.owner == number] for number in range(2 * len(pairs))]


def gradients_of(tokens: list[torch.Tensor], model: Any) -> list[torch.Tensor]:
    """For each pair that of log p(chosen) - log p(rejected)."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for chosen, rejected in zip(tokens[0::2], tokens[1::2], strict=True):
        parts = torch.autograd.grad(chosen.sum() - rejected.sum(), weights, retain_graph=True)
        found.append(torch.cat([part.flatten().double().cpu() for part in parts]))
    return found


def summed(tokens: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([answer.detach().double().sum().cpu() for answer in tokens])


def distance(tokens: list[torch.Tensor], model: Any, truth: Any) -> tuple[float, float]:
    """Error of an answer's summed log-probability, nats, root mean square; the gradient's, relative, mean."""
    differences = summed(tokens) - truth[0]
    relative = [
        float((ours - exact).norm() / exact.norm())
        for ours, exact in zip(gradients_of(tokens, model), truth[1], strict=True)
    ]
    return float(differences.square().mean().sqrt()), sum(relative) / len(relative)


def loaded(folder: Path, pairs: list[TokenizedPair], **settings: Any) -> Policy:
    config = tiny_config(folder, **settings)
    policy = load_policy(config, Placement.choose(config), pairs[:1])
    bend(policy)
    policy.model.eval()
    return policy


def compare(
    folder: Path, pairs: list[TokenizedPair], device: str, *, exactly: torch.dtype
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Distances from the truth: ours in bfloat16, and autocast over float32 weights, as TRL does it."""
    full = loaded(folder, pairs, device=device, dtype="float32")
    exact = in_float64(full) if exactly == torch.float64 else copy.deepcopy(full.model).eval()
    tokens = own_logits(exact, pairs)
    truth = summed(tokens), gradients_of(tokens, exact)
    with torch.autocast(device, dtype=torch.bfloat16):
        theirs = own_logits(full.model, pairs)
    their_distance = distance(theirs, full.model, truth)
    low = loaded(folder, pairs, device=device, dtype="bfloat16")
    use_fast_layout(low, pairs)
    fuse(low.model, POLICY)
    return distance(engine(low, pairs), low.model, truth), their_distance


def assert_nearer(found: tuple[tuple[float, float], tuple[float, float]], kind: str) -> None:
    ours, theirs = found
    print(f"bfloat16 on {kind}: ours {ours}, autocast {theirs}")
    assert ours[0] < OF_TRLS[kind][0] * theirs[0] and ours[1] < OF_TRLS[kind][1] * theirs[1]


@pytest.mark.slow
def test_log_probabilities_and_gradients_are_nearer_to_the_truth_than_trls(
    tmp_path: Path, device: str
) -> None:
    pairs = wide_pairs(5, SMOLLM2.settings["vocab_size"], longest=50)
    assert_nearer(compare(kept_low(SMOLLM2.build(tmp_path)), pairs, device, exactly=torch.float64), device)


def test_with_the_products_of_a_gpu_they_are_too(tmp_path: Path, like_a_gpu: None) -> None:
    pairs = wide_pairs(2, SMOLLM2.settings["vocab_size"], longest=30)
    assert_nearer(compare(kept_low(SMOLLM2.build(tmp_path)), pairs, "cpu", exactly=torch.float64), "cuda")


@pytest.mark.slow
def test_those_of_the_starter_model_are_nearer_to_the_truth_than_trls(device: str) -> None:
    pairs = wide_pairs(3, 49_000, longest=30)
    assert_nearer(compare(starter_folder(), pairs, device, exactly=torch.float32), device)


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_policy_and_reference_are_one_before_the_first_step(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Whether a layer carries an adapter or not, and whether gradients are asked for, it rounds the same."""
    pairs = wide_pairs(2, SMOLLM2.settings["vocab_size"], longest=20)
    config = tiny_config(kept_low(SMOLLM2.build(tmp_path)), dtype="bfloat16", target_modules=targets)
    policy = load_policy(config, Placement.choose(config), pairs[:1])
    use_fast_layout(policy, pairs)
    fuse(policy.model, POLICY)
    assert_one(policy, pairs)


def assert_one(policy: Policy, pairs: list[TokenizedPair]) -> None:
    """What is trained, what is evaluated, and the reference."""
    ours = torch.cat(engine(policy, pairs))
    with policy.inference():
        evaluated = torch.cat(engine(policy, pairs))
    with policy.reference():
        reference = torch.cat(engine(policy, pairs))
    assert ours.requires_grad and not reference.requires_grad
    torch.testing.assert_close(ours.detach(), evaluated, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.detach(), reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("products_of", ["cpu", "gpu"])
def test_they_are_one_where_an_adapter_is_trained_on(
    tmp_path: Path, request: pytest.FixtureRequest, products_of: str, use_dora: bool
) -> None:
    if products_of == "gpu":
        request.getfixturevalue("like_a_gpu")
    pairs = wide_pairs(2, SMOLLM2.settings["vocab_size"], longest=20)
    folder = kept_low(SMOLLM2.build(tmp_path / "model"))
    first = tiny_config(folder, dtype="bfloat16", use_dora=use_dora)
    made = load_policy(first, Placement.choose(first), pairs[:1])
    bend(made)
    made.model.save_pretrained(tmp_path / "adapter")
    config = dataclasses.replace(first, adapter_path=str(tmp_path / "adapter"))
    policy = load_policy(config, Placement.choose(config), pairs[:1])
    use_fast_layout(policy, pairs)
    fuse(policy.model, POLICY)
    assert_one(policy, pairs)


def test_a_new_dora_starts_as_its_base(tmp_path: Path) -> None:
    pairs = wide_pairs(2, SMOLLM2.settings["vocab_size"], longest=20)
    config = tiny_config(kept_low(SMOLLM2.build(tmp_path)), dtype="bfloat16", use_dora=True)
    policy = load_policy(config, Placement.choose(config), pairs[:1])
    use_fast_layout(policy, pairs)
    assert_one(policy, pairs)


def test_norms_and_mlps_of_low_weights_are_taken_over_after_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = wide_pairs(1, SMOLLM2.settings["vocab_size"], longest=10)
    config = tiny_config(kept_low(SMOLLM2.build(tmp_path)), dtype="bfloat16")
    layers = SMOLLM2.settings["num_hidden_layers"]
    assert (
        fuse(load_policy(config, Placement.choose(config), pairs).model, POLICY) == layers * (7 + 1 + 2) + 1
    )
    wrong = staticmethod(lambda ctx, gate, *_: gate.new_full((*gate.shape[:-1], 96), 7.0))
    monkeypatch.setattr(fused._GatedLoraLinear, "forward", wrong)
    assert fuse(load_policy(config, Placement.choose(config), pairs).model, POLICY) == layers * (7 + 2) + 1


def test_the_cache_knows_how_a_reference_rounded(tmp_path: Path) -> None:
    pairs = wide_pairs(1, SMOLLM2.settings["vocab_size"], longest=10)
    folder = SMOLLM2.build(tmp_path)
    low, full = (loaded(folder, pairs, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert "between" in low.numerics and "between" not in full.numerics


def test_what_autocast_keeps_in_float32_is_kept_where_the_checkpoint_has_it(tmp_path: Path) -> None:
    pairs = wide_pairs(1, SMOLLM2.settings["vocab_size"], longest=10)
    policy = loaded(SMOLLM2.build(tmp_path), pairs, device="cpu", dtype="bfloat16")
    dtypes = {name: tensor.dtype for name, tensor in policy.model.get_base_model().named_parameters()}
    low = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert low and all("proj.base_layer" in name for name in low)
    assert not any("norm" in name or "embed" in name for name in low)
    assert policy.head.weight.dtype == torch.bfloat16


def test_layer_norms_of_low_checkpoints_run_on_a_cpu(tmp_path: Path) -> None:
    """torch's kernel there refuses float32 rows beside bfloat16 weights."""
    pairs = wide_pairs(2, 200, longest=20)
    config = tiny_config(kept_low(ARCHITECTURES["phi"].build(tmp_path)), dtype="bfloat16")
    policy = load_policy(config, Placement.choose(config), pairs[:1])
    use_fast_layout(policy, pairs)
    assert_one(policy, pairs)
