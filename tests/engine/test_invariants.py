"""What must not matter: padding, layout, how a step is cut into micro-batches, and who continues a run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import NewRun
from tests.engine.policies import bend, gradients, summed, tiny_config, tiny_data, tiny_policy
from training.engine import loop
from training.engine.data import TokenizedPair
from training.engine.order import Order
from training.engine.plain import padded_states
from training.engine.policy import Policy

CPU = torch.device("cpu")


def naive_logps(policy: Policy, pair: TokenizedPair) -> list[float]:
    """The model's own logits, one sequence at a time, in float64."""
    values = []
    for side in (pair.chosen, pair.rejected):
        ids = torch.tensor([[*pair.prompt.tolist(), *side.tolist()]])
        logits = policy.model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(pair.prompt)
        values.append(sum(logits[start + i - 1, token].item() for i, token in enumerate(side.tolist())))
    return values


@pytest.mark.parametrize("packed", [False, True])
def test_logps_equal_a_naive_loop_over_single_sequences(tiny_model: Path, packed: bool) -> None:
    plain = tiny_policy(tiny_config(tiny_model), packed=False)
    pairs = tiny_data(tiny_model)
    with plain.inference():
        expected = torch.tensor([value for pair in pairs for value in naive_logps(plain, pair)]).double()
    policy = tiny_policy(tiny_config(tiny_model), packed=packed)
    with policy.inference():
        torch.testing.assert_close(summed(policy, pairs), expected, rtol=1e-6, atol=2e-5)


def test_padding_side_and_amount_do_not_change_logps(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_config(tiny_model), packed=False)
    pairs = tiny_data(tiny_model)
    with policy.inference():
        expected = summed(policy, pairs)
        for side, extra in (("left", 0), ("left", 13), ("right", 29)):
            policy.scorer.layout = functools.partial(padded_states, padding_side=side, extra_padding=extra)
            torch.testing.assert_close(summed(policy, pairs), expected, rtol=1e-6, atol=2e-5)


def test_prompt_tokens_are_never_counted(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_config(tiny_model))
    pairs = tiny_data(tiny_model)
    states = policy.scorer(pairs)
    assert len(states.labels) == sum(pair.num_completion_tokens for pair in pairs)
    expected = [token for pair in pairs for side in (pair.chosen, pair.rejected) for token in side.tolist()]
    assert states.labels.tolist() == expected


def test_bfloat16_is_near_float32(tiny_model: Path) -> None:
    pairs = tiny_data(tiny_model)
    exact = tiny_policy(tiny_config(tiny_model, dtype="float32"))
    coarse = tiny_policy(tiny_config(tiny_model, dtype="bfloat16"))
    with exact.inference(), coarse.inference():
        torch.testing.assert_close(summed(coarse, pairs), summed(exact, pairs), rtol=0.02, atol=0.5)
    summed(coarse, pairs).sum().backward()
    assert all(tensor.dtype == torch.float32 for tensor in coarse.trainable.values())
    assert bool(torch.isfinite(gradients(coarse)).all())


def test_checkpointed_activations_give_the_same_gradient(tiny_model: Path) -> None:
    found = []
    for switch in ("off", "on"):
        policy = tiny_policy(tiny_config(tiny_model, gradient_checkpointing=switch, lora_dropout=0.2))
        policy.model.train()
        torch.manual_seed(5)
        calls: list[int] = []
        mlp = policy.model.get_base_model().model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        summed(policy, tiny_data(tiny_model)).sum().backward()
        assert len(calls) == (2 if switch == "on" else 1)  # computed again, or not
        found.append(gradients(policy))
    torch.testing.assert_close(found[0], found[1])


def test_one_by_eight_equals_eight_by_one(new_run: NewRun) -> None:
    """Loss, gradient norm and weights, also on the short last step of an epoch (21 pairs: 8, 8, 5)."""
    runs = []
    for batch, accumulation in ((1, 8), (8, 1), (2, 4)):
        run = new_run(
            f"{batch}x{accumulation}", pairs=21, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, lora_dropout=0.0, num_train_epochs=2,
        )  # fmt: skip
        assert run.train() == 0
        runs.append(run)
    one, *others = (run.points("train") for run in runs)
    assert list(one) == [1, 2, 3, 4, 5, 6]
    for other in others:
        for step, values in one.items():
            assert values == pytest.approx(other[step], rel=2e-4, abs=2e-5), step


