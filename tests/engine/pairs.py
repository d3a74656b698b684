"""Pairs of given sizes, and messages, for tests of how pairs become token ids."""

from __future__ import annotations

from typing import Any

import numpy as np

from training.engine.data import TokenizedPair


def pair(prompt: int, chosen: int, rejected: int) -> TokenizedPair:
    """Token ids that tell where they come from: 0… the prompt, 1000… chosen, 2000… rejected."""

    def ids(start: int, count: int) -> Any:
        return np.arange(start, start + count, dtype=np.int32)

    return TokenizedPair("p", ids(0, prompt), ids(1000, chosen), ids(2000, rejected))


def message(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}
