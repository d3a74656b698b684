"""What the studio and the engine say to each other: a run directory, its files, its events, its exit codes.

Standard library only; imported by both sides. The engine (`python -m training.engine train RUN_DIR`) reads
`config.json`, appends to `events.jsonl` and `engine.log`, writes `checkpoints/step-000200/`, `adapter/` and
at the very end `result.json`. A file `stop` asks it to stop at the next step, evaluate, and keep what it has.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from training.metric_keys import EVAL_PREFIX as EVAL_PREFIX
from training.metric_keys import KL_PAIRS as KL_PAIRS
from training.metric_keys import Metric as Metric
from training.run_checks import ConfigError as ConfigError
from training.run_checks import check_settings
from training.setting_names import unknown_settings

# --- names inside a run directory -----------------------------------------------------------------
CONFIG_FILE = "config.json"
EVENTS_FILE = "events.jsonl"
LOG_FILE = "engine.log"
RESULT_FILE = "result.json"
STOP_FILE = "stop"
CHECKPOINTS_DIR = "checkpoints"
ADAPTER_DIR = "adapter"
PAIRS_DIR = "pairs"  # step-000040.parquet: `training/pair_columns.py`
WATCH_DIR = "watch"  # step-000040.jsonl: answers to the watch prompts
MODEL_DIR = "model"  # of full fine-tuning, instead of an adapter

# --- names inside a checkpoint directory -------------------------------------------------------------
MANIFEST_FILE = "MANIFEST.json"
CHECKPOINT_FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


class ExitCode(enum.IntEnum):
    """How the engine ended. Anything else (a signal, 1) is a crash whose log is kept."""

    OK = 0  # result.json says succeeded or stopped
    REFUSED = 2  # the input cannot work, never retried; result.json says why, a finished run's is left alone
    OUT_OF_MEMORY = 42
    DIVERGED = 43  # NaN or Inf three updates in a row
    DISK_FULL = 44
    INTERRUPTED = 75  # SIGTERM: a checkpoint was written; run again to continue


Split = Literal["train", "eval"]

# --- phases, in the order a run meets them ----------------------------------------------------------
PHASES: dict[str, str] = {
    "starting": "Starting",
    "preparing_data": "Preparing data",
    "loading_model": "Loading model",
    "reference": "Reference pass",
    "training": "Training",
    "evaluating": "Evaluating",
    "watching": "Answering watch prompts",
    "saving": "Saving",
}


# --- events: one JSON object a line in events.jsonl ---------------------------------------------------
class PhaseEvent(TypedDict):
    """Where the run is. `done` and `total` count `unit` ("pairs", "steps"); total 0 = not countable."""

    type: Literal["phase"]
    time: float
    phase: str
    done: int
    total: int
    unit: str


class DataCounts(TypedDict):
    """What happened to the pairs of one split: `read` = `kept` + `dropped`, which is the sum of what follows it."""

    read: int
    kept: int
    truncated: int  # kept, and cut to their length
    prompts_cut: int  # of these, the prompt
    completions_cut: int  # of these, an answer
    dropped: int
    identical: int  # the two answers were the same from the start
    became_identical: int  # … after cutting
    empty_answer: int  # an answer was empty text
    empty: int  # a side had no tokens
    became_empty: int  # the prompt left no room for the answer
    over_long: int  # longer than allowed, and truncation_mode is drop
    refused_by_template: int


class PlanEvent(TypedDict):
    """Said once after the data is prepared: what this run will do, and what happened to the pairs."""

    type: Literal["plan"]
    time: float
    total_steps: int
    num_train_pairs: int
    num_eval_pairs: int
    num_truncated: int
    num_dropped: int
    data: dict[Split, DataCounts]
    device: str
    dtype: str
    num_devices: int
    pairs_per_step: int  # the effective batch, on all devices together
    reference: str  # a sentence: which model the reference is
    loss: str  # a sentence: what is minimised


class MetricsEvent(TypedDict):
    """Values are finite numbers or null (a NaN in JSON would break the page)."""

    type: Literal["metrics"]
    time: float
    split: Split
    step: int
    values: dict[str, float | None]


class CheckpointEvent(TypedDict):
    """A checkpoint is complete, renamed into place and verified. `path` is relative to the run directory."""

    type: Literal["checkpoint"]
    time: float
    step: int
    path: str


class WatchEvent(TypedDict):
    """The watch prompts were answered: `path`, relative to the run directory, has a line for each of them:

    `{"id", "step", "model", "prompt": [message…], "answer", "num_tokens", "finish_reason": "stop"|"length"}`, and
    `k1`, `k3` where the divergence was estimated: nats, summed over the answer's tokens.
    """

    type: Literal["watch"]
    time: float
    step: int
    model: Literal["policy", "reference"]
    path: str
    num_prompts: int


class LogEvent(TypedDict):
    """A sentence for the person who watches the run."""

    type: Literal["log"]
    time: float
    level: Literal["info", "warning", "error"]
    text: str


Event = PhaseEvent | PlanEvent | MetricsEvent | CheckpointEvent | WatchEvent | LogEvent


AdapterKind = Literal["lora", "dora", "rslora", "rslora+dora"]


class AdapterFacts(TypedDict):
    """The trained adapter, as it is: what was continued keeps its own rank and kind."""

    kind: AdapterKind
    r: int
    lora_alpha: float
    target_modules: list[str]


class Result(TypedDict, total=False):
    """`result.json`: written last, atomically. Present means: the engine decided how the run ended."""

    status: Literal["succeeded", "stopped", "failed", "interrupted"]
    error: str  # one sentence, when failed
    next_step: str  # what the person can do about it
    step: int
    total_steps: int
    seconds: float  # wall time from the engine's start, with the attempts that it went on from
    phase_seconds: dict[str, float]  # in each of PHASES; together they are `seconds`
    num_tokens: int
    metrics: dict[str, float | None]  # of the model that is kept: its evaluation, and the step before
    last_metrics: dict[str, float | None]  # of the last evaluation and the last training step
    model_step: int  # the step of the model that is kept
    best_step: int  # of the best evaluation by metric_for_best_model; missing without validation
    metric_for_best_model: str
    best_metric: float | None  # its value
    stopped_by: Literal["request", "early_stopping", "kl_budget"]  # missing when all steps were done
    initial_metrics: dict[str, float | None]  # evaluation before step 1
    adapter_sha256: str
    adapter_bytes: int
    model_sha256: str  # of full fine-tuning, instead of the adapter's
    model_bytes: int
    finetuning_type: str
    adapter: AdapterFacts | None
    num_parameters: int  # with the adapter's
    num_trainable_parameters: int
    versions: dict[str, str]
    config: dict[str, Any]
    reference: str  # a sentence: which model the reference is
    loss: str  # a sentence: what was minimised
    data: dict[Split, DataCounts]
    data_sha256: str  # of the tokenised training pairs
    weights_sha256: str  # of base weights, their configuration and what training started from
    base_sha256: str  # of base weights alone
    start_sha256: str  # of the adapter or checkpoint that training started from; "" = none
    reference_sha256: str  # like weights_sha256; "" = no reference
    device: str
    dtype: str
    num_devices: int
    gradient_checkpointing: bool  # whether activations were computed again
    activations: str  # a sentence: kept or not, and how much memory that takes
    peak_memory_bytes: int  # of the fullest device, or of the process on a CPU


# --- the configuration of a run -------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything the engine needs to know. Paths are absolute; data files hold canonical pairs, one a line:

    `{"id": str, "prompt": [message…], "chosen": [message…], "rejected": [message…]}` with
    `message = {"role": "system"|"user"|"assistant"|"tool", "content": str}`; chosen and rejected do not
    repeat the prompt. SFT reads prompt and chosen, and `rejected` may be missing.
    """

    run_id: str
    model_path: str  # a folder with config.json, safetensors and a tokenizer
    train_path: str
    eval_path: str = ""  # "" = no validation
    # Start from this adapter, or from a checkpoints/step-… folder of a run; the reference is then base + this.
    adapter_path: str = ""
    # Another reference than the model that training starts from: a model folder ("" = model_path), an adapter on it.
    reference_model_path: str = ""
    reference_adapter_path: str = ""
    chat_template_path: str = ""  # a Jinja file; "" = the tokenizer's own
    base_model_name: str = ""  # for adapter_config.json and the model card
    reference_cache_dir: str = ""  # "" = no cache beyond this run
    reference_cache_bytes: int = 0  # the run's end removes what was used longest ago; 0 = no limit of size
    resume_from: str = ""  # a verified checkpoint directory of an earlier attempt

    method: str = "dpo"  # dpo | sft | orpo
    loss_type: str = "sigmoid"  # of DPO: see training/engine/losses.py
    beta: float = 0.1  # DPO's, SimPO's (there 2 to 10 is usual), the weight of ORPO's odds ratio
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0  # DPO: weight of the NLL of the chosen answers, per token
    simpo_gamma: float = 0.0  # above 0: SimPO, so no reference, and log-probabilities per token
    dpo_normalize_logratios_by_length: bool = False
    router_aux_loss_coef: float | None = None  # mixtures of experts: None = the model's own, 0 = none

    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 8
    learning_rate: float = 5e-5  # for adapters; all weights want 5e-7 to 5e-6
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024  # tokens of a prompt with one answer, or of the pair: see max_length_per
    max_length_per: str = "side"  # side | pair: then each side gets half of max_length
    max_prompt_length: int = 0  # 0 = only max_length bounds it
    max_completion_length: int = 0
    truncation_mode: str = "keep_end"  # keep_end | keep_start | drop: see training/engine/cutting.py
    seed: int = 42
    max_steps: int = 0  # 0 = as many as the epochs give; a positive number ends the run there

    finetuning_type: str = "lora"  # lora | full
    quantization: str = "none"  # none | nf4 (QLoRA): of the frozen base weights
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    use_dora: bool = False
    use_rslora: bool = False
    # () or "all-linear" = all linear layers except the head; names, ends of names, or "attention" and "mlp"
    target_modules: tuple[str, ...] = ()

    eval_steps: int = 0  # 0 = only before step 1 and at the end
    save_steps: int = 50
    save_seconds: float = 300.0
    record_pairs: bool = True  # write pairs/*.parquet

    watch_path: str = ""  # {"id": str, "prompt": [message…]} a line; "" = prompts of the validation pairs
    watch_prompts: int = 4  # how many of them are answered at each evaluation; 0 = none
    watch_max_new_tokens: int = 32
    watch_temperature: float = 1.0  # 0 = the likeliest token; kl_sampled needs 1

    load_best_model_at_end: bool = True  # keep the weights of the best evaluation, not the last
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool | None = None  # None = as is known of the metric
    early_stopping_patience: int = 0  # evaluations without improvement before the run ends; 0 = off
    early_stopping_threshold: float = 0.0  # an improvement must be larger
    kl_budget: float = 0.0  # nats per token: the run ends when eval_kl passes it; 0 = off
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # auto | float32 | bfloat16
    gradient_checkpointing: str = "auto"  # auto (where keeping activations would not fit) | on | off
    num_devices: int = 1  # the micro-batches of a step are shared out over so many; the batch stays as stated
    parallelism: str = "data"  # data: each device holds the model | fsdp: the frozen weights are divided too

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def side_length(self) -> int:
        """Most tokens of a prompt with one answer."""
        return self.max_length // 2 if self.max_length_per == "pair" else self.max_length

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> RunConfig:
        """Raises `ConfigError` for an unknown or missing key, so that a misspelt setting is never ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - names)
        if unknown:
            raise ConfigError(unknown_settings(unknown, names, CONFIG_FILE))
        values = dict(data)
        if "target_modules" in values:
            values["target_modules"] = tuple(values["target_modules"])
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{CONFIG_FILE} is not complete: {error}.") from None

    @classmethod
    def load(cls, run_dir: Path) -> RunConfig:
        try:
            data = json.loads((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{CONFIG_FILE} cannot be read: {error}.") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{CONFIG_FILE} must hold one JSON object.")
        return cls.from_mapping(data)


def write_atomically(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never a half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over every key of the manifest but `seal` itself: a flipped bit in it is found too."""
    body = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The sealed manifest of a checkpoint; its files are not looked at. `ValueError` says what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} has no readable {MANIFEST_FILE}: {error}.") from None
    if not isinstance(manifest, dict) or manifest.get("seal") != manifest_seal(manifest):
        raise ValueError(f"{MANIFEST_FILE} of {path.name} is damaged.")
    return manifest


def verify_checkpoint(path: Path) -> int:
    """The step of a checkpoint whose every byte is as it was written, or `ValueError` with what is wrong."""
    manifest = read_manifest(path)
    files = manifest["files"]
    missing = [name for name in CHECKPOINT_FILES if name not in files]
    if missing:
        raise ValueError(f"{path.name} was written without {', '.join(missing)}.")
    strange = {file.name for file in path.iterdir() if file.name[0] != "."} - {*files, MANIFEST_FILE}
    if strange:
        raise ValueError(
            f"{path.name} has files that were not written with it: {', '.join(sorted(strange))}."
        )
    for name, facts in files.items():
        file = path / name
        try:
            if file.stat().st_size != facts["size"]:
                raise ValueError(f"{name} of {path.name} has another size than when it was written.")
            if file_sha256(file) != facts["sha256"]:
                raise ValueError(f"{name} of {path.name} has other bytes than when it was written.")
        except OSError as error:
            raise ValueError(f"{name} of {path.name} cannot be read: {error.strerror}.") from None
    return int(manifest["step"])
