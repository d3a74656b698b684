"""Losses of a pair as pure functions. A new one for DPO goes into LOSSES.

All tensors have shape [B]: one value a pair, in nats. A score is what a loss compares: for DPO the log-ratio
log pi(y|x) - log ref(y|x) of a whole answer y, divided by its number of tokens where that is asked for or is
part of the loss; without a reference log pi(y|x) alone. Which it is says `objective.py`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

# log(1 - p) needs p < 1, and in float32 a mean log-probability can round to 0.
CERTAIN = -1e-7


class Loss(Protocol):
    """Scores of the chosen and of the rejected answers [B] -> loss of each pair [B]."""

    def __call__(
        self, chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float
    ) -> torch.Tensor: ...


def sigmoid_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float, margin: float = 0.0
) -> torch.Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7) with label smoothing (cDPO, Mitchell 2023).

    With h = beta * (chosen - rejected) - margin:
        loss = -(1 - eps) * log sigmoid(h) - eps * log sigmoid(-h)
    At policy == reference, and no margin, the loss is ln 2.

    SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6) is this with log pi per token as the scores and
    margin = gamma. gamma is not multiplied by beta; as the scores are means over tokens, beta is far larger
    than DPO's: 2.0 and more in the paper.
    """
    difference = beta * (chosen - rejected) - margin
    agree = functional.logsigmoid(difference)
    disagree = functional.logsigmoid(-difference)
    return -(1 - label_smoothing) * agree - label_smoothing * disagree


def robust_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """Provably robust DPO (Chowdhury, Kini, Natarajan 2024, arXiv 2403.00409), eps = share of flipped labels.

    With h = beta * (chosen - rejected):
        loss = [-(1 - eps) * log sigmoid(h) + eps * log sigmoid(-h)] / (1 - 2 eps)
    Its mean over labels that are flipped with probability eps is DPO's loss on the true ones, so it may be
    below 0. At h = 0 it is ln 2; at eps = 0 it is `sigmoid`.
    """
    difference = beta * (chosen - rejected)
    clean = -functional.logsigmoid(difference)
    flipped = -functional.logsigmoid(-difference)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """SLiC's hinge on log-ratios (Zhao et al. 2023, arXiv 2305.10425; Liu et al. 2023, arXiv 2309.06657).

    loss = max(0, 1 - beta * (chosen - rejected))
    """
    return torch.relu(1 - beta * (chosen - rejected))


def ipo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, equation 17), beta being the paper's tau.

        loss = (chosen - rejected - 1 / (2 beta))^2
    Its scores are means over tokens (`LENGTH_NORMALISED`), as in TRL, whose authors confirmed it with IPO's.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def exo_pair_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """EXO-pref for two answers (Ji et al. 2024, arXiv 2402.00856, equation 16): the reverse KL of preferences.

    With q = sigmoid(beta * (chosen - rejected)) and eps = label_smoothing, above 0:
        loss = q * [log q - log(1 - eps)] + (1 - q) * [log(1 - q) - log eps]
    """
    difference = beta * (chosen - rejected)
    smoothing = torch.tensor(label_smoothing, dtype=difference.dtype, device=difference.device)
    agree, disagree = functional.logsigmoid(difference), functional.logsigmoid(-difference)
    return agree.exp() * (agree - torch.log1p(-smoothing)) + disagree.exp() * (disagree - smoothing.log())


def nca_pair_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """NCA for pairs (Chen et al. 2024, arXiv 2402.05369), with rewards r = beta * score:

        loss = -log sigmoid(r_w) - [log sigmoid(-r_w) + log sigmoid(-r_l)] / 2
    It looks at each answer by itself, and so holds up the likelihood of the chosen one.
    """
    return -functional.logsigmoid(beta * chosen) - 0.5 * (
        functional.logsigmoid(-beta * chosen) + functional.logsigmoid(-beta * rejected)
    )


def sppo_hard_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """SPPO with certain preferences (Wu et al. 2024, arXiv 2405.00675, equation 4.7 with P = 1 and 0):

    loss = (chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2
    """
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7): chosen answers better than the model's.

    loss = 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """APO-down (D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8): the model is better than the chosen.

    loss = sigmoid(beta * chosen) + 1 - sigmoid(beta * (chosen - rejected))
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "exo_pair": exo_pair_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "nca_pair": nca_pair_loss,
    "sppo_hard": sppo_hard_loss,
}
LENGTH_NORMALISED = frozenset({"ipo"})


def log_odds(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """log [odds(chosen) / odds(rejected)], odds = p / (1 - p), p = exp(mean log-probability per token).

    ORPO (Hong et al. 2024, arXiv 2403.07691, equations 4 and 5). Arguments and result [B].
    """
    chosen, rejected = chosen.clamp(max=CERTAIN), rejected.clamp(max=CERTAIN)
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def odds_ratio_loss(log_odds_chosen: torch.Tensor, *, beta: float) -> torch.Tensor:
    """The odds-ratio part of ORPO's loss (arXiv 2403.07691, equation 7), weighted by beta, its lambda:

    loss = -beta * log sigmoid(log odds ratio)
    """
    return -beta * functional.logsigmoid(log_odds_chosen)


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact on both sides of -ln 2 (Maechler 2012)."""
    # Both branches are computed, and a NaN gradient of the one not taken would spread: each sees only its own x.
    near = x > -0.6931471805599453
    small = torch.where(near, x, -1.0)
    large = torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
