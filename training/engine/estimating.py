"""The `estimate` command: steps, tokens, memory and time of a run, before a weight is read.

Counts with the run's own tokenizer and rule for over-long pairs; the arithmetic is `training.estimates`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import psutil
import torch

from training import estimates
from training.base_models import shape_of
from training.contract import DataCounts, RunConfig, Split
from training.engine.data import TokenizedPair
from training.engine.errors import RefusedError
from training.engine.events import LoggedEvents
from training.engine.order import Order
from training.engine.policy import Placement, load_tokenizer
from training.engine.preflight import check_config
from training.engine.training_run import make_quiet_and_deterministic, prepare_data
from training.model_folder import FolderProblem, read_folder


class TokenCounts(TypedDict):
    """Tokens of one split, after cutting. A prompt is counted once for both of its answers."""

    total: int
    prompt_mean: float
    chosen_mean: float
    rejected_mean: float
    longest_side: int  # prompt + longer answer


class RunEstimate(TypedDict):
    """What `estimate` prints and returns."""

    effective_batch: int  # pairs behind one optimizer step
    steps_per_epoch: int
    total_steps: int
    num_train_pairs: int
    num_eval_pairs: int
    data: dict[Split, DataCounts]
    tokens: dict[Split, TokenCounts]
    trained_tokens: int  # of all steps
    num_parameters: int
    lora_parameters: int
    memory_bytes: dict[str, int]  # weights, adapter, activations, logits, runtime, total
    fits: estimates.Verdict
    sentence: str
    seconds: float
    device: str
    dtype: str
    machine: str


def estimate(config: RunConfig) -> RunEstimate:
    """See `training.engine.estimate`."""
    config = dataclasses.replace(config, num_devices=1)  # counts and memory of a device do not depend on it
    check_config(config)
    make_quiet_and_deterministic()
    placement = Placement.choose(config)
    data = prepare_data(config, load_tokenizer(config), LoggedEvents())
    order = Order.of(config, len(data.train))
    shape, machine = shape_of_folder(Path(config.model_path)), this_machine(placement.device)
    # The estimates know one length: that of a side.
    parameters = dataclasses.asdict(config) | {"max_length": config.side_length}
    tokens: dict[Split, TokenCounts] = {"train": count(data.train)}
    if data.evaluation:
        tokens["eval"] = count(data.evaluation)
    mean = _pair_tokens(tokens["train"])
    peak = estimates.memory(shape, parameters, mean, machine)
    fit = estimates.fit(peak, machine)
    seconds = estimates.seconds(
        shape, parameters, mean, machine,
        num_train_pairs=len(data.train), num_eval_pairs=len(data.evaluation),
        num_evaluations=_evaluations(config, order.total_steps) if data.evaluation or config.watch_path else 0,
        total_steps=order.total_steps,
    )  # fmt: skip
    return {
        "effective_batch": order.pairs_per_step,
        "steps_per_epoch": order.steps_per_epoch,
        "total_steps": order.total_steps,
        "num_train_pairs": len(data.train),
        "num_eval_pairs": len(data.evaluation),
        "data": data.counts,
        "tokens": tokens,
        "trained_tokens": _trained_tokens(order, data.train),
        "num_parameters": shape.num_parameters,
        "lora_parameters": estimates.lora_parameters(shape, parameters),
        "memory_bytes": dataclasses.asdict(peak) | {"total": peak.total},
        "fits": fit.verdict,
        "sentence": fit.sentence,
        "seconds": round(seconds, 1),
        "device": placement.device.type,
        "dtype": placement.dtype_name,
        "machine": machine.name,
    }


def count(pairs: Sequence[TokenizedPair]) -> TokenCounts:
    sizes = np.array([(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs])
    prompt, chosen, rejected = (float(mean) for mean in sizes.mean(axis=0).round(2))
    return {
        "total": int(sizes.sum()),
        "prompt_mean": prompt,
        "chosen_mean": chosen,
        "rejected_mean": rejected,
        "longest_side": int((sizes[:, 0] + sizes[:, 1:].max(axis=1)).max()),
    }


def shape_of_folder(folder: Path) -> estimates.ModelShape:
    """From config.json and the headers of the weight files."""
    try:
        shape = shape_of(read_folder(folder, roots=[Path(folder.absolute().anchor)]))
    except FolderProblem as problem:
        raise RefusedError(f"{folder}: {problem}", "Choose the base model again.") from None
    if shape is None:
        raise RefusedError(
            f"{folder} does not say how large its layers are.",
            "Start a short run and look at its result.",
        )
    return shape


def this_machine(device: torch.device) -> estimates.Machine:
    if device.type == "cuda":
        facts: Any = torch.cuda.get_device_properties(device)
        return estimates.gpu_machine(name=facts.name, memory_bytes=facts.total_memory)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return estimates.cpu_machine(memory_bytes=psutil.virtual_memory().total, cores=cores)


def _pair_tokens(counts: TokenCounts) -> estimates.PairTokens:
    return estimates.PairTokens(
        prompt=counts["prompt_mean"],
        chosen=counts["chosen_mean"],
        rejected=counts["rejected_mean"],
        longest=counts["longest_side"],
    )


def _evaluations(config: RunConfig, total_steps: int) -> int:
    """Before step 1, at the end, and every `eval_steps` between."""
    return 2 + ((total_steps - 1) // config.eval_steps if config.eval_steps else 0)


def _trained_tokens(order: Order, pairs: Sequence[TokenizedPair]) -> int:
    return sum(
        pairs[index].num_tokens
        for step in range(order.total_steps)
        for indices in order.micro_batches(step)
        for index in indices
    )
