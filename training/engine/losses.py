"""Preference losses: pure functions of summed log-probabilities. A new one goes into LOSSES."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional


class Loss(Protocol):
    """Four tensors [B] of log-probabilities summed over completion tokens (nats) -> loss of each pair [B]."""

    def __call__(
        self,
        policy_chosen: torch.Tensor,
        policy_rejected: torch.Tensor,
        reference_chosen: torch.Tensor,
        reference_rejected: torch.Tensor,
        *,
        beta: float,
        label_smoothing: float,
    ) -> torch.Tensor: ...


def sigmoid_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> torch.Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7) with label smoothing (cDPO, Mitchell 2023).

    With h = beta * [(log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))]:
        loss = -(1 - eps) * log sigmoid(h) - eps * log sigmoid(-h)
    All inputs and the result have shape [B]. At policy == reference the loss is ln 2.
    """
    margins = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    agree = functional.logsigmoid(margins)
    disagree = functional.logsigmoid(-margins)
    return -(1 - label_smoothing) * agree - label_smoothing * disagree


LOSSES: dict[str, Loss] = {"sigmoid": sigmoid_loss}


def loss_named(name: str) -> Callable[..., torch.Tensor]:
    return LOSSES[name]


def rewards(policy: torch.Tensor, reference: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Implicit reward beta * log(pi / ref) of each completion, [B] -> [B], without gradient."""
    return beta * (policy - reference).detach()
