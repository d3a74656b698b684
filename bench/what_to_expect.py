"""What DPO on the example data does to the starter model: the table in the README.

    python bench/what_to_expect.py MODEL_FOLDER [learning_rate ...]

MODEL_FOLDER is the starter model as the studio prepared it (`data/base_models/SmolLM2-135M-Instruct`). Every
run has the studio's default settings but for the learning rate, the studio's own split (10 % by prompt, seed
42), and one shared cache of reference log-probabilities. Prints a Markdown table; run it on a quiet machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets_app.splitting import split_by_prompt  # noqa: E402
from training.contract import RESULT_FILE, RunConfig  # noqa: E402

EXAMPLE = ROOT / "datasets_app" / "example" / "short_and_direct.jsonl"
COLUMNS = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_kl")


def canonical_pairs(folder: Path) -> Path:
    """The example file is canonical but for the ids that validation gives each line."""
    path = folder / "pairs.jsonl"
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    rows = [{"id": str(number), **json.loads(line)} for number, line in enumerate(lines, start=1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_once(folder: Path, model: Path, learning_rate: float) -> dict[str, object]:
    run_dir = folder / f"lr-{learning_rate:g}"
    run_dir.mkdir()
    config = RunConfig(
        run_id=run_dir.name,
        model_path=str(model.resolve()),
        train_path=str(folder / "train.jsonl"),
        eval_path=str(folder / "eval.jsonl"),
        reference_cache_dir=str(folder / "reference"),
        learning_rate=learning_rate,
    )
    (run_dir / "config.json").write_text(config.to_json(), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "training.engine", "train", str(run_dir)], cwd=ROOT, check=True)
    result: dict[str, object] = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
    return result


def cell(key: str, before: float, after: float) -> str:
    """Before the first step policy and reference are one, so an accuracy before it says nothing."""
    if key == "eval_rewards/accuracies":
        return f"{after:.1%}"
    return f"{before:.3g} → {after:.3g}"


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    rates = [float(text) for text in sys.argv[2:]] or [5e-6, 5e-5]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split = split_by_prompt(
            canonical_pairs(folder),
            share=0.1,
            seed=42,
            train_path=folder / "train.jsonl",
            eval_path=folder / "eval.jsonl",
        )
        print(f"{split.num_train} pairs to train, {split.num_eval} held out\n")
        print("| learning_rate | " + " | ".join(COLUMNS) + " | steps | seconds | peak memory |")
        print("| --- " * (len(COLUMNS) + 4) + "|")
        for rate in rates:
            result = run_once(folder, Path(sys.argv[1]), rate)
            before, after = result["initial_metrics"], result["metrics"]
            cells = [cell(key, before[key], after[key]) for key in COLUMNS]
            memory = f"{result['peak_memory_bytes'] / 2**30:.1f} GiB"
            print(
                f"| {rate:g} | {' | '.join(cells)} | {result['step']} | {result['seconds']:.0f} | {memory} |"
            )


if __name__ == "__main__":
    main()
