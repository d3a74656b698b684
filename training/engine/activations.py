"""Whether a run keeps its activations or computes them again, decided from its own pairs and machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.activation_memory import TRAIN_BUDGET, ActivationPlan, plan_activations
from training.contract import RunConfig
from training.engine.adapters import facts
from training.engine.data import TokenizedPair
from training.engine.errors import RefusedError
from training.engine.packed import packed_states
from training.engine.policy import Policy
from training.estimates import LOGITS_ROWS, RUNTIME_BYTES


def use_activations(policy: Policy, config: RunConfig, pairs: Sequence[TokenizedPair]) -> ActivationPlan:
    """Plan for the longest of the pairs, after layout and fusing; switches checkpointing on where needed."""
    from training.engine.estimating import shape_of_folder, this_machine

    placement = policy.scorer.placement
    kind, size = placement.device.type, placement.dtype.itemsize
    packed = policy.scorer.layout is packed_states
    adapter = facts(policy.model)
    trainable = sum(tensor.numel() for tensor in policy.trainable.values())
    frozen = sum(tensor.numel() * tensor.element_size() for tensor in policy.model.parameters())
    fixed = frozen + _head_copies(policy) + 12 * trainable + RUNTIME_BYTES[kind]
    try:
        shape = shape_of_folder(Path(config.model_path))
    except RefusedError:  # nothing to plan with: what the person said, or everything is kept
        plan = ActivationPlan(TRAIN_BUDGET[kind], config.gradient_checkpointing == "on", 0, 0, 0)
    else:
        plan = plan_activations(
            shape,
            device=kind,
            size=size,
            dropout=config.lora_dropout > 0 and config.finetuning_type == "lora",
            batch_size=config.per_device_train_batch_size,
            longest=max(tokens_of(pair, packed=packed) for pair in pairs),
            fixed_bytes=fixed + 12 * LOGITS_ROWS * shape.vocab_size,
            memory_bytes=this_machine(placement.device).memory_bytes,
            switch=config.gradient_checkpointing,
            fused=is_fused(policy),
            rank=adapter["r"] if adapter else 0,
            dora=adapter is not None and "dora" in adapter["kind"],
        )
    if plan.checkpointed:
        policy.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    policy.activations = plan
    return plan


def is_fused(policy: Policy) -> bool:
    """Do the engine's own functions stand in for every mlp and every adapter? Some of them are not enough."""
    taken = [
        "forward" in vars(module)
        for module in policy.model.modules()
        if hasattr(module, "down_proj") or hasattr(module, "lora_A")
    ]
    return any(hasattr(module, "down_proj") for module in policy.model.modules()) and all(taken)


def tokens_of(pair: TokenizedPair, *, packed: bool) -> int:
    """Rows of hidden states that the pair takes in a forward of its own."""
    if packed:
        return pair.num_tokens
    sides = [side for side in (pair.chosen, pair.rejected) if len(side)]
    return len(sides) * (len(pair.prompt) + max(len(side) for side in sides))


def _head_copies(policy: Policy) -> int:
    """Bytes of the vocabulary projection beside the model's own: kept lower than it, or as products take it."""
    head, kept = policy.head, {tensor.data_ptr() for tensor in policy.model.parameters()}
    copies = {tensor.data_ptr(): tensor for tensor in (head.weight, head.ready().weight)}
    return sum(tensor.numel() * tensor.element_size() for at, tensor in copies.items() if at not in kept)
