"""Metric keys: the same string in the database, in JSON, on a chart and in the docs, and what each one means.

Standard library only. `training/contract.py` hands them on: import them from there.
"""

from __future__ import annotations


class Metric:
    """Keys of a metrics event. Evaluation uses the same keys with the prefix `eval_`.

    A key that a method does not define is null: `kl` without a reference (SFT, ORPO, SimPO); with SFT, which
    has no rejected side, also the rewards and `logps/rejected`.
    """

    # What the gradient is of: mean over the pairs of the step, NLL over its chosen tokens, and for mixtures of experts
    # router_aux_loss_coef * aux_loss. At evaluation the same of the held-out pairs.
    LOSS = "loss"
    # beta times what the loss compares, mean over pairs: policy logps - reference logps (without a reference
    # the policy's alone), divided by the answer's tokens where the loss does that (ipo, SimPO, ORPO, asked for)
    REWARDS_CHOSEN = "rewards/chosen"
    REWARDS_REJECTED = "rewards/rejected"
    REWARDS_MARGINS = "rewards/margins"  # chosen - rejected
    REWARDS_ACCURACIES = "rewards/accuracies"  # share of pairs with margin > 0 (shown as "DPO accuracy")
    LOGPS_CHOSEN = "logps/chosen"  # summed over completion tokens, mean over pairs, nats
    LOGPS_REJECTED = "logps/rejected"
    NLL_LOSS = "nll_loss"  # -log p per chosen token, nats; only where it is part of the loss
    LOG_ODDS_CHOSEN = "log_odds_chosen"  # ORPO: log odds ratio of chosen over rejected, mean over pairs
    LOG_ODDS_RATIO = "log_odds_ratio"  # ORPO: log sigmoid of it, mean over pairs
    AUX_LOSS = "aux_loss"  # mixtures of experts: imbalance of the routers, before its coefficient
    # Nats per completion token: exact over the vocabulary at evaluation (of KL_PAIRS pairs), an estimate in training.
    KL = "kl"
    # Of the policy over the vocabulary, exact, mean over completion tokens of both sides, nats. At evaluation only:
    # in a step it would cost another pass over every token's probabilities.
    ENTROPY = "entropy"
    TRUNCATED = "truncated"  # share of the pairs that were cut to max_length
    # Of the answers to the watch prompts (`training/engine/watch.py`), at evaluation only. Sampled divergence of policy
    # from reference, nats per token, on the policy's own answers drawn at temperature 1: k3, and k1, which scatters.
    KL_SAMPLED = "kl_sampled"
    KL_SAMPLED_K1 = "kl_sampled_k1"
    WATCH_LENGTH = "watch/length"  # tokens of an answer, mean
    WATCH_DISTINCT_1 = "watch/distinct_1"  # different tokens / tokens, over all answers
    WATCH_DISTINCT_2 = "watch/distinct_2"  # the same of pairs of tokens
    WATCH_SELF_BLEU = "watch/self_bleu"  # mean BLEU-4 of each answer against all others; null with one answer
    WATCH_REPETITION = "watch/repetition"  # share of an answer's 4-grams that it had before, mean
    WATCH_REFUSALS = (
        "watch/refusals"  # share of answers that begin with a refusal (training/engine/diversity.py)
    )
    GRAD_NORM = "grad_norm"  # before clipping
    LEARNING_RATE = "learning_rate"
    EPOCH = "epoch"  # fraction of passes done
    NUM_TOKENS = "num_tokens"  # tokens processed so far, no padding
    TOKENS_PER_SECOND = "tokens_per_second"


EVAL_PREFIX = "eval_"
# Which way a metric of an evaluation is better. Of those that are not here nobody can say.
GREATER_IS_BETTER = {
    Metric.LOSS: False,
    Metric.REWARDS_CHOSEN: True,
    Metric.REWARDS_REJECTED: False,
    Metric.REWARDS_MARGINS: True,
    Metric.REWARDS_ACCURACIES: True,
    Metric.LOGPS_CHOSEN: True,
    Metric.LOGPS_REJECTED: False,
    Metric.NLL_LOSS: False,
    Metric.LOG_ODDS_CHOSEN: True,
    Metric.LOG_ODDS_RATIO: True,
    Metric.KL: False,
    Metric.KL_SAMPLED: False,
    Metric.KL_SAMPLED_K1: False,
    Metric.WATCH_DISTINCT_1: True,
    Metric.WATCH_DISTINCT_2: True,
    Metric.WATCH_SELF_BLEU: False,
    Metric.WATCH_REPETITION: False,
}
OF_WATCHING = {
    Metric.KL_SAMPLED, Metric.KL_SAMPLED_K1, Metric.WATCH_LENGTH, Metric.WATCH_DISTINCT_1, Metric.WATCH_DISTINCT_2,
    Metric.WATCH_SELF_BLEU, Metric.WATCH_REPETITION, Metric.WATCH_REFUSALS,
}  # fmt: skip
# Of steps only, the same at each evaluation, or not of every model.
NOT_CHOSEN_BY = {
    Metric.GRAD_NORM, Metric.LEARNING_RATE, Metric.EPOCH, Metric.NUM_TOKENS, Metric.TOKENS_PER_SECOND,
    Metric.TRUNCATED, Metric.AUX_LOSS,
}  # fmt: skip


def evaluation_keys() -> tuple[str, ...]:
    """Every key that an evaluation may have and that differs from one evaluation to the next."""
    keys = [value for name, value in vars(Metric).items() if name.isupper() and value not in NOT_CHOSEN_BY]
    return tuple(EVAL_PREFIX + key for key in keys)


def is_greater_better(key: str) -> bool | None:
    """Of an evaluation's key; None where nobody can say."""
    return GREATER_IS_BETTER.get(key.removeprefix(EVAL_PREFIX))


# The exact divergence needs a second pass and the whole vocabulary: this many held-out pairs stand for all, those
# whose digests sort first, so that neither the order of the file nor its length decides.
KL_PAIRS = 64
