"""The auxiliary loss of a mixture of experts is transformers' own, over the stated batch, in every layout."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.architectures import ARCHITECTURES, uneven_pairs
from tests.engine.conftest import NewRun, run_maker
from tests.engine.policies import bend, gradients, tiny_config, tiny_data, tiny_policy
from tests.engine.test_trl import BETA, trl_trainer
from training.engine import evaluate, evaluation, loop
from training.engine.data import TokenizedPair
from training.engine.errors import RefusedError
from training.engine.logps import token_logps
from training.engine.metrics import Window
from training.engine.objective import Objective, PairLogps
from training.engine.packed import packed_states
from training.engine.plain import padded_states, single_states
from training.engine.policy import Placement, Policy, load_policy, use_fast_layout
from training.engine.routing import LoadBalance, Routing

COEFFICIENT = 0.5


@pytest.fixture(scope="module", params=["qwen3-moe", "mixtral"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = ARCHITECTURES[request.param].build(tmp_path_factory.mktemp("moe"))
    config = tiny_config(folder)
    pairs = uneven_pairs()
    loaded = load_policy(config, Placement.choose(config), pairs[:1])
    bend(loaded)
    loaded.model.eval()
    assert "both of its answers" in use_fast_layout(loaded, pairs)
    return loaded


def theirs(policy: Policy, *, masked: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own loss over the padded rows of the whole batch, and its gradient."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    pairs = uneven_pairs()
    rows = [[*pair.prompt, *side] for pair in pairs for side in (pair.chosen, pair.rejected)]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    outputs = policy.scorer.decoder(
        input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True
    )
    config = policy.scorer.decoder.config
    loss = load_balancing_loss_func(
        outputs.router_logits, config.num_local_experts if config.model_type == "mixtral" else config.num_experts,
        config.num_experts_per_tok, mask if masked else None,
    )  # fmt: skip
    assert isinstance(loss, torch.Tensor)
    policy.model.zero_grad()
    loss.backward()
    return loss.detach(), gradients(policy)


def ours(policy: Policy, layout: Any, cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """By forwards of so many pairs each: the step's loss less its objective of 0, and its gradient."""
    pairs, forwards = uneven_pairs(), []
    for cut in cuts:
        forwards.append(pairs[:cut])
        pairs = pairs[cut:]
    policy.scorer.layout = layout
    balance = LoadBalance.of(policy.scorer, COEFFICIENT)
    assert balance is not None
    policy.model.zero_grad()
    balance.begin(forwards, policy.scorer, lambda: None)
    total = torch.zeros(())
    for batch in forwards:
        losses = balance.added(torch.zeros(len(batch)), policy.scorer(batch).routing)
        (losses.sum() / 4).backward()
        total = total + losses.detach().sum() / 4
    aux = LoadBalance.values([balance.end()])["aux_loss"]
    assert aux == pytest.approx(total.item() / COEFFICIENT, rel=1e-6)
    return total / COEFFICIENT, gradients(policy) / COEFFICIENT


