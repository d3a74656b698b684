"""A run directory whose run has ended well: starting it again does nothing, and never trains over its model.

Standard library only, asked before anything is written there. Knows result.json and config.json, no weights.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from training.contract import ADAPTER_DIR, CONFIG_FILE, MODEL_DIR, RESULT_FILE, ConfigError, RunConfig
from training.engine.errors import RefusedError

SHOWN = 6  # changed settings that are named with their values
ELSEWHERE = (
    f"Make a new folder for another run: its {CONFIG_FILE} alone starts anew, and with {{model}} as {{setting}} it "
    f"goes on from this model. To train in this folder all the same, remove its {RESULT_FILE}."
)


def note_on_ended(run_dir: Path, config: RunConfig | None = None) -> str:
    """A sentence where the run is finished and nothing is to be done; "" where there is something to train.

    `config`: what it is to be run with now, instead of its config.json. A run that was stopped by a person goes on
    with the same settings. Raises `RefusedError` where other settings would train over a finished run's model.
    """
    result = read_ended(run_dir)
    if result is None:
        return ""
    changed = _changed(result, run_dir, config)
    full = result["config"].get("finetuning_type") == "full"
    folder, setting = (MODEL_DIR, "model_path") if full else (ADAPTER_DIR, "adapter_path")
    next_step = ELSEWHERE.format(model=run_dir / folder, setting=setting)
    if changed:
        raise RefusedError(
            f"The run in {run_dir} is finished, and its settings are others now: {changed}. Nothing was touched.",
            next_step,
        )
    if result.get("stopped_by") == "request":
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
    return result if any((run_dir / name).is_dir() for name in (ADAPTER_DIR, MODEL_DIR)) else None


def _changed(result: dict[str, Any], run_dir: Path, config: RunConfig | None) -> str:
    """The settings that differ, with then and now; "" when none does. A setting newer than the run had its default."""
    try:
        now = json.loads((config or RunConfig.load(run_dir)).to_json())
    except ConfigError as error:
        return str(error).rstrip(".")
    then = {field.name: field.default for field in dataclasses.fields(RunConfig)} | result["config"]
    then = json.loads(json.dumps({key: then[key] for key in now if then[key] is not dataclasses.MISSING}))
    keys = sorted(key for key in now if now[key] != then.get(key))
    named = [f"{key} ({then.get(key)!r}, now {now[key]!r})" for key in keys[:SHOWN]]
    return ", ".join(named + keys[SHOWN:])
