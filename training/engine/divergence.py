"""When a run has left the road: updates without finite numbers, and gradients that explode. Knows only numbers.

Exploding: several updates in a row whose gradient norm (before clipping) is a hundred times the running median, and
far above the clipping threshold. Both conditions, for late in a run, when most pairs are learnt, the median is tiny
and one wrong pair is a hundred times it, harmlessly.
"""

from __future__ import annotations

import statistics

from training.engine.errors import DivergedError

NONFINITE_LIMIT = 3
EXPLODING_LIMIT = 5  # updates in a row
FACTOR = 100.0  # times the running median
ABOVE_CLIPPING = 10.0  # times max_grad_norm
WINDOW = 64  # norms behind the median
ENOUGH = 8  # with fewer, there is no median to speak of


def is_exploding(norms: list[float], norm: float, max_grad_norm: float) -> bool:
    """Whether a finite norm is far off from those of the steps before; if not, it becomes one of them."""
    floor = ABOVE_CLIPPING * (max_grad_norm if max_grad_norm > 0 else 1.0)
    far = len(norms) >= ENOUGH and norm > max(FACTOR * statistics.median(norms), floor)
    if not far:
        norms.append(norm)
        del norms[:-WINDOW]
    return far


def require_finite_updates(streak: int, remedy: str) -> None:
    """Raises `DivergedError` at the limit."""
    if streak >= NONFINITE_LIMIT:
        raise DivergedError(
            f"Training diverged: {NONFINITE_LIMIT} updates in a row had no finite loss or gradient.", remedy
        )


def require_calm_gradients(streak: int, norm: float, norms: list[float], remedy: str) -> None:
    """Raises `DivergedError` at the limit."""
    if streak >= EXPLODING_LIMIT:
        raise DivergedError(
            f"Training diverged: the gradient norm was over {FACTOR:.0f} times its usual value "
            f"{EXPLODING_LIMIT} updates in a row ({norm:.3g}; usual is {statistics.median(norms):.3g}).",
            remedy,
        )
