"""Mixtures of experts: the router's auxiliary loss, which keeps the experts evenly used.

Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6), over all layers at once as in
transformers and TRL. With E experts and k of them a token,
    aux = E * sum over experts e of f_e * P_e
where f_e is the number of choices of e per token (k in all, no gradient), P_e the mean of its probability,
both over the tokens of all layers. It is computed for each batch of `per_device_train_batch_size` pairs,
however a token budget cuts that batch, over all tokens of both sequences of every pair: a prompt counts
twice, once for each of its answers (SFT: once), in every layout; padding never counts. The step's loss is
    loss + router_aux_loss_coef * mean over its pairs of the aux of their batch
as TRL has it. An evaluation is one batch of all its pairs, however it is cut: its loss is
    eval_loss = mean over the pairs + router_aux_loss_coef * aux
so that `loss` and `eval_loss` are of the same thing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from training.contract import Metric
from training.engine.data import TokenizedPair
from training.engine.errors import RefusedError


@dataclasses.dataclass(frozen=True)
class Routing:
    """Sums over the tokens of a forward and all layers, each token with its weight."""

    chosen: torch.Tensor  # [E] how often each expert was among the k, no gradient
    probability: torch.Tensor  # [E] with gradient
    tokens: torch.Tensor  # [] tokens times layers

    @classmethod
    def of(cls, outputs: Any, weights: torch.Tensor, top_k: int) -> Routing | None:
        """From a decoder's outputs and the weight of each of its tokens, flat [B * T]; None if not recorded."""
        layers = getattr(outputs, "router_logits", None)
        if not layers:
            return None
        weights = weights.float()
        chosen = torch.zeros(layers[0].shape[-1], device=weights.device)
        probability = torch.zeros_like(chosen)
        for logits in layers:
            shares = torch.softmax(logits.float(), dim=-1)
            best = torch.topk(shares.detach(), top_k, dim=-1).indices
            chosen = chosen.index_add(0, best.flatten(), weights.repeat_interleave(top_k))
            probability = probability + weights @ shares
        return cls(chosen, probability, weights.sum() * len(layers))

    @property
    def aux_loss(self) -> torch.Tensor:
        """aux of these tokens alone, []."""
        return len(self.chosen) * (self.chosen * self.probability).sum() / self.tokens**2

    def joined(self, other: Routing) -> Routing:
        return Routing(
            self.chosen + other.chosen, self.probability + other.probability, self.tokens + other.tokens
        )


@contextlib.contextmanager
def recorded_routing(decoder: Any, wanted: bool) -> Iterator[None]:
    """A forward in here returns its routers' logits, if wanted; transformers reads it from the configuration."""
    config = decoder.config
    if not hasattr(config, "output_router_logits"):
        yield
        return
    before = config.output_router_logits
    config.output_router_logits = wanted
    try:
        yield
    finally:
        config.output_router_logits = before


class LoadBalance:
    """The auxiliary loss of a run's steps: `begin` each batch, `added` for each of its forwards, then `end`."""

    def __init__(self, scorer: Any, coefficient: float) -> None:
        self.coefficient = coefficient
        self._scorer = scorer  # the one that computes, inside whatever wraps it
        self._whole: Routing | None = None
        self._num_pairs = self._step_pairs = 0
        self._sum: torch.Tensor | None = None

    @classmethod
    def of(cls, scorer: Any, asked: float | None) -> LoadBalance | None:
        """`asked` None means the coefficient that the model came with. None: there is nothing to balance."""
        config = scorer.decoder.config
        known = hasattr(config, "output_router_logits") and hasattr(config, "num_experts_per_tok")
        if asked and not known:
            raise RefusedError(
                f"router_aux_loss_coef is {asked:g}, and models of the type {config.model_type!r} have no "
                "experts whose use could be balanced.",
                "Leave router_aux_loss_coef out, or choose a mixture of experts.",
            )
        coefficient = getattr(config, "router_aux_loss_coef", 0.0) if asked is None else asked
        return cls(scorer, float(coefficient)) if known and coefficient else None

    def begin(
        self, forwards: Sequence[Sequence[TokenizedPair]], run: Callable[..., Any], reseed: Callable[[], None]
    ) -> None:
        """A batch cut into several forwards: the sums over all of them are needed before the first backward.

        They are taken in a pass without gradient with the same random draws; `reseed` starts these again.
        """
        self._scorer.routed = True
        self._num_pairs = sum(len(pairs) for pairs in forwards)
        self._whole = None
        if len(forwards) > 1:
            with torch.no_grad():
                self._whole = functools.reduce(
                    Routing.joined, (known(run(pairs).routing) for pairs in forwards)
                )
            reseed()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Forwards in here, of an evaluation, say how their tokens were routed."""
        self._scorer.routed = True
        try:
            yield
        finally:
            self._scorer.routed = False

    def onto(self, values: dict[str, float | None]) -> dict[str, float | None]:
        """The values of an evaluation whose routing was recorded, its loss with the auxiliary part."""
        loss, aux = values.get(Metric.LOSS), values.get(Metric.AUX_LOSS)
        if loss is None or aux is None:
            return values
        return values | {Metric.LOSS: loss + self.coefficient * aux}

    def added(self, losses: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """Losses [B] of this forward's pairs, each with the same part of what their routing adds to the step."""
        part = known(routing)
        whole = self._whole or part
        frequency = whole.chosen / whole.tokens
        aux = len(frequency) * (frequency * part.probability / whole.tokens).sum().double() * self._num_pairs
        self._sum = aux.detach() if self._sum is None else self._sum + aux.detach()
        self._step_pairs += len(losses)
        return losses + self.coefficient * aux / len(losses)

    def end(self) -> list[float]:
        """Of the step that ends here: the sum of aux over this rank's pairs, and their number."""
        sums = [0.0 if self._sum is None else float(self._sum), float(self._step_pairs)]
        self._sum, self._step_pairs, self._scorer.routed = None, 0, False
        return sums

    @staticmethod
    def values(ends: Sequence[list[float] | None]) -> dict[str, float | None]:
        """The metric of a step, from what it ended with on each rank: aux, mean over its pairs."""
        sums = [end for end in ends if end is not None]
        return {Metric.AUX_LOSS: sum(s for s, _ in sums) / sum(n for _, n in sums)} if sums else {}


def known(routing: Routing | None) -> Routing:
    if routing is None:
        raise RefusedError(
            "The routers of this mixture of experts cannot be read, so their use cannot be balanced.",
            "Set router_aux_loss_coef to 0.",
        )
    return routing
