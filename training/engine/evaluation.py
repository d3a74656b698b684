"""The held-out pairs under the policy: metrics as in training, entropy, and the exact KL to a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from training.contract import KL_PAIRS
from training.engine.data import TokenizedPair, length_sorted_batches
from training.engine.distribution import token_statistics
from training.engine.metrics import Window, as_evaluation
from training.engine.objective import Objective, PairLogps, mean_chosen_tokens
from training.engine.pair_record import PairRecord
from training.engine.policy import Policy
from training.engine.reference import ReferenceLogps, token_budget
from training.engine.routing import LoadBalance, known

KEEP_BYTES = 256 * 2**20  # hidden states of the reference, kept from one evaluation to the next


class Evaluator:
    """The same pairs in the same batches each time, dropout off: a change is the model's."""

    def __init__(
        self,
        policy: Policy,
        pairs: Sequence[TokenizedPair],
        reference: ReferenceLogps | None,
        objective: Objective,
        balance: LoadBalance | None = None,
    ) -> None:
        self._policy, self._reference, self._objective = policy, reference, objective
        self._balance = balance
        self._tokens_per_pair = mean_chosen_tokens(pairs) if pairs else 0.0
        budget = token_budget(policy.scorer.placement)
        self._num_pairs = len(pairs)
        self._world = policy.scorer.placement.world
        by_digest = sorted(pairs, key=TokenizedPair.digest)
        # Pairs with the divergence come in their own batches: each batch has both passes or one. This rank's
        # share of either, and whether a batch counts.
        self._batches = [
            (batch, with_kl, counts)
            for part, with_kl in (
                (by_digest[:KL_PAIRS], reference is not None),
                (by_digest[KL_PAIRS:], False),
            )
            for batch, counts in self._world.share(
                list(length_sorted_batches(part, budget=budget)),
                lambda batch: sum(pair.num_tokens for pair in batch),
            )
        ]
        self._kept: dict[int, torch.Tensor] = {}
        self._room = 0 if self._world.lockstep else KEEP_BYTES

    def evaluate(
        self, progress: Callable[[int], None], *, record: PairRecord, step: int
    ) -> dict[str, float | None]:
        """Values under `eval_` keys; each pair's go to the record, as of `step`.

        `progress` gets the pairs done, and may raise to leave.
        """
        shares = self._world.together(lambda: self._share(progress, record, step).state())
        values = Window.merged(self._objective, shares).values()
        return as_evaluation(values if self._balance is None else self._balance.onto(values))

    def _share(self, progress: Callable[[int], None], record: PairRecord, step: int) -> Window:
        """The batches of this rank."""
        window, done, rows = Window(self._objective), 0, []
        mine = sum(len(batch) for batch, _, counts in self._batches if counts)
        for number, (batch, with_kl, counts) in enumerate(self._batches):
            theirs = self._reference_hidden(number, batch) if with_kl else None
            with self._policy.inference(), self._balance.recording() if self._balance else nullcontext():
                states = self._policy.scorer(batch)
            if not counts:
                continue
            if self._balance is not None:
                window.add_routing(known(states.routing))
            with torch.no_grad():
                other_head = None if theirs is None else self._policy.reference_head
                tokens = token_statistics(states.hidden, states.labels, self._policy.head, theirs, other_head)
            before = (
                None if self._reference is None else self._reference.token_logps(batch, tokens.logps.device)
            )
            logps = PairLogps.of(states, tokens.logps, before)
            losses = self._objective.losses(logps, tokens_per_pair=self._tokens_per_pair)
            window.add(losses, logps, truncated=sum(pair.truncated for pair in batch))
            window.add_entropy(tokens.entropies)
            if tokens.divergences is not None:
                window.add_kl(tokens.divergences)
            rows.append((batch, logps, losses))
            done += len(batch)
            progress(self._num_pairs * done // mine)
        for batch, logps, losses in rows:  # only now: half an evaluation is none
            record.add("eval", step, batch, logps, losses)
        return window

    def _reference_hidden(self, number: int, batch: Sequence[TokenizedPair]) -> torch.Tensor:
        """[C, H]; the reference does not change, so what fits is kept."""
        kept = self._kept.get(number)
        if kept is not None:
            return kept
        with self._policy.reference():
            hidden: torch.Tensor = self._policy.scorer(batch).hidden
        size = hidden.numel() * hidden.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[number] = hidden
        return hidden
