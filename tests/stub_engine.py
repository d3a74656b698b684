"""An engine without torch: keeps the contract of the run directory, with steps of 20 ms. For tests of the
worker.

`python tests/stub_engine.py RUN_DIR`. The "model" is a list of numbers that each step changes in a way that
depends on all steps before, so that a run that was resumed wrongly ends with other bytes. The environment
says what goes wrong (see `Faults`).
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.contract import (
    ADAPTER_DIR,
    CHECKPOINTS_DIR,
    EVENTS_FILE,
    MANIFEST_FILE,
    RESULT_FILE,
    STOP_FILE,
    ExitCode,
    RunConfig,
    checkpoint_name,
    file_sha256,
    manifest_seal,
    verify_checkpoint,
    write_atomically,
)

WIDTH = 8


class Faults:
    """`STUB_FAULT=crash@7` (crash, segfault, hang, nan, oom, disk, refuse, silent, torn), at step 7.

    `crash@7:2` only in the first two attempts. `STUB_DEAF=1` ignores SIGTERM. `STUB_TRAIL` is a file that
    gets a line per step: who stepped, and when by the machine's monotonic clock.
    """

    def __init__(self, attempt: int) -> None:
        name, _, rest = os.environ.get("STUB_FAULT", "").partition("@")
        at, _, attempts = rest.partition(":")
        self.name = name if not attempts or attempt <= int(attempts) else ""
        self.at = int(at or 0)

    def happen(self, step: int, run_dir: Path) -> None:
        if not self.name or step != self.at:
            return
        print(f"about to {self.name} at step {step}", file=sys.stderr, flush=True)
        if self.name == "crash":
            raise RuntimeError("the stub was told to crash")
        if self.name == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif self.name == "hang":
            time.sleep(3600)
        elif self.name == "silent":
            os._exit(0)
        elif self.name == "torn":
            with (run_dir / EVENTS_FILE).open("ab") as file:
                file.write(b'not json\n{"type": "metrics", "step": 99')
            os._exit(1)
        else:
            self._named_end(run_dir)

    def _named_end(self, run_dir: Path) -> None:
        code, error = {
            "nan": (ExitCode.DIVERGED, "The loss became NaN."),
            "oom": (ExitCode.OUT_OF_MEMORY, "The GPU ran out of memory."),
            "disk": (ExitCode.DISK_FULL, "The disk is full."),
            "refuse": (ExitCode.REFUSED, f"The model of {run_dir.parent} cannot be read."),
        }[self.name]
        result = {"status": "failed", "error": error, "next_step": "Do something about it."}
        write_atomically(run_dir / RESULT_FILE, json.dumps(result))
        sys.exit(code)


class StubEngine:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.config = RunConfig.load(run_dir)
        self.attempt = int(self.config.run_id.rpartition("/e")[2] or 1)
        self.faults = Faults(self.attempt)
        self.total = int(os.environ.get("STUB_STEPS", "40"))
        self.save_steps = int(os.environ.get("STUB_SAVE_STEPS", "5"))
        self.step_seconds = float(os.environ.get("STUB_STEP_SECONDS", "0.02"))
        self.step = 0
        self.weights = [float(self.config.seed + index) for index in range(WIDTH)]
        self.interrupted = False

    # --- what it says ---------------------------------------------------------------------------------
    def say(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"type": kind, "time": time.time(), **fields}) + "\n"
        with (self.run_dir / EVENTS_FILE).open("ab") as file:
            file.write(line.encode())

    def phase(self, name: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        self.say("phase", phase=name, done=done, total=total, unit=unit)

    def measure(self, split: str) -> None:
        prefix = "eval_" if split == "eval" else ""
        loss = math.log(2) / (1 + self.step) + (self.weights[0] % 1) / 1000
        self.say("metrics", split=split, step=self.step, values={f"{prefix}loss": loss, f"{prefix}kl": None})

    # --- what it does ---------------------------------------------------------------------------------
    def run(self) -> int:
        self.phase("loading_model")
        if self.config.resume_from:
            self.load(Path(self.config.resume_from))
        else:
            self.say("log", level="info", text="Started from the start.")
        self.say("plan", total_steps=self.total, num_train_pairs=8, num_eval_pairs=2, device="stub")
        self.phase("training", self.step, self.total, "steps")
        if self.step == 0 and self.config.eval_path:
            self.measure("eval")
        status = "succeeded"
        while self.step < self.total:
            if self.interrupted:
                return self.leave()
            if (self.run_dir / STOP_FILE).exists() and self.step > 0:
                status = "stopped"
                break
            self.one_step()
        self.finish(status)
        return ExitCode.OK

    def one_step(self) -> None:
        self.trail("begin")
        time.sleep(self.step_seconds)
        self.step += 1
        self.faults.happen(self.step, self.run_dir)
        self.weights = [
            math.sin(weight * 1.7 + self.step) + self.weights[index - 1] / 3
            for index, weight in enumerate(self.weights)
        ]
        self.trail("end")
        self.measure("train")
        self.phase("training", self.step, self.total, "steps")
        if self.step % self.save_steps == 0:
            self.save()

    def trail(self, what: str) -> None:
        path = os.environ.get("STUB_TRAIL")
        if path:
            line = f"{self.config.run_id} {what} {self.step} {time.monotonic_ns()}\n"
            with Path(path).open("ab") as file:
                file.write(line.encode())

    def leave(self) -> int:
        if self.step:
            self.save()
        write_atomically(self.run_dir / RESULT_FILE, json.dumps({"status": "interrupted", "step": self.step}))
        return ExitCode.INTERRUPTED

    def finish(self, status: str) -> None:
        self.measure("eval")
        self.phase("saving")
        part = self.run_dir / ".adapter.part"
        part.mkdir(exist_ok=True)
        weights = part / "adapter_model.safetensors"
        weights.write_bytes(self.packed())
        (part / "adapter_config.json").write_text("{}")
        sha = file_sha256(weights)
        part.rename(self.run_dir / ADAPTER_DIR)
        result = {"status": status, "step": self.step, "total_steps": self.total, "adapter_sha256": sha}
        write_atomically(self.run_dir / RESULT_FILE, json.dumps(result))

    # --- checkpoints ----------------------------------------------------------------------------------
    def packed(self) -> bytes:
        return struct.pack(f"<{WIDTH}d", *self.weights)

    def save(self) -> None:
        folder = self.run_dir / CHECKPOINTS_DIR
        part = folder / f".tmp-{os.getpid()}"
        part.mkdir(parents=True, exist_ok=True)
        (part / "adapter.safetensors").write_bytes(self.packed())
        (part / "optimizer.safetensors").write_bytes(b"momentum")
        (part / "state.json").write_text(json.dumps({"step": self.step}))
        files = {
            file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
            for file in part.iterdir()
            if file.name != MANIFEST_FILE
        }
        manifest: dict[str, Any] = {"files": files, "step": self.step}
        manifest["seal"] = manifest_seal(manifest)
        (part / MANIFEST_FILE).write_text(json.dumps(manifest))
        target = folder / checkpoint_name(self.step)
        if target.exists():  # saved just before it was interrupted
            return
        part.rename(target)
        self.say("checkpoint", step=self.step, path=f"{CHECKPOINTS_DIR}/{target.name}")

    def load(self, path: Path) -> None:
        self.step = verify_checkpoint(path)
        raw = (path / "adapter.safetensors").read_bytes()
        self.weights = list(struct.unpack(f"<{WIDTH}d", raw))
        self.say("log", level="info", text=f"Continued from step {self.step}.")


def end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: a thread that waits in its buffer aborts the interpreter's end
        pass
    os._exit(75)


def main() -> int:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if os.environ.get("STUDIO_PARENT_PIPE"):
        threading.Thread(target=end_with_parent, daemon=True).start()
    engine = StubEngine(Path(sys.argv[1]))

    def interrupt(*_: Any) -> None:
        engine.interrupted = not os.environ.get("STUB_DEAF")

    signal.signal(signal.SIGTERM, interrupt)
    return engine.run()


if __name__ == "__main__":
    sys.exit(main())
