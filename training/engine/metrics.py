"""Sums over a window of pairs (an optimizer step, an evaluation) and the metric values they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from training.contract import EVAL_PREFIX, Metric
from training.engine.logps import sampled_kl
from training.engine.objective import Objective, PairLogps
from training.engine.routing import Routing


@dataclasses.dataclass
class Window:
    """Values are means over the pairs of the window; `kl`, `entropy` and `nll_loss` are means over tokens."""

    objective: Objective
    num_pairs: int = 0
    kl_tokens: int = 0
    entropy_tokens: int = 0
    truncated: int = 0  # pairs that were cut to max_length
    _keys: tuple[str, ...] = ()
    _sums: torch.Tensor | None = None  # on the device, so that adding does not wait for it
    _nll: torch.Tensor | None = None  # sum over chosen tokens, and their number
    _kl: torch.Tensor | None = None
    _entropy: torch.Tensor | None = None
    _routing: torch.Tensor | None = None  # of an evaluation: [2 E + 1], the sums of a `Routing`

    @torch.no_grad()
    def add(self, losses: torch.Tensor, logps: PairLogps, *, truncated: int = 0) -> None:
        """Losses [B] of one micro-batch, its log-probabilities, and how many of its pairs were cut."""
        columns = {Metric.LOSS: losses} | self.objective.pair_metrics(logps)
        sums = torch.stack([column.detach().double().sum() for column in columns.values()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._keys = tuple(columns)
        if self.objective.nll_weight:
            nll = torch.stack([-logps.policy_chosen.detach().sum(), logps.chosen_lengths.sum()])
            self._nll = nll if self._nll is None else self._nll + nll
        self.num_pairs += len(losses)
        self.truncated += truncated

    def add_kl(self, tokens: torch.Tensor) -> None:
        """Divergences [C] of completion tokens, exact or estimated."""
        total = tokens.detach().double().sum()
        self._kl = total if self._kl is None else self._kl + total
        self.kl_tokens += len(tokens)

    def add_entropy(self, tokens: torch.Tensor) -> None:
        """Entropies [C] of completion tokens."""
        total = tokens.detach().double().sum()
        self._entropy = total if self._entropy is None else self._entropy + total
        self.entropy_tokens += len(tokens)

    def add_routing(self, routing: Routing) -> None:
        total = torch.cat([routing.chosen, routing.probability, routing.tokens[None]]).detach().double()
        self._routing = total if self._routing is None else self._routing + total

    def add_sampled_kl(self, logps: PairLogps) -> None:
        if logps.reference_tokens is not None:
            self.add_kl(sampled_kl(logps.policy_tokens, logps.reference_tokens))

    def values(self) -> dict[str, float | None]:
        if self._sums is None:
            return {}
        means = (self._sums / self.num_pairs).tolist()
        result: dict[str, float | None] = dict(zip(self._keys, means, strict=True))
        if self._nll is not None:
            total, tokens = self._nll.tolist()
            result[Metric.NLL_LOSS] = total / tokens
        if self._entropy is not None:
            result[Metric.ENTROPY] = float(self._entropy) / self.entropy_tokens
        result[Metric.TRUNCATED] = self.truncated / self.num_pairs
        if self._kl is not None:
            result[Metric.KL] = float(self._kl) / self.kl_tokens
        if self._routing is not None:
            chosen, probability = self._routing[:-1].chunk(2)
            result[Metric.AUX_LOSS] = float(Routing(chosen, probability, self._routing[-1]).aux_loss)
        return result | dict.fromkeys(self.objective.undefined_metrics)

    # --- shares of one window, of several ranks -----------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The sums as JSON carries them, without loss."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "objective":
                found[field.name] = value.tolist() if isinstance(value, torch.Tensor) else value
        return found

    @classmethod
    def merged(cls, objective: Objective, states: Sequence[dict[str, Any]]) -> Window:
        """The window that one rank alone would have filled, up to the order of float64 sums."""
        window = cls(objective)
        for state in states:
            for name, value in state.items():
                before = getattr(window, name)
                if isinstance(value, int):
                    setattr(window, name, before + value)
                elif name == "_keys":
                    window._keys = tuple(value) or before
                elif value is not None:
                    part = torch.tensor(value, dtype=torch.float64)
                    setattr(window, name, part if before is None else before + part)
        return window


def as_evaluation(values: dict[str, float | None]) -> dict[str, float | None]:
    return {EVAL_PREFIX + key: value for key, value in values.items()}
