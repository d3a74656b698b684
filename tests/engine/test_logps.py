"""Log-probabilities, their gradient and the divergence against naive loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training.engine import logps
from training.engine.logps import Head, sampled_kl, sum_by_owner, token_logps

ROWS, WIDTH, VOCABULARY = 37, 16, 211


def draws(dtype: torch.dtype, **head: Any) -> tuple[torch.Tensor, torch.Tensor, Head]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return hidden.requires_grad_(), labels, Head(weight, None, **head)


def naive(hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.stack(
        [row[label] - torch.logsumexp(row, 0) for row, label in zip(logits, labels, strict=True)]
    )


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"scale": 2.0, "softcap": 5.0}])
@pytest.mark.parametrize("chunk", [5, 256])
def test_values_and_gradients_equal_a_naive_loop(
    head: dict[str, float], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logps, "CHUNK_ROWS", chunk)
    hidden, labels, output = draws(torch.float64, **head)
    upstream = torch.linspace(-2, 3, ROWS, dtype=torch.float64)
    values = token_logps(hidden, labels, output)
    (values * upstream).sum().backward()
    ours, hidden.grad = hidden.grad, None
    expected = naive(hidden, labels, output)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, hidden.grad, rtol=1e-10, atol=1e-10)


def test_float32_is_close_to_float64() -> None:
    hidden, labels, output = draws(torch.float32)
    values = token_logps(hidden, labels, output)
    torch.testing.assert_close(values.double(), naive(hidden, labels, output), rtol=1e-6, atol=1e-6)


def test_summing_many_tokens_loses_nothing() -> None:
    values = torch.full((10_000,), -0.1, dtype=torch.float32)
    total = sum_by_owner(values, torch.zeros(10_000, dtype=torch.int64), 2)
    assert total[0].item() == pytest.approx(10_000 * float(values[0]), rel=1e-12)
    assert total[1].item() == 0.0


def test_sampled_divergence_converges_to_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.log_softmax(torch.randn(20, generator=generator, dtype=torch.float64), 0)
    noise = torch.randn(20, generator=generator, dtype=torch.float64)
    policy = torch.log_softmax(reference + 0.5 * noise, 0)
    exact = (policy.exp() * (policy - reference)).sum().item()
    tokens = torch.multinomial(reference.exp(), 200_000, replacement=True, generator=generator)
    estimate = sampled_kl(policy[tokens], reference[tokens])
    assert bool((estimate >= 0).all())
    assert estimate.mean().item() == pytest.approx(exact, rel=0.02)


def test_sampled_divergence_stays_small_on_tokens_made_unlikely() -> None:
    assert sampled_kl(torch.tensor([-200.0]), torch.tensor([-1.0])).item() == pytest.approx(1.0)


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"scale": 2.0, "softcap": 5.0}])
@pytest.mark.parametrize("bias", [False, True])
def test_a_trained_projection_gets_the_gradient_of_plain_autograd(
    head: dict[str, float], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is tied: the embedding's gradient comes from the input and from the projection."""
    monkeypatch.setattr(logps, "CHUNK_ROWS", 5)
    hidden, labels, frozen = draws(torch.float64, **head)
    weight = frozen.weight.clone().requires_grad_()
    offset = torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64).requires_grad_() if bias else None
    inputs = torch.arange(ROWS) * 3 % VOCABULARY
    upstream = torch.linspace(-2, 3, ROWS, dtype=torch.float64)
    leaves = [hidden, weight, *([] if offset is None else [offset])]

    def plain(states: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(states, weight, offset) * frozen.scale
        if frozen.softcap:
            logits = frozen.softcap * torch.tanh(logits / frozen.softcap)
        return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    found = []
    output = Head(weight, offset, **head)
    for compute in (plain, lambda states: token_logps(states, labels, output)):
        values = compute(hidden * weight[inputs])  # tied: the same weight feeds what comes before
        slopes = torch.autograd.grad((values * upstream).sum(), leaves)
        found.append((values, *slopes))
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert output.is_trained


def test_a_trained_projection_may_be_computed_in_less_than_it_is_kept_in(like_a_gpu: None) -> None:
    """bfloat16 products over float32 weights: the values of frozen bfloat16 weights, a gradient in float32."""
    hidden, labels, frozen = draws(torch.float32)
    trained = Head(frozen.weight.clone().requires_grad_(), None, compute_dtype=torch.bfloat16)
    values = token_logps(hidden, labels, trained)
    coarse = Head(frozen.weight.bfloat16(), None)
    torch.testing.assert_close(values, token_logps(hidden, labels, coarse), rtol=0, atol=0)
    exact = frozen.weight.clone().requires_grad_()
    truth = token_logps(hidden, labels, Head(exact, None))
    assert not torch.equal(values, truth)
    values.sum().backward()
    truth.sum().backward()
    assert trained.weight.grad is not None and trained.weight.grad.dtype == torch.float32
    assert exact.grad is not None
    assert ((trained.weight.grad - exact.grad).norm() / exact.grad.norm()).item() < 0.02
    with torch.no_grad():
        torch.testing.assert_close(trained.logits(hidden), coarse.logits(hidden), rtol=0, atol=0)


def test_a_cpu_computes_the_projection_in_float32_whatever_it_is_kept_in() -> None:
    hidden, labels, frozen = draws(torch.float32)
    kept = frozen.weight.bfloat16()
    low, high = Head(kept, None, compute_dtype=torch.bfloat16), Head(kept.float(), None)
    assert torch.equal(token_logps(hidden, labels, low), token_logps(hidden, labels, high))
