"""Peak memory of two steps of four long pairs, one process each: `python -m bench.memory ours|trl MODEL`.

On a CPU the process is its own measure: what the import of libraries costs is part of it, on both sides. On a CUDA
device it is what its tensors took at most.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE, STEPS = 4, 2


def measure(who: str, model: Path, **settings: object) -> float:
    """Peak MB of a fresh process."""
    command = [sys.executable, "-m", "bench.memory", who, str(model), json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def run(who: str, model: Path, settings: dict[str, object]) -> None:
    from transformers import AutoTokenizer

    from bench.contenders import Ours, Trl, quiet, run_config, trl_trainer
    from bench.shapes import SHAPES, pairs_of

    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = pairs_of(SHAPES[0], 16 * BATCH_SIZE * STEPS, tokenizer, max_length=512, seed=2)
    longest = sorted(pairs, key=lambda pair: -len(str(pair)))[: BATCH_SIZE * STEPS]
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = Path(name)
        if who == "ours":
            config = run_config(model, **({"per_device_train_batch_size": BATCH_SIZE} | settings))
            ours = Ours(config, longest, folder, STEPS)
            for _ in range(STEPS):
                ours.step()
        else:
            trainer = trl_trainer(
                model, longest, folder, **({"per_device_train_batch_size": BATCH_SIZE} | settings)
            )
            trl = Trl(trainer)
            for step in range(STEPS):
                trl.step(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE))


def peak_mb() -> float:
    import torch

    from training.engine.outputs import resident_peak_bytes

    cuda = torch.cuda.is_available()
    return (torch.cuda.max_memory_allocated() if cuda else resident_peak_bytes()) / 2**20


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})
    print(round(peak_mb()))
