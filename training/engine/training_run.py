"""A training run, top to bottom: data, model, reference, steps, adapter. Returns what result.json says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from training.contract import DataCounts, Result, RunConfig, Split
from training.engine.activations import use_activations
from training.engine.adapters import POLICY
from training.engine.best_model import adopt_best, keep_best
from training.engine.checkpoints import (
    Identity,
    Loaded,
    clean_leftovers,
    find_checkpoint,
    restore,
    tensors_sha256,
)
from training.engine.cutting import STUMP_TOKENS, WHOLE_SHARE, CutRule, DataReport
from training.engine.data import TokenizedPair, data_sha256, noun_of, read_pairs, tokenize_pairs
from training.engine.distributed import World
from training.engine.errors import RefusedError
from training.engine.events import EventLog
from training.engine.fused import fuse
from training.engine.interrupts import Interrupts
from training.engine.loop import Loop, RunState
from training.engine.objective import NO_REFERENCE, Objective
from training.engine.order import Order
from training.engine.outputs import fingerprint, peak_memory_bytes, save_trained, versions, weight_facts
from training.engine.policy import Placement, Policy, load_policy, load_tokenizer, use_fast_layout
from training.engine.products import FLOAT32_BETWEEN
from training.engine.reference import ReferenceLogps, limit_cache, score_reference
from training.engine.step_files import continue_files
from training.engine.trajectory import trajectory_settings
from training.engine.watch import prepare_watch, read_watch_prompts

logger = logging.getLogger(__name__)

MOST_FOR_ALL_WEIGHTS = 1e-5


@dataclasses.dataclass(frozen=True)
class Data:
    train: list[TokenizedPair]
    evaluation: list[TokenizedPair]
    counts: dict[Split, DataCounts]  # of the splits that the run has

    @property
    def num_truncated(self) -> int:
        return sum(counts["truncated"] for counts in self.counts.values())

    @property
    def num_dropped(self) -> int:
        return sum(counts["dropped"] for counts in self.counts.values())


def train(config: RunConfig, run_dir: Path, *, events: EventLog, interrupts: Interrupts) -> Result:
    """Everything between a configuration and an adapter, of this rank."""
    make_quiet_and_deterministic()
    world = World.join(config)
    placement = Placement.choose(config, world)
    objective = Objective(config)

    events.phase("preparing_data")
    tokenizer = load_tokenizer(config)
    data = prepare_data(config, tokenizer, events)
    prompts = read_watch_prompts(config, tokenizer)
    order = Order.of(config, len(data.train))
    world.together(interrupts.check)
    say_idle_devices(config, world, events)
    say_high_rate(config, events)

    events.phase("loading_model")
    policy = load_policy(config, placement, data.train[:2])
    for note in policy.notes:
        events.log(note)
    events.log(use_fast_layout(policy, [*data.train, *data.evaluation]))
    fused = 0 if config.parallelism == "fsdp" else fuse(policy.model, POLICY)
    activations = use_activations(policy, config, data.train)
    events.log(activations.sentence)
    reference_sentence = policy.reference_sentence if objective.needs_reference else NO_REFERENCE
    events.plan(
        total_steps=order.total_steps,
        num_train_pairs=len(data.train),
        num_eval_pairs=len(data.evaluation),
        num_truncated=data.num_truncated,
        num_dropped=data.num_dropped,
        data=data.counts,
        device=placement.device.type,
        dtype=placement.dtype_name,
        num_devices=world.size,
        pairs_per_step=order.pairs_per_step,
        reference=reference_sentence,
        loss=objective.sentence,
    )

    reference = None
    if objective.needs_reference:
        reference = reference_of(policy, data, order, config, run_dir, events=events, interrupts=interrupts)

    watch = prepare_watch(
        prompts, config, run_dir, policy, tokenizer, events, with_reference=objective.needs_reference
    )
    loop = Loop(
        config=config,
        run_dir=run_dir,
        policy=policy,
        train=data.train,
        evaluation=data.evaluation,
        reference=reference,
        order=order,
        events=events,
        interrupts=interrupts,
        identity=identity_of(config, data.train, policy),
        fingerprint=fingerprint(placement, policy.layout_name, config)
        | {"gradient_checkpointing": str(activations.checkpointed), "fused": str(fused)}
        | ({} if placement.exact else {"rounding": FLOAT32_BETWEEN}),
        watch=watch,
    )
    resume(loop, config, run_dir, events)
    world.require_same("the model", f"{policy.layout_name} {tensors_sha256(policy.trainable)}")
    status = loop.run()

    events.phase("saving")
    kept = world.on_main(lambda: keep_best(loop.state, config, run_dir, policy.trainable, events))
    saved = world.on_main(lambda: save_trained(policy, tokenizer, config, run_dir))
    world.on_main(lambda: limit_cache(config, reference, events))
    peak = max(world.together(lambda: peak_memory_bytes(placement)))
    world.leave()  # after an error the others may not be there to take leave of
    state = loop.state
    result: Result = {
        "status": status,
        "step": state.step,
        "total_steps": order.total_steps,
        "seconds": events.seconds(),
        "phase_seconds": events.phase_seconds(),
        "num_tokens": state.num_tokens,
        "metrics": kept["metrics"],
        "last_metrics": state.last_training | state.last_evaluation,
        "model_step": kept["step"],
        "initial_metrics": state.initial_metrics,
        **saved,
        **weight_facts(policy, config),
        "versions": versions(),
        "config": dataclasses.asdict(config),
        "reference": reference_sentence,
        "loss": objective.sentence,
        "data": data.counts,
        "data_sha256": loop.identity.data_sha256,
        "weights_sha256": policy.weights_sha256,
        "reference_sha256": policy.reference_sha256 if objective.needs_reference else "",
        "device": placement.device.type,
        "dtype": placement.dtype_name,
        "num_devices": world.size,
        "gradient_checkpointing": activations.checkpointed,
        "activations": activations.sentence,
        "peak_memory_bytes": peak,
    }
    if state.best.step:
        result["best_step"] = state.best.step
        result["metric_for_best_model"] = config.metric_for_best_model
        result["best_metric"] = loop.stopping.value(state.best.evaluation)
    if loop.stopped_by:
        result["stopped_by"] = loop.stopped_by
    return result


def say_idle_devices(config: RunConfig, world: World, events: EventLog) -> None:
    """Micro-batches are not cut for the devices' sake: their dropout would change."""
    steps = config.gradient_accumulation_steps
    if steps < world.size:
        events.log(
            f"{world.size - steps} of the {world.size} devices will have nothing to do in a step: set "
            f"gradient_accumulation_steps to {world.size} or more (the effective batch is "
            "per_device_train_batch_size × gradient_accumulation_steps on any number of devices).",
            "warning",
        )


