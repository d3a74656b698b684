"""Products of float32 matrices on a CPU, by the faster of the two libraries that torch carries.

torch multiplies float32 with MKL, which keeps its fastest kernels for Intel's processors: on an AMD EPYC with AVX-512
oneDNN's were 1.9 to 2.4 times as fast, summing in float32 as MKL does. Which one is taken follows from the processor
and the shapes, never from a clock: a run that goes on after a crash must round as it did before.
"""

from __future__ import annotations

import functools
import logging

import torch

from training.processor import is_amd_with_avx512

logger = logging.getLogger(__name__)
# Rows, numbers summed for each result, elements of the weight: below, calling costs more than is gained.
ROWS, SUMMED, WEIGHT = 4, 64, 2**13
BY_ONEDNN = "products by oneDNN"  # what the numbers of a run on a CPU depend on
TRIAL = (96, 256, 192)  # rows, summed, columns
TOLERANCE = 2e-6  # relative; MKL's own error is 3e-7, a bfloat16 or tf32 product's 1e-3


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, k] weight^T [k, m] -> [n, m], in the dtype of both. Either may be a transposed view.

    oneDNN's have no gradient: call it in a `torch.autograd.Function`, with autocast off.
    """
    large = x.shape[0] >= ROWS and x.shape[-1] >= SUMMED and weight.numel() >= WEIGHT
    if not large or {x.dtype, weight.dtype} != {torch.float32} or x.device.type != "cpu":
        return x @ weight.T
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return x @ weight.T
    return _onednn(x, weight) if prefers_onednn() else x @ weight.T


def _onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN is the faster one here, and gives the same."""
    if not (is_amd_with_avx512() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    draw = torch.Generator().manual_seed(0)
    rows, summed, columns = TRIAL
    x = torch.randn(rows, summed, generator=draw)
    weight = torch.randn(summed, columns, generator=draw).T
    expected = x.double() @ weight.double().T
    try:
        found = _onednn(x, weight)
    except (RuntimeError, AttributeError) as error:  # torch promises nothing about this operator
        logger.info("oneDNN's products are not used: %s", error)
        return False
    apart = float((found.double() - expected).norm() / expected.norm())
    if apart > TOLERANCE:
        logger.info("oneDNN's products are not used: they are %.1e off.", apart)
    return apart <= TOLERANCE
