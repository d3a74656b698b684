"""What evaluation asks of the whole vocabulary at each completion token: entropy, and the divergence.

One pass of the projection gives these and the token's log-probability; no gradient, no logits kept.
"""

from __future__ import annotations

import dataclasses

import torch

from training.engine.logps import Head, log_partition, row_chunks


@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """Of C completion tokens, in nats."""

    logps: torch.Tensor  # [C] log pi(label | context), to the bit what `token_logps` gives
    entropies: torch.Tensor  # [C] -sum_v pi(v) log pi(v)
    divergences: torch.Tensor | None  # [C] KL(pi || reference) = sum_v pi(v) [log pi(v) - log ref(v)]


@torch.no_grad()
def token_statistics(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Head,
    reference: torch.Tensor | None = None,
    reference_head: Head | None = None,
) -> TokenStatistics:
    """hidden [C, H], labels [C], and the reference's hidden states [C, H'] where the divergence is wanted.

    `reference_head` where the reference projects its states with another weight [V, H'] than the policy.
    """
    logps, entropies, divergences = [], [], []
    ready = head.ready()
    other_ready = ready if reference_head is None or reference_head is head else reference_head.ready()
    theirs = row_chunks(hidden if reference is None else reference)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, targets, other in zip(row_chunks(hidden), row_chunks(labels), theirs, strict=True):
            logits = ready.logits(rows)
            partition, probabilities = log_partition(logits)
            logps.append((logits.gather(-1, targets[:, None]) - partition).squeeze(-1))
            log_probabilities = logits - partition
            entropies.append(-(probabilities * log_probabilities).sum(dim=-1))
            if reference is not None:
                other_logits = other_ready.logits(other)
                other_partition, _ = log_partition(other_logits)
                log_probabilities -= other_logits - other_partition
                divergences.append((probabilities * log_probabilities).sum(dim=-1))
    return TokenStatistics(
        torch.cat(logps), torch.cat(entropies), torch.cat(divergences) if divergences else None
    )