def say_high_rate(config: RunConfig, events: EventLog) -> None:
    """The default is for adapters, which want ten times and more of what all weights want."""
    if config.finetuning_type == "full" and config.learning_rate > MOST_FOR_ALL_WEIGHTS:
        events.log(
            f"A learning_rate of {config.learning_rate:g} is high where all weights are trained: the model may lose "
            "what it knew. 5e-7 to 5e-6 is usual.",
            "warning",
        )


def make_quiet_and_deterministic() -> None:
    """The same bits on the same machine; library progress bars belong to no log."""
    import transformers

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()


def reference_of(
    policy: Policy,
    data: Data,
    order: Order,
    config: RunConfig,
    run_dir: Path,
    *,
    events: EventLog,
    interrupts: Interrupts,
) -> ReferenceLogps:
    """Of every pair that the run meets, from the cache or computed now."""
    scored = [*(data.train[index] for index in order.pairs_met()), *data.evaluation]
    events.phase("reference", total=len(scored), unit="pairs")
    records = score_reference(
        policy,
        scored,
        Path(config.reference_cache_dir) if config.reference_cache_dir else run_dir / "reference",
        progress=lambda done, total: events.phase("reference", done=done, total=total, unit="pairs"),
        check=interrupts.check,
    )
    policy.rest_reference()
    return records


def prepare_data(config: RunConfig, tokenizer: Any, events: EventLog) -> Data:
    """Both files as token ids. Says what was cut and dropped; refuses when nothing is left."""
    tokenized: dict[Split, list[TokenizedPair]] = {"train": [], "eval": []}
    counts: dict[Split, DataCounts] = {}
    files: dict[Split, tuple[str, str]] = {
        "train": ("training", config.train_path),
        "eval": ("validation", config.eval_path),
    }
    for split, (words, path) in files.items():
        if path:
            tokenized[split], counts[split] = prepare_split(config, tokenizer, events, Path(path), words)
    if len(tokenized["train"]) == 1:
        noun = noun_of(Objective(config).sides)
        raise RefusedError(
            f"Only one training {noun} is left of {counts['train']['read']}: nothing general can be learnt from it.",
            "Add more to the dataset; some hundreds are a start.",
        )
    return Data(tokenized["train"], tokenized["eval"], counts)


