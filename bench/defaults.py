"""Which learning rate and beta move a model without harm: the measurement behind the defaults of `recipes.py`.

    python -m bench.defaults MODEL_FOLDER [FILE ...] [--rates …] [--betas …] [--limit PAIRS] [--max-length TOKENS]

FILE is any file of pairs that the studio reads; without one, the example data. A share of the prompts is held out
and measured before the first step and after the last. Every run has the studio's default settings but for what is
varied, and one file's runs share a cache of reference log-probabilities. Prints a Markdown table, row by row.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets_app.splitting import split_by_prompt
from datasets_app.validation import Validation
from training.contract import CONFIG_FILE, RESULT_FILE, RunConfig

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "datasets_app" / "example" / "short_and_direct.jsonl"
COLUMNS = {
    "eval_loss": "validation loss",
    "eval_rewards/accuracies": "DPO accuracy",
    "eval_rewards/margins": "reward margin",
    "eval_kl": "KL, nats per token",
    "eval_logps/chosen": "log p of the chosen",
}


@dataclasses.dataclass(frozen=True)
class Held:
    """A file's pairs, split, in a folder of their own."""

    name: str
    folder: Path
    num_train: int
    num_eval: int


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.defaults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("files", type=Path, nargs="*", default=[EXAMPLE])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-6, 5e-5])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.1])
    parser.add_argument("--limit", type=int, default=0, help="pairs of each file; 0 = all")
    parser.add_argument("--holdout", type=float, default=0.1, help="share of the prompts")
    parser.add_argument("--max-length", type=int, default=1024)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(
            "| data | beta | learning_rate | "
            + " | ".join(COLUMNS.values())
            + " | steps | seconds | memory |"
        )
        print("| --- " * (len(COLUMNS) + 6) + "|")
        for file in arguments.files:
            held = hold_out(file, Path(name) / file.stem, arguments.limit, arguments.holdout)
            for beta, rate in itertools.product(arguments.betas, arguments.rates):
                settings = {"beta": beta, "learning_rate": rate, "max_length": arguments.max_length}
                result = run_once(held, arguments.model, settings)
                cells = [f"{held.name}, {held.num_train} + {held.num_eval}", f"{beta:g}", f"{rate:g}"]
                print("| " + " | ".join([*cells, *found(result)]) + " |", flush=True)


def hold_out(file: Path, folder: Path, limit: int, share: float) -> Held:
    """Read as the studio reads an upload, and split as it splits: by prompt, seed 42."""
    folder.mkdir()
    pairs = folder / "pairs.jsonl"
    with file.open("rb") as source, pairs.open("w+b") as target:
        report = Validation(source, pairs=target, issues=io.BytesIO(), progress=lambda *_: None).run()
    if not report.num_pairs:
        sys.exit(f"{file}: {report.problem}")
    lines = pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    pairs.write_text("".join(lines[: limit or None]), encoding="utf-8")
    split = split_by_prompt(
        pairs, share=share, seed=42, train_path=folder / "train.jsonl", eval_path=folder / "eval.jsonl"
    )
    return Held(file.stem, folder, split.num_train, split.num_eval)


def run_once(held: Held, model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    run_dir = Path(tempfile.mkdtemp(dir=held.folder))
    config = RunConfig(
        run_id=run_dir.name,
        model_path=str(model.resolve()),
        train_path=str(held.folder / "train.jsonl"),
        eval_path=str(held.folder / "eval.jsonl"),
        reference_cache_dir=str(held.folder / "reference"),
        load_best_model_at_end=False,  # what the last step did, for better or worse
        watch_prompts=0,
        **settings,
    )
    (run_dir / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "training.engine", "train", str(run_dir)], cwd=ROOT, check=True)
    result: dict[str, Any] = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
    return result


def found(result: dict[str, Any]) -> Iterator[str]:
    before, after = result["initial_metrics"], result["metrics"]
    for key in COLUMNS:
        # Before the first step policy and reference are one, so an accuracy before it says nothing.
        alone = key == "eval_rewards/accuracies"
        yield f"{after[key]:.1%}" if alone else f"{before[key]:.3g} → {after[key]:.3g}"
    yield str(result["step"])
    yield f"{result['seconds']:.0f}"
    yield f"{result['peak_memory_bytes'] / 2**30:.1f} GiB"


if __name__ == "__main__":
    main()
