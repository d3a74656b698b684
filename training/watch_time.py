"""How long a run answers its watch prompts. Pure arithmetic; `training.estimates` adds it to the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from training.contract import RunConfig
from training.run_checks import uses_reference

WATCH_ROWS = {"cpu": 8, "cuda": 64}  # prompts that are answered at once
# A token of a batch of answers is a pass over the weights, however many prompts share it. 8 GB/s were measured on one
# core with the starter model; on a GPU it is the launching of kernels that takes the time of a small model.
MEMORY_BYTES_PER_SECOND = {"cpu": 8e9, "cuda": 1e12}
FLOOR_SECONDS_PER_TOKEN = {"cpu": 0.01, "cuda": 0.025}
SETTINGS = ("watch_path", "watch_prompts", "watch_max_new_tokens", "watch_temperature")


class Machine(Protocol):
    @property
    def device(self) -> str: ...
    @property
    def flops(self) -> float: ...
    @property
    def bytes_per_weight(self) -> int: ...


def watch_seconds(
    parameters: Mapping[str, Any],
    machine: Machine,
    *,
    active_parameters: int,
    prompt: float,
    num_eval_pairs: int,
    num_evaluations: int,
) -> float:
    """Once by the reference, where the method has one, and by the policy at each evaluation.

    `prompt`: mean tokens of one. Answers may have watch_max_new_tokens tokens and are taken to. With N active
    parameters, each token reads them once for all prompts of a batch and computes 2N for each; prompts cost 2N a
    token. At each evaluation policy and reference then read prompt and answer once more, for the sampled KL. What
    `parameters` do not say has the engine's default.
    """
    settings = {name: parameters.get(name, getattr(RunConfig, name)) for name in SETTINGS}
    prompts, answer = int(settings["watch_prompts"]), int(settings["watch_max_new_tokens"])
    if not settings["watch_path"]:
        prompts = min(prompts, num_eval_pairs)
    reference = uses_reference(parameters.get("method", "dpo"), parameters.get("simpo_gamma", 0.0))
    if not num_evaluations or not prompts or parameters.get("parallelism") == "fsdp":
        return 0.0
    kind, forward = machine.device, 2 * active_parameters / machine.flops
    reading = active_parameters * machine.bytes_per_weight / MEMORY_BYTES_PER_SECOND[kind]
    passes = math.ceil(prompts / WATCH_ROWS[kind]) * answer
    tokens = prompts * (prompt + answer)
    answering = passes * (FLOOR_SECONDS_PER_TOKEN[kind] + reading) + tokens * forward
    scoring = 2 * tokens * forward if reference and settings["watch_temperature"] == 1.0 else 0.0
    return (num_evaluations + reference) * answering + num_evaluations * scoring
