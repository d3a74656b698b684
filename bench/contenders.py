"""The two that are compared, as their users run them: TRL's `DPOTrainer`, and this engine's loop.

Both get the same base weights, the same first adapter, the same pairs and the same settings.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from training.contract import RunConfig
from training.engine.activations import use_activations
from training.engine.adapters import POLICY
from training.engine.checkpoints import Identity
from training.engine.data import tokenize_pairs
from training.engine.events import EventLog
from training.engine.fused import fuse
from training.engine.interrupts import Interrupts
from training.engine.loop import Loop
from training.engine.order import Order
from training.engine.policy import Placement, load_policy, load_tokenizer, use_fast_layout
from training.engine.reference import score_reference

CUDA = torch.cuda.is_available()
PRECISION = "bfloat16" if CUDA else "float32"  # of both, unless a part says otherwise
BETA, LEARNING_RATE, LORA_R, LORA_ALPHA = 0.1, 1e-4, 16, 32


def run_config(model: Path, **settings: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "run_id": "bench", "model_path": str(model), "train_path": "", "beta": BETA, "learning_rate": LEARNING_RATE,
        "lora_r": LORA_R, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0, "max_length": 512, "warmup_ratio": 0.0,
        "lr_scheduler_type": "constant", "gradient_accumulation_steps": 1, "dtype": PRECISION,
    }  # fmt: skip
    return RunConfig(**(defaults | settings))


class Ours:
    """The loop of a run, held between its steps."""

    def __init__(self, config: RunConfig, pairs: Sequence[dict[str, Any]], folder: Path, steps: int) -> None:
        placement = Placement.choose(config)
        tokenizer = load_tokenizer(config)
        self.pairs, _ = tokenize_pairs(pairs, tokenizer, max_length=config.max_length)
        self.policy = load_policy(config, placement, self.pairs[:1])
        self.layout = use_fast_layout(self.policy, self.pairs)
        fuse(self.policy.model, POLICY)
        use_activations(self.policy, config, self.pairs)
        reference = score_reference(self.policy, self.pairs, folder / "reference", progress=lambda *_: None)
        order = Order.of(config, len(pairs))
        if order.total_steps < steps:
            raise ValueError(f"{len(pairs)} pairs are too few for {steps} steps")
        self.loop = Loop(
            config=config,
            run_dir=folder,
            policy=self.policy,
            train=self.pairs,
            evaluation=[],
            reference=reference,
            order=order,
            events=EventLog(folder),
            interrupts=Interrupts(folder),
            identity=Identity("", "", ""),
            fingerprint={},
        )
        self.policy.model.train()

    def next_indices(self) -> list[int]:
        return self.loop.order.micro_batches(self.loop.state.step)[0]

    def step(self) -> float:
        """One optimizer step; returns its loss."""
        self.loop._step()
        loss = self.loop.state.last_training["loss"]
        assert loss is not None
        return loss


class Trl:
    """`training_step`, clip, optimizer step, as `train()` does them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.current_gradient_accumulation_steps = 1
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
        trainer.model_wrapped = trainer.model
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.create_optimizer()
        trainer.model.train()

    def copy_adapter(self, ours: Ours) -> None:
        theirs = {
            name: tensor for name, tensor in self.trainer.model.named_parameters() if tensor.requires_grad
        }
        with torch.no_grad():
            for name, tensor in ours.policy.trainable.items():
                theirs[name].copy_(tensor)

    def step(self, indices: Sequence[int]) -> float:
        trainer = self.trainer
        batch = trainer.data_collator([trainer.train_dataset[index] for index in indices])
        loss = trainer.training_step(trainer.model, batch)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return float(loss)


def trl_trainer(model: Path, pairs: Sequence[dict[str, Any]], folder: Path, **settings: Any) -> Any:
    """A `DPOTrainer` over LoRA on all linear layers. `settings` go into its `DPOConfig`."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    defaults: dict[str, Any] = {
        "output_dir": str(folder), "beta": BETA, "learning_rate": LEARNING_RATE, "max_length": 512,
        "use_cpu": not CUDA, "bf16": CUDA, "gradient_checkpointing": False, "report_to": [],
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "num_train_epochs": 1, "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "seed": 42,
    }  # fmt: skip
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs]
    with quiet():
        return DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=DPOConfig(**(defaults | settings)),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=LORA_R,
                lora_alpha=LORA_ALPHA,
                lora_dropout=0.0,
                target_modules="all-linear",
            ),
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and advice of libraries belong to no table."""
    logging.disable(logging.WARNING)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
