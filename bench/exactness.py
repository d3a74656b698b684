"""Loss and gradient of two pairs against a plain implementation in float64, both contenders, fp32 and bf16.

The adapter is not zero: with B = 0 policy and reference would be one and every error would hide.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.contenders import BETA, CUDA, LORA_ALPHA, LORA_R, Ours, Trl, quiet, run_config, trl_trainer

DEVICE = "cuda" if CUDA else "cpu"
Named = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative to float64: |loss - loss64| / |loss64| and ||g - g64|| / ||g64||."""

    loss: float
    gradient: float


def bend(names: list[str], shapes: list[torch.Size]) -> Named:
    """The same adapter for all: A as drawn, B away from zero."""
    draw = torch.Generator().manual_seed(11)
    return {
        name: torch.randn(shape, generator=draw) * (0.02 if "lora_B" in name else 0.05)
        for name, shape in zip(names, shapes, strict=True)
    }


def plain_float64(model: Path, pairs: list[Any], adapter: Named) -> tuple[float, torch.Tensor]:
    """Each side by itself, all logits, log_softmax: nothing shared with either contender."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).to(DEVICE)
    policy = get_peft_model(
        base,
        LoraConfig(task_type="CAUSAL_LM", r=LORA_R, lora_alpha=LORA_ALPHA, target_modules="all-linear"),
        autocast_adapter_dtype=False,
    )
    parameters = {name: tensor for name, tensor in policy.named_parameters() if tensor.requires_grad}
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.data = adapter[name].double().to(DEVICE)

    def logp(prompt: Any, side: Any) -> torch.Tensor:
        ids = torch.tensor([[*prompt.tolist(), *side.tolist()]], device=DEVICE)
        logits = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt) :, None]).sum()

    total = 0.0
    for pair in pairs:
        with torch.no_grad(), policy.disable_adapter():
            reference = logp(pair.prompt, pair.chosen) - logp(pair.prompt, pair.rejected)
        margin = logp(pair.prompt, pair.chosen) - logp(pair.prompt, pair.rejected) - reference
        loss = -torch.nn.functional.logsigmoid(BETA * margin) / len(pairs)
        loss.backward()
        total += loss.item()
    return total, flat(parameters, adapter)


def ours_at(model: Path, rows: list[dict[str, Any]], dtype: str, folder: Path) -> tuple[Ours, list[str]]:
    config = run_config(model, per_device_train_batch_size=len(rows), dtype=dtype)
    ours = Ours(config, rows, folder, 1)
    return ours, list(ours.policy.trainable)


def ours_loss(ours: Ours, adapter: Named) -> tuple[float, torch.Tensor]:
    from training.engine.objective import mean_chosen_tokens

    set_adapter(ours.policy.trainable, adapter)
    losses, _ = ours.loop.score(ours.pairs, mean_chosen_tokens(ours.pairs))
    losses.mean().backward()
    return losses.mean().item(), flat(ours.policy.trainable, adapter)


def trl_loss(trl: Trl, adapter: Named) -> tuple[float, torch.Tensor]:
    theirs = {name: tensor for name, tensor in trl.trainer.model.named_parameters() if tensor.requires_grad}
    set_adapter(theirs, adapter)
    dataset = trl.trainer.train_dataset
    batch = trl.trainer.data_collator([dataset[index] for index in range(len(dataset))])
    loss = trl.trainer.training_step(trl.trainer.model, batch)
    return float(loss), flat(theirs, adapter)


def set_adapter(parameters: Any, adapter: Named) -> None:
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(adapter[name])
            tensor.grad = None


def flat(parameters: Any, adapter: Named) -> torch.Tensor:
    return torch.cat([parameters[name].grad.flatten() for name in adapter]).double().cpu()


def measure(model: Path, rows: list[dict[str, Any]]) -> dict[str, Errors]:
    """Keys "ours fp32", "TRL fp32", "ours bf16", "TRL bf16"."""
    results: dict[str, Errors] = {}
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = Path(name)
        ours, names = ours_at(model, rows, "float32", folder / "a")
        adapter = bend(names, [ours.policy.trainable[key].shape for key in names])
        loss64, gradient64 = plain_float64(model, ours.pairs, adapter)

        def errors(found: tuple[float, torch.Tensor]) -> Errors:
            loss, gradient = found
            return Errors(
                abs(loss - loss64) / abs(loss64), float((gradient - gradient64).norm() / gradient64.norm())
            )

        results["ours fp32"] = errors(ours_loss(ours, adapter))
        del ours
        for label, bf16 in (("TRL fp32", False), ("TRL bf16", True)):
            trainer = trl_trainer(
                model, rows, folder / label, per_device_train_batch_size=len(rows), bf16=bf16
            )
            results[label] = errors(trl_loss(Trl(trainer), adapter))
            del trainer
        results["ours bf16"] = errors(ours_loss(ours_at(model, rows, "bfloat16", folder / "b")[0], adapter))
    return results
