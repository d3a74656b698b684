"""The benchmark against TRL: `make bench`, or `python -m bench --model FOLDER [--rounds 5] [--only steps …]`.

Prints and writes a Markdown table. Ratios come from rounds in which both took turns in one process; the memory
is that of a process each. Run it on a quiet machine: neighbours that come and go are in the spread. On a CUDA device
both sides compute in bfloat16; there `--random 1b --tokens 8192` and the like fill it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the engine's own process has it, for both sides

import torch

from bench.random_models import RANDOM_SHAPES, random_model

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("steps", "epochs", "memory", "exactness", "startup")
STARTER = "SmolLM2-135M-Instruct"
EPOCH_PAIRS = 12
Row = tuple[str, str, str, str]  # what, measured, at least, aim
GOALS = {"long answers": ("2.3 ×", "3.3 ×"), "short answers": ("2.5 ×", "4.5 ×")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--model", type=Path, help=f"a model folder; by default {STARTER}, converted if needed"
    )
    parser.add_argument("--random", choices=RANDOM_SHAPES, help="instead: random weights in this shape")
    parser.add_argument(
        "--tokens", type=int, default=0, help="of a step, in the part steps: as many pairs as that takes"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "RESULTS.md")
    arguments = parser.parse_args()
    model = (arguments.model or starter_model()).resolve()
    if arguments.random:
        model = random_model(arguments.random, model)
    measures = MEASURES | {"steps": functools.partial(steps, tokens=arguments.tokens)}
    rows: list[Row] = []
    for part in arguments.only:
        began = time.monotonic()
        found = measures[part](model, arguments.rounds)
        print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
        for row in found:
            print("  " + " | ".join(row), flush=True)
        rows += found
        gc.collect()
    text = table(rows, arguments.rounds)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


def steps(model: Path, rounds: int, tokens: int = 0) -> list[Row]:
    """One optimizer step each on the same pairs; TRL with its reference computed beforehand, one precision."""
    from bench.contenders import PRECISION, Ours, Trl, quiet, run_config, trl_trainer
    from bench.shapes import SHAPES, pairs_of

    result: list[Row] = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            batch_size = tokens // (shape.prompt + shape.chosen + shape.rejected) or shape.batch_size
            count = batch_size * (rounds + 1)
            pairs = pairs_of(shape, count, tokenizer_of(model), max_length=512, seed=1)
            config = run_config(model, per_device_train_batch_size=batch_size)
            with quiet():
                ours = Ours(config, pairs, Path(name) / "ours", rounds + 1)
                trainer = trl_trainer(
                    model, pairs, Path(name) / "trl",
                    per_device_train_batch_size=batch_size, precompute_ref_log_probs=True,
                )  # fmt: skip
                trainer.get_train_dataloader()  # computes the reference
                trl = Trl(trainer)
            trl.copy_adapter(ours)
            ratios, seconds, apart = [], [], 0.0
            for number in range(rounds + 1):
                indices = ours.next_indices()
                mine, our_loss = timed(ours.step)
                theirs, trl_loss = timed(functools.partial(trl.step, indices))
                apart = max(apart, abs(our_loss - trl_loss))
                if number:  # the first warms both up
                    ratios.append(theirs / mine)
                    seconds.append(mine)
            least, aim = GOALS[shape.name]
            what = (
                f"step, {shape.name} (batch {batch_size}), vs TRL in {PRECISION} with precomputed reference"
            )
            measured = f"{spread(ratios)}; ours {spread(seconds, ' s')}; losses apart by {apart:.0e} at most"
            result.append((what, measured, least, aim))
            gc.collect()
    return result


def epochs(model: Path, rounds: int) -> list[Row]:
    from bench.epochs import one_round
    from bench.shapes import SHAPES, pairs_of

    shape = SHAPES[0]
    with tempfile.TemporaryDirectory() as name:
        found = []
        for number in range(rounds):
            pairs = pairs_of(shape, EPOCH_PAIRS, tokenizer_of(model), max_length=512, seed=100 + number)
            found.append(one_round(model, pairs, shape.batch_size, Path(name) / str(number)))
            gc.collect()
    what = (
        f"whole run of {EPOCH_PAIRS} pairs from folder to adapter, {shape.name}, vs TRL's default reference"
    )
    return [
        (f"{what}", spread([each.trl / each.cold for each in found]), "2.4 ×", "3.5 ×"),
        (
            "the same again with another beta, cache warm",
            spread([each.trl / each.warm for each in found]),
            "3 ×",
            "5 ×",
        ),
    ]


def memory(model: Path, rounds: int) -> list[Row]:
    from bench.contenders import PRECISION
    from bench.memory import BATCH_SIZE, measure

    trl = measure("trl", model, bf16=True, gradient_checkpointing=True)
    ours, checkpointed = measure("ours", model), measure("ours", model, gradient_checkpointing="on")
    return [
        (
            f"peak memory, batch {BATCH_SIZE} of long pairs, vs TRL's defaults (bf16, checkpointing)",
            f"{trl / ours:.1f} × less ({trl:.0f} → {ours:.0f} MB in {PRECISION}); "
            f"with gradient_checkpointing {trl / checkpointed:.1f} × ({checkpointed:.0f} MB)",
            "2.2 ×", "3.5 ×",
        )
    ]  # fmt: skip


def exactness(model: Path, rounds: int) -> list[Row]:
    from bench.exactness import measure
    from bench.shapes import SHAPES, pairs_of

    errors = measure(model, pairs_of(SHAPES[0], 2, tokenizer_of(model), max_length=512, seed=5))

    def both(kind: str) -> str:
        texts = [f"{who} loss {e.loss:.1e}, gradient {e.gradient:.1e}" for who in ("ours", "TRL")
                 for e in [errors[f"{who} {kind}"]]]  # fmt: skip
        return "; ".join(texts)

    return [
        ("error against float64, fp32, relative", both("fp32"), "1e-4", "2e-5"),
        ("error against float64, bf16, relative", both("bf16"), "TRL's", "half of TRL's"),
    ]


def startup(model: Path, rounds: int) -> list[Row]:
    from bench.epochs import startup_seconds
    from bench.shapes import SHAPES, pairs_of

    pairs = pairs_of(SHAPES[1], 4, tokenizer_of(model), max_length=512, seed=9)
    begins, done = [], []
    with tempfile.TemporaryDirectory() as name:
        for number in range(max(1, rounds // 2)):
            first, second = startup_seconds(model, pairs, Path(name) / str(number))
            begins.append(first)
            done.append(second)
    text = f"{spread(begins, ' s')} to its begin, {spread(done, ' s')} with the step"
    return [("from `train` to the first optimizer step, warm disk and cache", text, "8 s", "4 s")]


MEASURES: dict[str, Callable[[Path, int], list[Row]]] = {
    "steps": steps, "epochs": epochs, "memory": memory, "exactness": exactness, "startup": startup,
}  # fmt: skip


def timed(call: Callable[[], float]) -> tuple[float, float]:
    """A step ends with its loss as a number, which a GPU gives when all before it is done; then what follows it."""
    began = time.perf_counter()
    value = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, value


def spread(values: Sequence[float], unit: str = " ×") -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def tokenizer_of(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def starter_model() -> Path:
    """The studio's own copy, or one converted for this from the installed package."""
    from studio.launch.starter import find_gguf

    own = ROOT / "data" / "base_models" / STARTER
    if own.is_dir():
        return own
    gguf = find_gguf()
    if gguf is None:
        sys.exit("No starter model: run `make install`, or give a model folder with --model.")
    folder = Path(tempfile.gettempdir()) / f"bench-{STARTER}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "training.engine", "convert-gguf", str(gguf), str(folder)]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def table(rows: Sequence[Row], rounds: int) -> str:
    lines = [
        "# Against TRL",
        "",
        f"Written by `make bench`: {rounds} interleaved rounds; median (lowest to highest). "
        "LoRA r = 16 on all linear layers, max_length 512, no dropout.",
        "",
        f"{cpu_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        + ", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl", "accelerate")
        )
        + ".",
        "",
        "| | measured | at least | aim |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
