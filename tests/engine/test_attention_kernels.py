"""Each kernel against the definition of attention, written with a full mask, in float64: values and gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from training.engine import attention_kernels
from training.engine.attention_kernels import Scoring, attend_by_parts
from training.engine.attention_varlen import attend_varlen, fits
from training.engine.pair_layout import PairLayout, Segment

CPU = torch.device("cpu")
# Prompt, chosen, rejected: uneven, without a rejected side, a prompt of one token, longer than a block.
SIZES = ((7, 5, 9), (12, 3, 0), (1, 1, 1), (150, 170, 160))


@dataclasses.dataclass
class Case:
    layout: PairLayout
    tensors: dict[str, torch.Tensor]
    gradient: torch.Tensor

    @classmethod
    def make(cls, device: str, dtype: torch.dtype, *, width: int = 8, value_width: int = 8) -> Case:
        segments, start = [], 0
        for prompt, chosen, rejected in SIZES:
            ends = start + prompt, start + prompt + chosen, start + prompt + chosen + rejected
            segments.append(Segment(start, *ends))
            start = ends[-1]
        draw = torch.Generator().manual_seed(1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw).to(device, dtype).requires_grad_()

        tensors = {
            "query": random(1, 6, start, width),
            "key": random(1, 2, start, width),
            "value": random(1, 2, start, value_width),
            "sinks": random(6),
        }
        gradient = random(1, start, 6, value_width).detach()
        return cls(PairLayout(tuple(segments), torch.device(device)), tensors, gradient)

    def result(self, attend: Any, *, sinks: bool) -> list[torch.Tensor]:
        """The output and the gradients of query, key, value and sinks."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if sinks or name != "sinks"}
        output = attend(tensors["query"], tensors["key"], tensors["value"], tensors.get("sinks"))
        return [output.detach(), *torch.autograd.grad(output, list(tensors.values()), self.gradient)]

    def in_float64(self) -> Case:
        tensors = {
            name: tensor.detach().double().cpu().requires_grad_() for name, tensor in self.tensors.items()
        }
        return Case(PairLayout(self.layout.segments, CPU), tensors, self.gradient.double().cpu())


def definition(layout: PairLayout, scoring: Scoring) -> Any:
    """softmax(q k^T) v over every pair of tokens, by a mask from what each token is and where it stands."""
    kind, owner, position = [], [], []
    for number, s in enumerate(layout.segments):
        for index in range(s.start, s.end):
            rejected = index >= s.chosen_end
            kind.append("p" if index < s.prompt_end else "r" if rejected else "c")
            owner.append(number)
            position.append(index - s.start - (s.chosen_end - s.prompt_end if rejected else 0))
    sees = torch.tensor(
        [
            [
                owner[q] == owner[k]
                and position[k] <= position[q]
                and (not scoring.window or position[q] - position[k] < scoring.window)
                and kind[k] in ("p", kind[q])
                for k in range(len(kind))
            ]
            for q in range(len(kind))
        ]
    )

    def attend(query: Any, key: Any, value: Any, sinks: Any) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * scoring.scale
        if scoring.softcap:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        scores = scores.masked_fill(~sees, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
        return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)

    return attend


CASES = {
    "plain": ({}, False, "flash"),
    "window of 1": ({"window": 1}, False, "flash"),
    "window inside a prompt": ({"window": 4}, False, "flash"),
    "window longer than most": ({"window": 140}, False, "flash"),
    "soft cap": ({"softcap": 1.5}, False, "matmul"),
    "sinks": ({}, True, "matmul"),
    "all at once": ({"softcap": 1.5, "window": 6}, True, "matmul"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_is_what_attention_is_defined_as(
    case: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, sinks, kernel = CASES[case]
    scoring = Scoring(scale=0.4, **settings)
    monkeypatch.setattr(attention_kernels, "MATMUL_BLOCK", 64)
    made = Case.make(device, torch.float64)
    chosen = attention_kernels.choose_kernel(
        made.tensors["query"], made.tensors["value"], scoring, sinks=sinks
    )
    assert chosen == kernel or device == "cuda"
    expected = made.in_float64().result(definition(made.layout, scoring), sinks=sinks)
    for name in {chosen, "matmul"}:
        monkeypatch.setattr(attention_kernels, "choose_kernel", lambda *_, _name=name, **__: _name)
        found = made.result(lambda q, k, v, s: attend_by_parts(q, k, v, made.layout, scoring, s), sinks=sinks)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-8, atol=1e-9)


def test_values_may_be_of_another_width_than_keys() -> None:
    made, scoring = Case.make("cpu", torch.float64, width=12, value_width=5), Scoring(scale=0.3)
    found = made.result(lambda q, k, v, s: attend_by_parts(q, k, v, made.layout, scoring, s), sinks=False)
    expected = made.result(definition(made.layout, scoring), sinks=False)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kernel", ["flash", "matmul"])
def test_in_bfloat16_both_kernels_are_near_the_definition(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "choose_kernel", lambda *_, **__: kernel)
    made, scoring = Case.make("cpu", torch.bfloat16), Scoring(scale=0.4)
    expected = made.in_float64().result(definition(made.layout, scoring), sinks=False)
    found = made.result(lambda q, k, v, s: attend_by_parts(q, k, v, made.layout, scoring, s), sinks=False)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - exact).norm() / exact.norm()) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [0, 4, 140])
def test_the_variable_length_kernel_is_what_attention_is_defined_as(window: int) -> None:
    made = Case.make("cuda", torch.bfloat16, width=64, value_width=64)
    assert fits(made.tensors["query"], made.tensors["value"])
    scoring = Scoring(scale=0.125, window=window)
    expected = made.in_float64().result(definition(made.layout, scoring), sinks=False)
    found = made.result(
        lambda q, k, v, _: attend_varlen(q, k, v, made.layout, scale=0.125, window=window), sinks=False
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours.double().cpu() - theirs).norm() / theirs.norm()) < 0.01