@pytest.mark.parametrize("cuts", [[4], [1, 3], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("layout", [packed_states, padded_states, single_states])
def test_it_is_the_one_of_transformers_however_the_batch_is_cut(
    policy: Policy, layout: Any, cuts: list[int]
) -> None:
    expected, expected_gradient = theirs(policy)
    loss, gradient = ours(policy, layout, cuts)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected_gradient.norm() > 1e-3
    assert ((gradient - expected_gradient).norm() / expected_gradient.norm()).item() < 1e-4


def test_activation_checkpointing_changes_nothing(policy: Policy) -> None:
    _, expected = ours(policy, packed_states, [1, 3])
    base = policy.model.get_base_model()
    policy.model.train()
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    _, gradient = ours(policy, packed_states, [1, 3])
    base.activation_checkpointing_disable()
    policy.model.eval()
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-6


def test_padding_would_change_it(policy: Policy) -> None:
    assert abs((theirs(policy)[0] - theirs(policy, masked=False)[0]).item()) > 1e-3


def test_the_coefficient_is_the_models_own_unless_another_is_asked_for(policy: Policy) -> None:
    own = policy.scorer.decoder.config.router_aux_loss_coef
    assert own > 0
    found = [LoadBalance.of(policy.scorer, asked) for asked in (None, 0.25)]
    assert [balance.coefficient for balance in found if balance] == [own, 0.25]
    assert LoadBalance.of(policy.scorer, 0.0) is None


def test_a_model_without_experts_has_nothing_to_balance(tiny_model: Path) -> None:
    config = tiny_config(tiny_model)
    plain = load_policy(config, Placement.choose(config), uneven_pairs()[:1])
    assert LoadBalance.of(plain.scorer, None) is None
    with pytest.raises(RefusedError, match="have no experts"):
        LoadBalance.of(plain.scorer, 0.1)


def test_a_run_reports_it_and_its_loss_has_it_however_the_batch_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: NewRun = run_maker(tmp_path, ARCHITECTURES["qwen3-moe"].build(tmp_path / "model"))
    points = {}
    for name, budget, coefficient in (("whole", 100_000, 1.0), ("cut", 100, 1.0), ("without", 100_000, 0.0)):
        monkeypatch.setitem(loop.TRAIN_BUDGET, "cpu", budget)
        run = make(
            name, pairs=8, eval_pairs=2, lora_dropout=0.0, router_aux_loss_coef=coefficient, max_steps=2,
            target_modules=["q_proj", "v_proj"],
        )  # fmt: skip
        assert run.train() == 0, run.result
        points[name] = run.points("train")
    first, without = points["whole"][1], points["without"][1]
    assert "aux_loss" not in without
    assert first["loss"] == pytest.approx(without["loss"] + first["aux_loss"], rel=1e-6)
    for step, values in points["whole"].items():
        assert values == pytest.approx(points["cut"][step], rel=2e-4, abs=2e-5), step


def test_the_loss_of_an_evaluation_is_what_a_step_over_the_same_pairs_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight pairs, one batch, the weights before step 1; the evaluation cut into several forwards as well."""
    make: NewRun = run_maker(tmp_path, ARCHITECTURES["qwen3-moe"].build(tmp_path / "model"))
    found = []
    for name, budget in (("whole", 100_000), ("cut", 300)):
        monkeypatch.setattr(evaluation, "token_budget", lambda placement, budget=budget: budget)
        run = make(
            name, pairs=8, eval_path=str(tmp_path / "train-8.jsonl"), per_device_train_batch_size=8, max_steps=1,
            gradient_accumulation_steps=1, lora_dropout=0.0, router_aux_loss_coef=0.5, target_modules=["q_proj"],
        )  # fmt: skip
        assert run.train() == 0, run.result
        step, found_here = run.points("train")[1], run.points("eval")
        assert step["aux_loss"] > 1
        assert found_here[0]["eval_aux_loss"] == pytest.approx(step["aux_loss"], rel=1e-5)
        assert found_here[0]["eval_loss"] == pytest.approx(step["loss"], rel=1e-5)
        assert found_here[0]["eval_loss"] == pytest.approx(math.log(2) + 0.5 * step["aux_loss"], rel=1e-5)
        found.append(found_here[1])
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
    assert evaluate(run.path)["metrics"] == pytest.approx(
        {key: value for key, value in found[1].items() if "watch" not in key}, rel=1e-4, abs=1e-6
    )


def test_shares_of_an_evaluation_have_the_routing_of_the_whole() -> None:
    draw = torch.Generator().manual_seed(1)
    parts = [Routing(*torch.rand(2, 4, generator=draw), torch.tensor(float(n))) for n in (3, 5)]
    windows = [Window(Objective(tiny_config(Path()))) for _ in parts]
    nothing = torch.zeros(1, dtype=torch.float64)
    logps = PairLogps(nothing, nothing, nothing, nothing + 1, nothing + 1, nothing, nothing, nothing)
    for window, part in zip(windows, parts, strict=True):
        window.add(nothing, logps)
        window.add_routing(part)
    merged = Window.merged(windows[0].objective, [window.state() for window in windows])
    assert merged.values()["aux_loss"] == pytest.approx(float(parts[0].joined(parts[1]).aux_loss), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_agree_with_trl(tmp_path: Path, packed: bool) -> None:
    """An adapter on attention, experts and router; TRL adds its auxiliary loss with the same coefficient."""
    model, count = ARCHITECTURES["qwen3-moe"].build(tmp_path / "model"), 5
    policy = tiny_policy(tiny_config(model), packed=packed)
    trainer = trl_trainer(model, count, tmp_path, router_aux_loss_coef=COEFFICIENT)
    their_weights = {
        name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad
    }
    assert set(their_weights) == set(policy.trainable)
    assert any("experts" in name for name in their_weights) and any("gate" in name for name in their_weights)
    with torch.no_grad():
        for name, tensor in policy.trainable.items():
            their_weights[name].copy_(tensor)
    loss = trainer.compute_loss(trainer.model, dict(next(iter(trainer.get_train_dataloader()))))
    loss.backward()
    expected = torch.cat([their_weights[name].grad.flatten() for name in policy.trainable])

    pairs = tiny_data(model, count)
    balance = LoadBalance.of(policy.scorer, COEFFICIENT)
    assert balance is not None
    balance.begin([pairs], policy.scorer, lambda: None)
    losses, states = objective_losses(policy, pairs)
    balance.added(losses, states.routing).mean().backward()
    assert losses.mean().item() != pytest.approx(loss.item(), rel=1e-3)  # the auxiliary part is not nothing
    aux = LoadBalance.values([balance.end()])["aux_loss"]
    assert losses.mean().item() + COEFFICIENT * (aux or 0.0) == pytest.approx(loss.item(), rel=1e-5)
    assert ((gradients(policy) - expected).norm() / expected.norm()).item() < 1e-4


def objective_losses(policy: Policy, pairs: list[TokenizedPair]) -> tuple[torch.Tensor, Any]:
    states = policy.scorer(pairs)
    tokens = token_logps(states.hidden, states.labels, policy.head)
    with policy.reference():
        before = policy.scorer(pairs)
        reference = token_logps(before.hidden, before.labels, policy.head)
    config = dataclasses.replace(tiny_config(Path()), beta=BETA)
    return Objective(config).losses(PairLogps.of(states, tokens, reference), tokens_per_pair=1.0), states