def test_a_token_budget_inside_the_batch_changes_nothing(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = []
    for budget in (100_000, 150):
        monkeypatch.setitem(loop.TRAIN_BUDGET, "cpu", budget)
        run = new_run(str(budget), per_device_train_batch_size=8, lora_dropout=0.0)
        assert run.train() == 0
        points.append(run.points("train"))
    for step, values in points[0].items():
        assert values == pytest.approx(points[1][step], rel=2e-4, abs=2e-5), step


def test_the_first_evaluation_is_ln_2_with_no_divergence(new_run: NewRun) -> None:
    run = new_run(max_steps=2)
    assert run.train() == 0
    first, last = run.points("eval")[0], run.points("eval")[2]
    assert first["eval_loss"] == pytest.approx(0.6931471805599453, abs=1e-9)
    assert first["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["eval_kl"] == pytest.approx(0, abs=1e-9)
    assert last["eval_kl"] > 0


def test_continuing_an_adapter_starts_at_ln_2_although_b_is_not_zero(new_run: NewRun) -> None:
    first = new_run("first", num_train_epochs=3, learning_rate=2e-2)
    assert first.train() == 0
    second = new_run("second", adapter_path=str(first.path / "adapter"), max_steps=3, learning_rate=2e-2)
    assert second.train() == 0
    start, end = second.points("eval")[0], second.points("eval")[3]
    assert start["eval_loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert start["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert start["eval_kl"] == pytest.approx(0, abs=1e-6)
    before, after = first.points("eval")[0], first.result["metrics"]
    assert start["eval_logps/chosen"] == pytest.approx(after["eval_logps/chosen"], rel=1e-5)
    assert start["eval_logps/chosen"] != pytest.approx(before["eval_logps/chosen"], rel=1e-2)
    assert end["eval_kl"] > 1e-6
    assert "adapter that training starts from" in second.result["reference"]
    assert second.result["adapter_sha256"] != first.result["adapter_sha256"]


def test_the_reference_of_a_continued_run_stays_frozen(new_run: NewRun, tiny_model: Path) -> None:
    first = new_run("first", max_steps=3, learning_rate=2e-2)
    assert first.train() == 0
    policy = tiny_policy(tiny_config(tiny_model, adapter_path=str(first.path / "adapter")), bent=False)
    names = set(policy.trainable)
    pairs = tiny_data(tiny_model)
    with policy.reference():
        before = summed(policy, pairs)
    bend(policy)
    with policy.reference():
        torch.testing.assert_close(summed(policy, pairs), before, rtol=0, atol=0)
    assert set(policy.trainable) == names
    assert not any("reference" in name for name in names)
    with policy.inference():
        assert not torch.allclose(summed(policy, pairs), before)


def test_an_adapter_for_another_base_is_refused(new_run: NewRun, tmp_path: Path) -> None:
    from tests.tiny import build_tiny_model

    first = new_run("first", max_steps=1)
    assert first.train() == 0
    other = build_tiny_model(tmp_path / "other", hidden_size=64)
    second = new_run("second", model_path=str(other), adapter_path=str(first.path / "adapter"))
    assert second.train() == 2
    assert "does not fit the base model" in second.result["error"]


def test_every_pair_is_seen_once_an_epoch_in_an_order_of_the_seed() -> None:
    order = Order(num_pairs=21, batch_size=2, accumulation=4, num_epochs=2, max_steps=0, seed=3)
    assert (order.steps_per_epoch, order.total_steps) == (3, 6)
    epochs = [[i for s in range(e * 3, e * 3 + 3) for m in order.micro_batches(s) for i in m] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(21))
    assert epochs[0] != epochs[1]
    assert [order.epoch_after(step) for step in (0, 3, 6)] == [0, 1, 2]
    other: Any = Order(num_pairs=21, batch_size=2, accumulation=4, num_epochs=2, max_steps=0, seed=4)
    assert other.micro_batches(0) != order.micro_batches(0)


def test_the_pairs_a_run_meets_are_those_of_its_steps() -> None:
    for epochs in (0.1, 0.5, 1, 1.5):
        order = Order(num_pairs=21, batch_size=2, accumulation=2, num_epochs=epochs, max_steps=0, seed=3)
        steps = range(order.total_steps)
        assert order.pairs_met() == sorted({i for s in steps for m in order.micro_batches(s) for i in m})
