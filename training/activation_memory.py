"""What a forward with gradient keeps for its backward, and what the engine does when that is too much.

Pure arithmetic, standard library only: the engine decides by it, the estimates show it.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

# Tokens of a forward with gradient. A CPU is no faster with more of them, and their activations fill its memory.
TRAIN_BUDGET = {"cpu": 512, "cuda": 32768}
# A GPU is as fast with an eighth of them; before anything is computed twice, a forward gets shorter.
SMALLEST_SHARE = {"cpu": 1, "cuda": 8}
# Share of the machine's memory that a run may plan for. A computer has other things to do than train.
ROOM = {"cpu": 0.5, "cuda": 0.8}


# Bytes of one of the four parts that an mlp of its own keeps of lowered weights: three in float32, one lowered.
UNFUSED_LOW = 3.5
# DoRA keeps what its layers give, to scale it.
DORA = 1.7


class Layers(Protocol):
    """What the arithmetic needs to know of a model's layers."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def attention_width(self) -> int: ...  # heads * head_dim
    @property
    def key_value_width(self) -> int: ...  # the same of keys, or of values
    @property
    def experts_per_token(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class ActivationPlan:
    """`token_budget` of a forward, whether its activations are computed again in the backward, and bytes."""

    token_budget: int
    checkpointed: bool
    tokens: int  # of the fullest forward
    activation_bytes: int
    kept_bytes: int  # what keeping everything would take

    @property
    def sentence(self) -> str:
        need = f"{max(1, round(self.activation_bytes / 2**20)):,} MB"
        if self.checkpointed:
            kept = f"{max(1, round(self.kept_bytes / 2**20)):,} MB"
            return (
                f"Activations are computed again in the backward pass: about {need} for {self.tokens:,} tokens "
                f"instead of {kept}."
            )
        return f"Activations are kept for the backward pass: about {need} for {self.tokens:,} tokens."


def bytes_per_layer(
    layers: Layers, *, dropout: bool, size: int, fused: bool = False, rank: int = 0, dora: bool = False
) -> float:
    """Bytes that one layer keeps of one token. `size`: bytes of a weight; `rank`: of an adapter on all linears.

    In float32 whatever the weights are: the inputs of two norms (not fused: of two more, behind attention and
    mlp) and of a norm on queries and keys; queries, keys, values and the attention's result. In `size`: what the
    norms give (twice; lowered, once for each of the five linear layers that read it) and the attention's result,
    if lowered; gate and up (not fused: their product and silu(gate), too, which lowered layers give in float32);
    rank values at each of seven adapters.
    Dropout adds a byte an input (fused), else 1.4 of `size`: a dropped copy and its noise.

    Measured with saved-tensor hooks on Llama, Qwen3 and Gemma 3 in both precisions, LoRA and DoRA: never above this by
    more than 2 %, for which the layer more of `bytes_per_token` stands, and down to 20 % below (a third with adapters
    on attention alone).
    """
    h, a, kv = layers.hidden_size, layers.attention_width, layers.key_value_width
    i = layers.intermediate_size * layers.experts_per_token
    norms, parts, inputs = (2 if fused else 4), (2 if fused else 4), 5 * h + a + i
    read = 2 * h if size == 4 else 5 * h + a
    part = size if fused or size == 4 else UNFUSED_LOW
    found = 4.0 * (norms * h + 3 * (a + kv)) + float(size) * (read + 7 * rank) + float(part * parts * i)
    found += inputs * (1.0 if fused else 1.4 * size) if dropout else 0.0
    return found * DORA if dora else found


def bytes_per_token(
    layers: Layers,
    *,
    dropout: bool,
    size: int,
    checkpointed: bool,
    fused: bool = False,
    rank: int = 0,
    dora: bool = False,
) -> float:
    """Bytes that all layers keep of one token.

    A layer more is at work in the backward pass. Computed again, all layers but the one at work keep 1.25 hidden.
    """
    layer = bytes_per_layer(layers, dropout=dropout, size=size, fused=fused, rank=rank, dora=dora)
    if checkpointed:
        return layers.num_layers * 1.25 * layers.hidden_size * 4 + layer
    return (layers.num_layers + 1) * layer


def plan_activations(
    layers: Layers,
    *,
    device: str,
    size: int,
    dropout: bool,
    batch_size: int,
    longest: int,
    fixed_bytes: int,
    memory_bytes: int,
    switch: str = "auto",
    fused: bool = False,
    rank: int = 0,
    dora: bool = False,
) -> ActivationPlan:
    """The largest token budget whose activations fit beside `fixed_bytes` (weights, adapter, runtime …).

    Where not even the smallest does, they are computed again, with the largest budget that then fits.
    `longest`: tokens of the longest pair, which is never cut; `batch_size` pairs are in a forward at most.
    `memory_bytes` 0 = not known: everything is kept. `switch` "on" and "off" decide alone. `fused`: the engine's
    own functions take the place of the model's mlps and of peft's layers, which keep less.
    """
    room = ROOM[device] * memory_bytes - fixed_bytes if memory_bytes > 0 else float("inf")
    most, least = TRAIN_BUDGET[device], TRAIN_BUDGET[device] // SMALLEST_SHARE[device]
    budgets = [most]
    while budgets[-1] // 2 >= least:
        budgets.append(budgets[-1] // 2)
    kept, again = (
        bytes_per_token(
            layers, dropout=dropout, size=size, checkpointed=checkpointed, fused=fused, rank=rank, dora=dora
        )
        for checkpointed in (False, True)
    )

    def fullest(budget: int) -> int:
        return min(batch_size * longest, max(budget, longest))

    def made(budget: int, checkpointed: bool) -> ActivationPlan:
        tokens = fullest(budget)
        return ActivationPlan(
            budget, checkpointed, tokens, int(tokens * (again if checkpointed else kept)), int(tokens * kept)
        )

    ways = {"on": (True,), "off": (False,)}.get(switch, (False, True))
    for checkpointed in ways:
        for budget in budgets:
            if fullest(budget) * (again if checkpointed else kept) <= room:
                return made(budget, checkpointed)
    return made(budgets[-1], ways[-1])
