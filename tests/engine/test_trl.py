"""Loss and gradients agree with TRL's DPOTrainer: same pairs, same model, an adapter that is not zero."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.policies import bend, gradients, tiny_config, tiny_data, tiny_policy
from tests.tiny import tiny_pairs
from training.engine.data import TokenizedPair
from training.engine.logps import token_logps
from training.engine.objective import Objective, PairLogps
from training.engine.policy import load_tokenizer

pytestmark = pytest.mark.slow
BETA = 0.3


def trl_trainer(model: Path, count: int, folder: Path, **changes: Any) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    settings = DPOConfig(
        output_dir=str(folder), beta=BETA, per_device_train_batch_size=count, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], max_length=None, learning_rate=1e-3,
        **changes,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(tiny_pairs(count)),
        processing_class=load_tokenizer(tiny_config(model)),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
        ),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("packed", [False, True])
def test_loss_gradients_and_tokens_agree_with_trl(tiny_model: Path, tmp_path: Path, packed: bool) -> None:
    count = 5
    policy = tiny_policy(tiny_config(tiny_model), packed=packed, bent=False)
    bend(policy)
    trainer = trl_trainer(tiny_model, count, tmp_path)
    theirs = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    assert set(theirs) == set(policy.trainable)
    with torch.no_grad():
        for name, tensor in policy.trainable.items():
            theirs[name].copy_(tensor)

    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    expected = torch.cat([theirs[name].grad.flatten() for name in policy.trainable])

    pairs = tiny_data(tiny_model, count)
    assert rows_of(pairs) == rows_of_trl(batch)
    states = policy.scorer(pairs)
    tokens = token_logps(states.hidden, states.labels, policy.head)
    with policy.reference():
        before = policy.scorer(pairs)
        reference = token_logps(before.hidden, before.labels, policy.head)
    logps = PairLogps.of(states, tokens, reference)
    losses = Objective(dataclasses.replace(tiny_config(tiny_model), beta=BETA)).losses(
        logps, tokens_per_pair=1.0
    )
    losses.mean().backward()
    assert abs(losses.mean().item() - 0.6931) > 1e-3  # an adapter of zero would prove nothing
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    assert ((gradients(policy) - expected).norm() / expected.norm()).item() < 1e-4


def rows_of(pairs: list[TokenizedPair]) -> set[tuple[int, ...]]:
    return {
        (*pair.prompt.tolist(), *side.tolist()) for pair in pairs for side in (pair.chosen, pair.rejected)
    }


def rows_of_trl(batch: dict[str, torch.Tensor]) -> set[tuple[int, ...]]:
    return {
        tuple(row[mask.bool()].tolist())
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
