"""Every architecture: the layout that is chosen gives what the model's own logits give, one sequence at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.architectures import ARCHITECTURES, uneven_pairs
from tests.engine.policies import bend, tiny_config
from training.engine.data import TokenizedPair
from training.engine.logps import token_logps
from training.engine.objective import Objective, PairLogps
from training.engine.packed import packed_states
from training.engine.policy import Placement, Policy, load_policy, use_fast_layout

BETA = 0.3


def plain_loss(model: Any, pairs: list[TokenizedPair]) -> tuple[torch.Tensor, torch.Tensor]:
    """DPO's loss as it is written in the paper, from `model(...).logits`; and the log-probabilities [2 B]."""

    def logps() -> list[torch.Tensor]:
        values = []
        for pair in pairs:
            for side in (pair.chosen, pair.rejected):
                ids = torch.tensor([[*pair.prompt.tolist(), *side.tolist()]], device=model.device)
                logits = model(input_ids=ids, use_cache=False).logits[0].double()
                tokens = torch.log_softmax(logits, dim=-1)[:-1].gather(-1, ids[0, 1:, None])
                values.append(tokens[len(pair.prompt) - 1 :].sum())
        return values

    policy = torch.stack(logps())
    with torch.no_grad(), model.disable_adapter():
        reference = torch.stack(logps())
    ratios = (policy - reference).view(-1, 2)
    margins = BETA * (ratios[:, 0] - ratios[:, 1])
    return -torch.nn.functional.logsigmoid(margins).mean(), policy


def engine_loss(policy: Policy, pairs: list[TokenizedPair]) -> tuple[torch.Tensor, torch.Tensor]:
    def tokens() -> tuple[Any, torch.Tensor]:
        states = policy.scorer(pairs)
        return states, token_logps(states.hidden, states.labels, policy.head)

    states, values = tokens()
    with policy.reference():
        reference = tokens()[1]
    logps = PairLogps.of(states, values, reference)
    loss = Objective(tiny_config(Path(), beta=BETA)).losses(logps, tokens_per_pair=1.0).mean()
    return loss, torch.stack([logps.policy_chosen, logps.policy_rejected], dim=1).flatten()


def gradients_of(loss: torch.Tensor, model: Any) -> torch.Tensor:
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([tensor.flatten().double().cpu() for tensor in found])


def in_float64(policy: Policy) -> Any:
    """A copy with the attention that the model came with, before any layout was chosen for it."""
    model = copy.deepcopy(policy.model).double()
    base = model.get_base_model()
    base.set_attn_implementation("eager")
    if base._can_set_experts_implementation():
        base.set_experts_implementation("eager")
    return model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_chosen_layout_equals_the_models_own_logits(name: str, tmp_path: Path, device: str) -> None:
    architecture, pairs = ARCHITECTURES[name], uneven_pairs()
    config = tiny_config(architecture.build(tmp_path), beta=BETA, device=device, dtype="float32")
    policy = load_policy(config, Placement.choose(config), pairs[:1])
    bend(policy)
    policy.model.eval()
    exact = in_float64(policy)
    sentence = use_fast_layout(policy, pairs)
    assert (policy.scorer.layout is packed_states) == architecture.packed, sentence
    assert architecture.reason in sentence

    expected, expected_logps = plain_loss(exact, pairs)
    loss, logps = engine_loss(policy, pairs)
    assert abs(expected.item() - 0.6931) > 1e-3  # an adapter that does nothing would prove nothing
    torch.testing.assert_close(logps.cpu(), expected_logps.cpu(), rtol=2e-6, atol=2e-5)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    theirs, ours = gradients_of(expected, exact), gradients_of(loss, policy.model)
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4
