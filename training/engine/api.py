"""The engine as Python functions: what the commands do, callable from a script or a notebook. No torch at import.

Every function takes a run directory (`training.contract` names its files). What cannot work raises `EngineError`
or one of its kinds, with `sentence` and `next_step`; a setting that cannot be run is a `ConfigError` already when
`RunConfig` is made. Anything else that is raised is a defect.

What they change in the process while they work is put back at the end: PyTorch's random state and deterministic
flags, log handlers and levels, transformers' progress bars, accelerate's state, signal handlers (set in the main
thread only). Not put back: the environment variable CUBLAS_WORKSPACE_CONFIG, which PyTorch reads once, when it is
not set. One call at a time: these are states of the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from training.contract import CONFIG_FILE, RESULT_FILE, Result, RunConfig, write_atomically

if TYPE_CHECKING:
    from training.engine.answering import GeneratedAnswer, Prompt
    from training.engine.estimating import RunEstimate
    from training.engine.evaluating import EvaluationReport
    from training.engine.merging import MergeReport

AnyPath = str | os.PathLike[str]


def train(config: RunConfig, run_dir: AnyPath) -> Result:
    """Run, or continue, the training that `config` describes.

    `run_dir` is made if it is not there; `config.json` in it is written anew. A verified checkpoint of the same
    settings, data and weights in it is gone on from, bit for bit on the same machine. Of a finished run (result.json
    and model are there) the result is returned and nothing is done; with other settings it is refused and untouched.

    While it works, `events.jsonl` (progress, metrics by step) and `engine.log` grow in `run_dir`. Ctrl-C or
    SIGTERM (in the main thread) finish the step and write a checkpoint; a file `stop` in `run_dir` ends the run
    after its step, evaluates and keeps the model.

    Returns what `result.json` holds (`training.contract.Result`): `status` succeeded or stopped; `metrics` under
    the keys of `training.contract.Metric` (losses and log-probabilities in nats, evaluation with the prefix
    `eval_`); times in seconds, memory in bytes.

    Raises `RefusedError` (the input cannot work), `DivergedError` (loss or gradient), `InterruptedRunError` (call
    again to continue), or `EngineError` with the exit code 42 (out of memory) or 44 (disk full). `result.json`
    tells the same.
    """
    from training.engine import session
    from training.engine.ended_run import note_on_ended
    from training.engine.events import EventLog
    from training.engine.interrupts import Interrupts
    from training.engine.surroundings import borrowed_process, signals_to

    folder = Path(run_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not note_on_ended(folder, config):
        write_atomically(folder / CONFIG_FILE, config.to_json())
        interrupts = Interrupts(folder)
        with borrowed_process(folder), signals_to(interrupts), EventLog(folder) as events:
            session.run_or_raise(folder, events=events, interrupts=interrupts)
    return cast(Result, json.loads((folder / RESULT_FILE).read_text(encoding="utf-8")))


def evaluate(run_dir: AnyPath, *, checkpoint: str = "", data: AnyPath = "") -> EvaluationReport:
    """Metrics of a run's model on held-out pairs, computed as in training.

    `checkpoint`: "" for the finished adapter, or the name of a checkpoint (`step-000200`). `data`: canonical pairs,
    one JSON object a line (`training.contract.RunConfig`); "" for the run's validation pairs. The reference is the
    run's own, from its cache where that still has the pairs.

    On the device and with the number of threads of the training, and with the cached reference, the values equal
    what training said of the same weights exactly; else within rounding. Log-probabilities in nats, `eval_kl` in
    nats per completion token: exact over the vocabulary, Kullback-Leibler divergence from policy to reference.

    The watch prompts are not asked again: `generate` answers any prompt.

    Raises `RefusedError`: no such adapter or checkpoint, a damaged one, no pairs.
    """
    from training.engine import evaluating
    from training.engine.surroundings import borrowed_process

    with borrowed_process():
        return evaluating.evaluate(Path(run_dir).absolute(), checkpoint=checkpoint, data=str(data))


def merge(
    run_dir: AnyPath, *, checkpoint: str = "", dtype: str = "auto", out_dir: AnyPath = ""
) -> MergeReport:
    """The base model with the run's adapter in its weights: a whole model folder that needs no peft.

    W + scale * B A (Hu et al. 2021, arXiv 2106.09685, section 4; DoRA and rsLoRA by their own rules, as in peft),
    computed in float32 on the CPU, then rounded to `dtype`: auto (that of the base model's files), float32, bfloat16
    or float16. Needs the memory of the base model in float32 (4 bytes a parameter). `out_dir`: "" for `merged/` in
    the run directory; an earlier one is replaced when the new one is complete.

    In float32 the logits equal those of base + adapter within rounding. Raises `RefusedError` for what cannot be
    merged: a quantised base, a finished whole model (it is a folder already), weights that are not finite. A
    checkpoint of full fine-tuning is written as the folder that it is not yet.
    """
    from training.engine import merging
    from training.engine.surroundings import borrowed_process

    with borrowed_process():
        return merging.merge(
            Path(run_dir).absolute(),
            checkpoint=checkpoint,
            dtype=dtype,
            out_dir=Path(out_dir).absolute() if out_dir else None,
        )


def generate(
    run_dir: AnyPath,
    prompts: Sequence[Prompt],
    *,
    sides: Sequence[str] = ("tuned",),
    checkpoint: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[GeneratedAnswer]:
    """Answers to prompts, one after the other: of the run's model (`tuned`), of the bare base model (`base`).

    A prompt is a text (one user message) or a list of messages `{"role", "content"}`. `temperature` 0 takes the
    likeliest token; above, tokens are drawn from softmax(logits / temperature), cut to the smallest set whose
    probability reaches `top_p`. Draws are a function of (seed, the prompt's place): both sides get the same ones.

    Returns one answer per prompt and side, in this order: `text`, `finish_reason` (stop, length), `num_tokens`,
    `seconds`. Raises `RefusedError`: a prompt that the template refuses or the model cannot hold.
    """
    from training.engine import answering
    from training.engine.surroundings import borrowed_process

    settings = answering.Settings(
        sides=tuple(sides), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    with borrowed_process():
        return answering.answer(Path(run_dir).absolute(), prompts, settings, checkpoint=checkpoint)


def estimate(config: RunConfig | AnyPath) -> RunEstimate:
    """Steps, tokens, memory and time of a run, from its configuration or its directory. Loads no weights.

    Reads the model's config.json and the headers of its files, and tokenises the pairs: numbers of pairs and tokens
    are exact; `memory_bytes` is arithmetic (the parts are explained at `training.estimates.memory`, measured to
    within 10 %), `seconds` is rough. Raises `RefusedError` and `ConfigError` for what training would refuse, too,
    as far as it can be seen without the weights.
    """
    from training.engine import estimating
    from training.engine.surroundings import borrowed_process

    with borrowed_process():
        known = config if isinstance(config, RunConfig) else RunConfig.load(Path(config).absolute())
        return estimating.estimate(known)
