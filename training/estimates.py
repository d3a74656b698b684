"""How many steps, how much memory and how long a LoRA DPO run will take, before it is started.

Pure arithmetic on the shape of a model, the pairs, the parameters and the machine. The formulae are written
at each function; activations were measured with saved-tensor hooks (two architectures, within 10 %), times
are rough by nature and every page says so.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from training.activation_memory import ActivationPlan, plan_activations
from training.processor import is_amd_with_avx512
from training.watch_time import watch_seconds

MIB = 1024**2
GIB = 1024**3

EVALUATIONS_AIMED_AT = 10  # when the person leaves "evaluate every" to the studio
# Names of linear layers that the preset "attention" of target_modules stands for; the others are the mlp's.
ATTENTION_LAYERS = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "dense", "query_key_value", "c_attn")
)
NF4_BYTES = 0.516  # half a byte, and doubly quantised constants of blocks of 64 (arXiv 2305.14314, section 3)
LOGITS_ROWS = 256  # rows of the vocabulary projection that are alive at once
RUNTIME_BYTES = {
    "cpu": 800 * MIB,
    "cuda": 1200 * MIB,
}  # interpreter, libraries, CUDA context, allocator's slack
TIGHT, TOO_LARGE = 0.80, 0.95  # share of the machine's memory
START_SECONDS = 15.0  # interpreter, imports, tokenising
READ_BYTES_PER_SECOND = 400e6
FLOOR_SECONDS_PER_STEP = {"cpu": 0.05, "cuda": 0.08}  # optimizer, logging, kernel launches
UTILISATION = 0.35  # share of a GPU's datasheet speed that LoRA training reaches
CPU_FLOPS_PER_CORE = 4e10  # float32; 108 GFLOP/s were measured on two cores, others are slower
AMD_AVX512_FLOPS_PER_CORE = 1e11  # see `engine.cpu_products`; 240 to 280 GFLOP/s were measured on two cores
# Dense bf16 tensor speed by name, TFLOP/s, from the datasheets; a GPU not listed counts as 60.
GPU_TFLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250), ("H200", 989), ("H100", 989), ("A100", 312), ("L40", 362), ("RTX 5090", 209),
    ("RTX 4090", 165), ("RTX 3090", 71), ("A40", 150), ("A10", 125), ("L4", 121), ("T4", 65), ("V100", 125),
)  # fmt: skip
UNKNOWN_GPU_TFLOPS = 60.0

Verdict = Literal["fits", "tight", "too_large", "unknown"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the arithmetic needs to know of a model. `lora_units` is in + out features, summed over the
    layers,
    of each linear module: an adapter of rank r on it has r times as many parameters."""

    num_parameters: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    attention_width: int  # heads * head_dim
    vocab_size: int
    lora_units: Mapping[str, int]
    active_parameters: int = 0  # of a mixture of experts; 0 = all
    experts_per_token: int = 1
    gated_silu: bool = False  # the mlp is down(silu(gate(x)) * up(x)), as far as is known

    @property
    def key_value_width(self) -> int:
        """From what k_proj gives; where it has no layer of its own, no wider than the queries."""
        width = self.lora_units.get("k_proj", 0) // max(1, self.num_layers) - self.hidden_size
        return width if 0 < width < self.attention_width else self.attention_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTokens:
    """Tokens of the pairs: means, and those of the longest prompt with its answers."""

    prompt: float = 150
    chosen: float = 200
    rejected: float = 200
    longest: int = 0  # prompt + longer answer; 0 = not known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the run would happen."""

    device: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    flops: float

    @property
    def bytes_per_weight(self) -> int:
        return 2 if self.device == "cuda" else 4

    @property
    def speed(self) -> str:
        if self.flops >= 1e12:
            return f"{self.flops / 1e12:.3g} TFLOP/s"
        return f"{self.flops / 1e9:.3g} GFLOP/s"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak of a step."""

    weights: int
    adapter: int
    activations: int
    logits: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.logits + self.runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    verdict: Verdict
    sentence: str
    need: str = ""  # "2.7 GB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will be."""

    effective_batch: int
    steps_per_epoch: int
    total_steps: int
    eval_steps: int  # evaluate every so many steps; 0 = no evaluation
    num_evaluations: int  # the one before step 1 included
    lora_parameters: int
    memory: Memory
    fit: Fit
    seconds: float
    machine: Machine


