"""The held-out pairs under the policy: metrics as in training, and the exact KL from the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from training.contract import RunConfig
from training.engine.data import TokenizedPair, length_sorted_batches
from training.engine.logps import exact_kl, token_logps
from training.engine.losses import loss_named
from training.engine.metrics import PairLogps, Window, as_evaluation
from training.engine.policy import Policy
from training.engine.reference import TOKEN_BUDGET, ReferenceLogps

KL_PAIRS = (
    64  # the exact divergence needs a second pass and the whole vocabulary: the first 64 pairs stand for all
)


def evaluate(
    policy: Policy,
    pairs: Sequence[TokenizedPair],
    reference: ReferenceLogps,
    config: RunConfig,
    *,
    progress: Callable[[int], None],
) -> dict[str, float | None]:
    """Values under `eval_` keys. Dropout is off, batches are the same each time: a change is the model's."""
    window = Window(beta=config.beta)
    loss = loss_named(config.loss_type)
    device = policy.scorer.placement.device
    done = 0
    # The pairs of the divergence come in their own batches: then each has both passes or one.
    for part, with_kl in ((pairs[:KL_PAIRS], True), (pairs[KL_PAIRS:], False)):
        for batch in length_sorted_batches(part, token_budget=TOKEN_BUDGET):
            with policy.inference():
                states = policy.scorer(batch)
                tokens = token_logps(states.hidden, states.labels, policy.head)
            logps = PairLogps.of(states, tokens, reference.token_logps(batch, device))
            losses = loss(
                logps.policy_chosen,
                logps.policy_rejected,
                logps.reference_chosen,
                logps.reference_rejected,
                beta=config.beta,
                label_smoothing=config.label_smoothing,
            )
            window.add(losses, logps)
            if with_kl:
                with policy.reference():
                    window.add_kl(exact_kl(states.hidden, policy.scorer(batch).hidden, policy.head))
            done += len(batch)
            progress(done)
    return as_evaluation(window.values())