def prepare_split(
    config: RunConfig, tokenizer: Any, events: EventLog, path: Path, words: str
) -> tuple[list[TokenizedPair], DataCounts]:
    """One file as token ids, and what happened to its pairs. `words`: the split in a sentence."""
    sides = Objective(config).sides
    noun = noun_of(sides)

    def progress(done: int, total: int) -> None:
        events.phase("preparing_data", done=done, total=total, unit=f"{noun}s")

    pairs = read_pairs(path, sides=sides)
    if not pairs:
        raise RefusedError(
            f"There are no {words} {noun}s in {path}.", f"Prepare the dataset again, or add {noun}s to it."
        )
    tokenized, report = tokenize_pairs(
        pairs,
        tokenizer,
        max_length=config.side_length,
        rule=CutRule.of(config),
        sides=sides,
        progress=progress,
    )
    sentences = list(report.sentences(words, config.side_length))
    for sentence in sentences:
        events.log(sentence, "warning")
    if not tokenized:
        raise RefusedError(
            f"No {words} {noun} is left of {report.read}. {sentences[-1]}",
            f"Correct the dataset{_where_much_is_cut(config, report)}",
        )
    say_short_length(config, report, events, words, trains=path == Path(config.train_path))
    return tokenized, report.counts()


def _where_much_is_cut(config: RunConfig, report: DataReport) -> str:
    """How a next step goes on when no pair is left."""
    if enough := longer_length(config, report):
        return f"; where pairs were cut, raise max_length (max_context_length): {enough}"
    if config.max_prompt_length or config.max_completion_length:
        return ", or raise max_prompt_length or max_completion_length where they cut too much."
    return "."


def say_short_length(
    config: RunConfig, report: DataReport, events: EventLog, words: str, *, trains: bool
) -> None:
    """A warning where much was cut; a refusal where most of what would be learnt was. An evaluation only warns."""
    enough = longer_length(config, report)
    if not enough or not report.is_notably_cut(config.side_length):
        return
    if trains and report.is_mostly_stumps:
        raise RefusedError(
            f"max_length {config.max_length} is too short for these {report.noun}s: {report.stumps} of the "
            f"{report.left} that it leaves keep fewer than {STUMP_TOKENS} tokens of the prompt or of an answer"
            + (", or the same answers." if report.noun == "pair" else "."),
            f"Raise max_length (max_context_length): {enough}",
        )
    events.log(
        f"{report.too_long(config.side_length)} of {report.read} {words} {report.noun}s do not fit max_length "
        f"{config.max_length}: {enough}",
        "warning",
    )


def longer_length(config: RunConfig, report: DataReport) -> str:
    """A sentence with the length that cuts few pairs; "" where it is not max_length that cuts."""
    enough = report.enough_tokens() if report.lengths else 0
    if enough <= config.side_length:
        return ""
    enough *= 2 if config.max_length_per == "pair" else 1
    return f"{enough} would keep {100 * WHOLE_SHARE:.0f} % of them whole."


def identity_of(config: RunConfig, pairs: list[TokenizedPair], policy: Policy) -> Identity:
    text = json.dumps(trajectory_settings(config), sort_keys=True)
    return Identity(hashlib.sha256(text.encode()).hexdigest(), data_sha256(pairs), policy.trajectory_sha256)


def resume(loop: Loop, config: RunConfig, run_dir: Path, events: EventLog) -> None:
    """Go on from the newest verified checkpoint of the same trajectory, if there is one."""

    def find() -> dict[str, Any] | None:
        clean_leftovers(run_dir)
        loaded = find_checkpoint(
            run_dir, config.resume_from, loop.identity, say=lambda text: events.log(text, "warning")
        )
        if loaded is None:
            continue_files(run_dir, run_dir, step=-1)
            return None
        source = loaded.path.parent.parent
        continue_files(run_dir, source, step=loaded.step)
        adopt_best(RunState.from_json(loaded.state), run_dir, source, events)
        return dataclasses.asdict(loaded) | {"path": str(loaded.path)}

    found = loop.world.on_main(find)
    if found is None:
        if config.resume_from:
            events.log("No earlier checkpoint can be used: training starts from the beginning.", "warning")
        return
    loaded = Loaded(**(found | {"path": Path(found["path"])}))
    restore(loaded, loop.policy.trainable, loop.optimizer)
    loop.state = RunState.from_json(loaded.state)
    events.add_earlier(loop.state.seconds, loop.state.phase_seconds)
    events.log(f"Continued from the checkpoint of step {loaded.step}.")
    changed = sorted(key for key, value in loop.fingerprint.items() if loaded.fingerprint.get(key) != value)
    if changed:
        events.log(
            f"Continued under another {', '.join(changed)}: from step {loaded.step} on, the last digits of "
            "the numbers may differ from an undisturbed run.",
            "warning",
        )