def cpu_machine(*, memory_bytes: int, cores: int) -> Machine:
    name = f"CPU, {cores} core{'s' if cores != 1 else ''}"
    each = AMD_AVX512_FLOPS_PER_CORE if is_amd_with_avx512() else CPU_FLOPS_PER_CORE
    return Machine(device="cpu", name=name, memory_bytes=memory_bytes, flops=max(1, cores) * each)


def gpu_machine(*, name: str, memory_bytes: int) -> Machine:
    # "A10" must not be read out of "A100", nor "A40" out of "A4000"; "L40S" is an L40.
    tflops = next((v for part, v in GPU_TFLOPS if re.search(rf"\b{part}(?!\d)", name)), UNKNOWN_GPU_TFLOPS)
    return Machine(device="cuda", name=name, memory_bytes=memory_bytes, flops=tflops * 1e12 * UTILISATION)


def effective_batch(parameters: Mapping[str, Any]) -> int:
    """Pairs behind one update: batch_size times gradient_accumulation_steps."""
    return int(parameters["per_device_train_batch_size"]) * int(parameters["gradient_accumulation_steps"])


def steps(num_train_pairs: int, parameters: Mapping[str, Any]) -> tuple[int, int]:
    """(steps per epoch, steps in all): ceil(pairs / effective batch); a last, smaller batch is a step too."""
    if num_train_pairs <= 0:
        return 0, 0
    per_epoch = math.ceil(num_train_pairs / effective_batch(parameters))
    return per_epoch, max(1, math.ceil(per_epoch * float(parameters["num_train_epochs"]) - 1e-9))


def evaluation_interval(total_steps: int, wanted: int, *, has_validation: bool) -> tuple[int, int]:
    """(every so many steps, number of evaluations with those before step 1 and at the end)."""
    if not has_validation or total_steps <= 0:
        return 0, 0
    every = wanted if wanted > 0 else max(1, math.ceil(total_steps / EVALUATIONS_AIMED_AT))
    inner = math.ceil(total_steps / every) - 1  # at every, 2*every… before the last step
    return every, 1 + inner + 1


def is_full(parameters: Mapping[str, Any]) -> bool:
    """All weights are trained, not an adapter."""
    return parameters.get("finetuning_type") == "full"


def is_fused(shape: ModelShape, parameters: Mapping[str, Any]) -> bool:
    """Will the engine put its own functions in the place of mlps and adapters? As `training.engine.fused` decides
    on the model: stock LoRA on the mlps too, weights neither trained, quantised nor divided."""
    chosen = set(parameters["target_modules"]) or {"all-linear"}
    return (
        shape.gated_silu
        and not is_full(parameters)
        and not parameters.get("use_dora", False)
        and parameters.get("quantization", "none") == "none"
        and parameters.get("parallelism", "data") != "fsdp"
        and bool(chosen & {"all-linear", "mlp", "down_proj"})
    )


def lora_parameters(shape: ModelShape, parameters: Mapping[str, Any]) -> int:
    """rank * (in + out) over the chosen modules of all layers; 0 with full fine-tuning."""
    if is_full(parameters):
        return 0
    chosen = set(parameters["target_modules"]) or {"all-linear"}
    units = [
        unit
        for name, unit in shape.lora_units.items()
        if chosen & {"all-linear", name, "attention" if name in ATTENTION_LAYERS else "mlp"}
    ]
    return int(parameters["lora_r"]) * sum(units)


