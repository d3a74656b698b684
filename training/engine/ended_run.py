"""A run directory whose run has ended well: starting it again does nothing, and never trains over its model.

Standard library only, asked before anything is written there. Knows result.json and config.json, no weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from training.contract import ADAPTER_DIR, CONFIG_FILE, MODEL_DIR, RESULT_FILE, ConfigError, RunConfig
from training.engine.errors import RefusedError
from training.engine.trajectory import NOT_IDENTITY

STEP_SETTINGS = ("per_device_train_batch_size", "gradient_accumulation_steps")  # only their product counts
SHOWN = 6  # changed settings that are named with their values
ELSEWHERE = (
    f"Make a new folder for another run: its {CONFIG_FILE} alone starts anew, and with {{model}} as {{setting}} it "
    f"goes on from this model. To train in this folder all the same, remove its {RESULT_FILE}."
)


def note_on_ended(run_dir: Path, config: RunConfig | None = None) -> str:
    """A sentence where the run is finished and nothing is to be done; "" where there is something to train.

    `config`: what it is to be run with now, instead of its config.json. A run that was stopped by a person goes on
    with the settings that its checkpoints go on with. Raises `RefusedError` where other settings would train over the
    model.
    """
    result = read_ended(run_dir)
    if result is None:
        return ""
    stopped = result.get("stopped_by") == "request"
    changed = _changed(result, run_dir, config, may_go_on=stopped)
    setting = "model_path" if _model_folder(result) == MODEL_DIR else "adapter_path"
    next_step = ELSEWHERE.format(model=run_dir / _model_folder(result), setting=setting)
    if changed:
        ended = f"was stopped at step {result.get('step')}" if stopped else "is finished"
        raise RefusedError(
            f"The run in {run_dir} {ended}, and its settings are others now: {changed}. Nothing was touched.",
            next_step,
        )
    if stopped:
        return ""
    return (
        f"The run in {run_dir} is finished: {result['status']} at step {result.get('step')} of "
        f"{result.get('total_steps')}. Nothing was done. {next_step}"
    )


def read_ended(run_dir: Path) -> dict[str, Any] | None:
    """result.json of a run that ended well and whose model is still there."""
    try:
        result = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    well = isinstance(result, dict) and result.get("status") in ("succeeded", "stopped")
    if not well or not isinstance(result.get("config"), dict):
        return None
    return result if (run_dir / _model_folder(result)).is_dir() else None


def _model_folder(result: dict[str, Any]) -> str:
    """Where the run wrote what it trained. A folder of the other name is somebody else's, such as a base model."""
    return MODEL_DIR if result["config"].get("finetuning_type") == "full" else ADAPTER_DIR


def _changed(result: dict[str, Any], run_dir: Path, config: RunConfig | None, *, may_go_on: bool) -> str:
    """The settings that differ, with then and now; "" when none does. A setting newer than the run had its default.

    `may_go_on`: only those that would begin another trajectory.
    """
    try:
        now = json.loads((config or RunConfig.load(run_dir)).to_json())
    except ConfigError as error:
        return str(error).rstrip(".")
    then = {field.name: field.default for field in dataclasses.fields(RunConfig)} | result["config"]
    then = json.loads(json.dumps({key: then[key] for key in now if then[key] is not dataclasses.MISSING}))
    keys = sorted(key for key in now if now[key] != then.get(key))
    if may_go_on:
        other_steps = _pairs_per_step(now) != _pairs_per_step(then)
        keys = [key for key in keys if key not in NOT_IDENTITY or (other_steps and key in STEP_SETTINGS)]
    named = [f"{key} ({then.get(key)!r}, now {now[key]!r})" for key in keys[:SHOWN]]
    return ", ".join(named + keys[SHOWN:])


def _pairs_per_step(settings: dict[str, Any]) -> int:
    return math.prod(int(settings[key]) for key in STEP_SETTINGS)
