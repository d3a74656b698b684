"""The `evaluate` command: a run's model on held-out pairs, by the evaluator that training used."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TypedDict

from training.contract import DataCounts, RunConfig
from training.engine.adapters import POLICY
from training.engine.data import TokenizedPair, data_sha256
from training.engine.errors import RefusedError
from training.engine.evaluation import Evaluator
from training.engine.events import LoggedEvents, finite
from training.engine.finished import find_kept, load_config, load_kept
from training.engine.fused import fuse
from training.engine.objective import NO_REFERENCE, Objective
from training.engine.outputs import versions
from training.engine.pair_record import PairRecord
from training.engine.policy import Placement, Policy, load_tokenizer, use_fast_layout
from training.engine.preflight import check_config
from training.engine.reference import score_reference
from training.engine.routing import LoadBalance
from training.engine.training_run import make_quiet_and_deterministic, prepare_split


class EvaluationReport(TypedDict):
    """What `evaluate` prints and returns. `metrics` has the `eval_` keys of `training.contract.Metric`."""

    weights: str  # "adapter", or the checkpoint's name
    step: int | None
    metrics: dict[str, float | None]
    data_path: str
    data: DataCounts
    data_sha256: str  # of the tokenised pairs
    weights_sha256: str  # of base weights and the adapter started from
    reference: str
    device: str
    dtype: str
    seconds: float
    versions: dict[str, str]


def evaluate(run_dir: Path, *, checkpoint: str = "", data: str = "") -> EvaluationReport:
    """See `training.engine.evaluate`."""
    started = time.monotonic()
    config = load_config(run_dir)
    kept = find_kept(run_dir, checkpoint)
    path = data or RunConfig.load(run_dir).eval_path
    if not path:
        raise RefusedError("This run has no validation pairs.", "Name a file of pairs with --data.")
    config = dataclasses.replace(config, eval_path=str(Path(path).absolute()))
    check_config(config)
    make_quiet_and_deterministic()
    events, placement, objective = LoggedEvents(), Placement.choose(config), Objective(config)
    pairs, counts = prepare_split(
        config, load_tokenizer(config), events, Path(config.eval_path), "validation"
    )
    policy = load_kept(config, kept, placement, pairs[:1])
    events.log(use_fast_layout(policy, pairs))
    fuse(policy.model, POLICY)  # as in training: low weights round otherwise without it
    metrics = measure(policy, pairs, config, run_dir, step=kept.step or 0)
    return {
        "weights": kept.name,
        "step": kept.step,
        "metrics": {key: finite(value) for key, value in metrics.items()},
        "data_path": config.eval_path,
        "data": counts,
        "data_sha256": data_sha256(pairs),
        "weights_sha256": policy.weights_sha256,
        "reference": policy.reference_sentence if objective.needs_reference else NO_REFERENCE,
        "device": placement.device.type,
        "dtype": placement.dtype_name,
        "seconds": round(time.monotonic() - started, 3),
        "versions": versions(),
    }


def measure(
    policy: Policy, pairs: list[TokenizedPair], config: RunConfig, run_dir: Path, *, step: int
) -> dict[str, float | None]:
    """The evaluator's values, with the reference from the run's cache or computed now."""
    objective, reference = Objective(config), None
    if objective.needs_reference:
        folder = Path(config.reference_cache_dir) if config.reference_cache_dir else run_dir / "reference"
        reference = score_reference(policy, pairs, folder, progress=lambda done, total: None)
    nothing = PairRecord(run_dir, objective, wanted=False)
    balance = LoadBalance.of(policy.scorer, config.router_aux_loss_coef)
    evaluator = Evaluator(policy, pairs, reference, objective, balance)
    return evaluator.evaluate(lambda done: None, record=nothing, step=step)