def memory(shape: ModelShape, parameters: Mapping[str, Any], tokens: PairTokens, machine: Machine) -> Memory:
    """Peak of one training step.

    weights      parameters * 2 bytes (bf16 on a GPU) or 4 (float32 on a CPU)
                 or, with nf4, half a byte and the constants of its blocks, but for the vocabulary
    adapter      LoRA parameters * 16: value, gradient and two AdamW moments in float32. With full fine-tuning
                 the weights are kept in float32, and this is 12 for each: gradient and moments
    activations  tokens of the fullest forward * bytes kept per token (`training.activation_memory`). A forward
                 holds batch_size pairs, or as many as the engine's token budget lets in, and one at the least
    logits       256 rows of the vocabulary * (values, gradient, softmax) * 4 bytes
    """
    found = _activations(shape, parameters, tokens, machine)
    return dataclasses.replace(_fixed(shape, parameters, machine), activations=found.activation_bytes)


def is_checkpointed(
    shape: ModelShape, parameters: Mapping[str, Any], tokens: PairTokens, machine: Machine
) -> bool:
    """Does the engine compute activations again instead of keeping them?"""
    return _activations(shape, parameters, tokens, machine).checkpointed


def _fixed(shape: ModelShape, parameters: Mapping[str, Any], machine: Machine) -> Memory:
    """Everything but the activations."""
    return Memory(
        weights=_weight_bytes(shape, parameters, machine),
        adapter=12 * shape.num_parameters if is_full(parameters) else 16 * lora_parameters(shape, parameters),
        activations=0,
        logits=LOGITS_ROWS * shape.vocab_size * 4 * 3,
        runtime=RUNTIME_BYTES[machine.device],
    )


def _weight_bytes(shape: ModelShape, parameters: Mapping[str, Any], machine: Machine) -> int:
    if is_full(parameters):
        return 4 * shape.num_parameters
    if parameters.get("quantization", "none") == "none":
        return shape.num_parameters * machine.bytes_per_weight
    vocabulary = min(shape.num_parameters, 2 * shape.vocab_size * shape.hidden_size)
    return round(NF4_BYTES * (shape.num_parameters - vocabulary)) + vocabulary * machine.bytes_per_weight


def _activations(
    shape: ModelShape, parameters: Mapping[str, Any], tokens: PairTokens, machine: Machine
) -> ActivationPlan:
    return plan_activations(
        shape,
        device=machine.device,
        size=machine.bytes_per_weight,
        dropout=parameters["lora_dropout"] > 0 and not is_full(parameters),
        batch_size=int(parameters["per_device_train_batch_size"]),
        longest=_longest_pair(parameters, tokens),
        fixed_bytes=_fixed(shape, parameters, machine).total,
        memory_bytes=machine.memory_bytes,
        switch=str(parameters.get("gradient_checkpointing", "auto")),
        fused=is_fused(shape, parameters),
        rank=0 if is_full(parameters) else int(parameters["lora_r"]),
        dora=bool(parameters.get("use_dora")) and not is_full(parameters),
    )


