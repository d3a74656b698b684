"""At the end of the steps: which weights are offered, and what is said about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from torch import nn

from training.contract import CHECKPOINTS_DIR, RunConfig, checkpoint_name, verify_checkpoint
from training.engine.checkpoints import adopt_checkpoint, restore_weights
from training.engine.events import EventLog
from training.engine.loop import RunState
from training.engine.stopping import Stopping, Values


class Kept(TypedDict):
    """The model that is offered: `metrics` are its own, not those of the last step."""

    step: int
    metrics: Values


def keep_best(
    state: RunState,
    config: RunConfig,
    run_dir: Path,
    trainable: Mapping[str, nn.Parameter],
    events: EventLog,
) -> Kept:
    """Put the weights of the best evaluation into the model; the last ones stay in the last checkpoint."""
    best = state.best
    last = Kept(step=state.step, metrics=state.last_training | state.last_evaluation)
    if not best.step:
        return last
    stopping = Stopping(config)
    value = stopping.value(best.evaluation)
    at = f"at step {best.step} ({stopping.metric} {'no number' if value is None else f'{value:.4g}'})"
    if not config.load_best_model_at_end:
        events.log(f"The best evaluation was {at}. The model of step {state.step} is kept, as asked.")
        return last
    if best.step != state.step:
        path = run_dir / CHECKPOINTS_DIR / checkpoint_name(best.step)
        try:
            verify_checkpoint(path)
            restore_weights(path, trainable)
        except (ValueError, OSError) as error:
            events.log(
                f"The best evaluation was {at}, but its checkpoint cannot be used, so the model of step "
                f"{state.step} is kept: {error}",
                "warning",
            )
            return last
    events.log(f"The best evaluation was {at}: that model is kept.")
    for sentence in _doubts(state, stopping):
        events.log(sentence, "warning")
    return Kept(step=best.step, metrics=best.training | best.evaluation)


def _doubts(state: RunState, stopping: Stopping) -> list[str]:
    doubts = []
    if not stopping.is_within_budget(state.best.evaluation):
        doubts.append("No evaluation was within kl_budget: raise it, or lower the learning_rate.")
    if stopping.is_worse_than_start(state.best, state.initial_metrics):
        doubts.append(
            f"No evaluation was better than before the first step by {stopping.metric}: lower the "
            "learning_rate, or look at the data."
        )
    return doubts


def adopt_best(state: RunState, run_dir: Path, source: Path, events: EventLog) -> None:
    """A run that goes on elsewhere takes the best checkpoint along: the earlier attempt may go."""
    if not state.best.step or source == run_dir:
        return
    path = adopt_checkpoint(run_dir, source, state.best.step)
    if path is not None:
        events.checkpoint(state.best.step, str(path.relative_to(run_dir)))
