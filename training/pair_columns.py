"""Columns of `pairs/step-000040.parquet` in a run directory: a row is a pair as it was at one moment.

A file has the validation pairs of the evaluation at its step, and the training pairs met since the file before.
A key is (split, step, id). Part of the contract between studio and engine; standard library only.
"""

from __future__ import annotations

PAIR_COLUMNS: dict[str, str] = {
    "id": "the pair's id in the data file",
    "split": "train or eval",
    "step": "optimizer steps done when policy, margin and loss were computed; a training pair's are those of the "
    "gradient pass of the step after it, and at 0 the reference's, which the policy then is "
    "(null there when the reference is another model)",
    "dropout": "whether the adapter's dropout was on; always off in evaluation and at step 0",
    "truncated": "whether the pair was cut to max_length",
    "chosen_tokens": "completion tokens of the chosen answer",
    "rejected_tokens": "completion tokens of the rejected answer",
    "policy_chosen_logps": "log-probability under the policy, summed over completion tokens, nats",
    "policy_rejected_logps": "the same of the rejected answer; null in SFT",
    "policy_chosen_mean_logps": "the sum divided by the tokens",
    "policy_rejected_mean_logps": "the same of the rejected answer",
    "reference_chosen_logps": "under the reference, sum; null where the loss needs none",
    "reference_rejected_logps": "the same of the rejected answer",
    "reference_chosen_mean_logps": "the sum divided by the tokens",
    "reference_rejected_mean_logps": "the same of the rejected answer",
    "margin": "rewards/margins of this pair; null in SFT",
    "loss": "this pair's share of the loss; the mean over a step's pairs is the step's loss "
    "(at an evaluation without the routers' auxiliary part, which is no pair's)",
}