def _longest_pair(parameters: Mapping[str, Any], tokens: PairTokens) -> int:
    """Tokens of the longest pair, its prompt counted once, as far as max_length lets both sides grow."""
    side = int(parameters["max_length"])
    if tokens.longest:
        side = min(side, tokens.longest)
    return 2 * side - min(round(tokens.prompt), side // 2)


def fit(memory: Memory, machine: Machine) -> Fit:
    """Does the peak fit this machine's memory? Up to 80 % fits, up to 95 % is tight."""
    need, have = show_bytes(memory.total), show_bytes(machine.memory_bytes)
    if machine.memory_bytes <= 0:
        sentence = f"Needs about {need}; this machine's memory is not known yet."
        return Fit(verdict="unknown", sentence=sentence, need=need)
    share = memory.total / machine.memory_bytes
    if share <= TIGHT:
        return Fit(verdict="fits", sentence=f"Needs about {need} of {have}.", need=need)
    if share <= TOO_LARGE:
        sentence = (
            f"Needs about {need} of {have}: it may run out. A smaller max_context_length leaves more room."
        )
        return Fit(verdict="tight", sentence=sentence, need=need)
    if memory.weights + memory.runtime > TOO_LARGE * machine.memory_bytes:
        advice = "The weights alone do not fit: choose a smaller model or a larger machine."
    else:
        advice = "Lower batch_size or max_context_length, or choose a smaller model."
    return Fit(
        verdict="too_large", sentence=f"Needs about {need}, this machine has {have}. {advice}", need=need
    )


def seconds(
    shape: ModelShape,
    parameters: Mapping[str, Any],
    tokens: PairTokens,
    machine: Machine,
    *,
    num_train_pairs: int,
    num_eval_pairs: int,
    num_evaluations: int,
    total_steps: int,
) -> float:
    """Rough wall time from floating-point work.

    With N active parameters a token costs 2N forward; training adds 2N backward (frozen weights have no
    gradient), 6 per LoRA parameter, and 2N again where activations are recomputed. A pair is prompt +
    chosen + rejected, the prompt computed once. The reference pass reads every pair that the run meets once
    forward; an evaluation twice (policy, and the reference for the exact KL). Work is divided by the
    machine's speed, but no step is faster than the floor of its device. Watch prompts come on top.
    """
    n = shape.active_parameters or shape.num_parameters
    side = float(parameters["max_length"])
    shared = min(side, tokens.prompt)
    pair = shared + min(side - shared, tokens.chosen) + min(side - shared, tokens.rejected)
    trained_pairs = total_steps * effective_batch(parameters)
    limit = max(1.0, num_train_pairs * float(parameters["num_train_epochs"]))
    again = 2 * n if is_checkpointed(shape, parameters, tokens, machine) else 0
    each = 4 * n + again + 6 * lora_parameters(shape, parameters)
    work = pair * min(trained_pairs, math.ceil(limit)) * each
    work += pair * (min(trained_pairs, num_train_pairs) + num_eval_pairs) * 2 * n
    work += pair * num_eval_pairs * num_evaluations * 4 * n
    floor = total_steps * FLOOR_SECONDS_PER_STEP[machine.device]
    loading = shape.num_parameters * 2 / READ_BYTES_PER_SECOND
    watch = watch_seconds(
        parameters, machine, active_parameters=n, prompt=shared,
        num_eval_pairs=num_eval_pairs, num_evaluations=num_evaluations,
    )  # fmt: skip
    return START_SECONDS + loading + max(work / machine.flops, floor) + watch


def estimate_run(
    *,
    shape: ModelShape,
    parameters: Mapping[str, Any],
    tokens: PairTokens,
    machine: Machine,
    num_train_pairs: int,
    num_eval_pairs: int = 0,
    eval_steps: int = 0,
) -> Estimate:
    """Everything at once. `parameters` are resolved and without problems (`training.recipes`)."""
    per_epoch, total = steps(num_train_pairs, parameters)
    every, evaluations = evaluation_interval(total, eval_steps, has_validation=num_eval_pairs > 0)
    peak = memory(shape, parameters, tokens, machine)
    return Estimate(
        effective_batch=effective_batch(parameters),
        steps_per_epoch=per_epoch,
        total_steps=total,
        eval_steps=every,
        num_evaluations=evaluations,
        lora_parameters=lora_parameters(shape, parameters),
        memory=peak,
        fit=fit(peak, machine),
        seconds=seconds(
            shape, parameters, tokens, machine,
            num_train_pairs=num_train_pairs, num_eval_pairs=num_eval_pairs,
            num_evaluations=evaluations, total_steps=total,
        ),
        machine=machine,
    )  # fmt: skip


def show_bytes(count: float) -> str:
    """1.4 GB, 820 MB."""
    for unit, size in (("TB", 1024**4), ("GB", GIB), ("MB", MIB)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count / 1024:.0f} kB"


def show_seconds(value: float) -> str:
    """A rough time in words: "about 4 minutes"."""
    if value < 90:
        return "about a minute"
    if value < 90 * 60:
        return f"about {round(value / 60)} minutes"
    if value < 36 * 3600:
        return f"about {round(value / 3600)} hours"
    if value < 400 * 86400:
        return f"about {round(value / 86400)} days"
    return "more than a year"


def show_count(value: float) -> str:
    """135M, 4.0B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:  # what rounds to 1000M is 1.0B
            short = value / size
            return f"{short:.0f}{unit}" if short >= 100 or unit in "Mk" else f"{short:.1f}{unit}"
    return f"{value:.0f}"
