"""The real command in its own process: signals, kills, the dead parent, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import NewRun, RunFolder
from training.contract import ExitCode, verify_checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LONG: dict[str, Any] = {"pairs": 24, "num_train_epochs": 400, "lora_dropout": 0.1, "save_steps": 5}

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[subprocess.Popen[bytes]] = []

    def begin(run: RunFolder, **environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "training.engine", "train", str(run.path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
            stdin=subprocess.PIPE,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def wait_for_step(run: RunFolder, step: int) -> None:
    deadline = time.monotonic() + 60
    marker = f'"split": "train", "step": {step},'
    path = run.path / "events.jsonl"
    while not (path.exists() and marker in path.read_text()):
        assert time.monotonic() < deadline, "the engine did not get there"
        time.sleep(0.02)


def test_killed_at_a_random_moment_and_started_again_it_ends_like_an_undisturbed_run(
    new_run: NewRun, start: Start
) -> None:
    settings = LONG | {"num_train_epochs": 20, "max_steps": 100}
    undisturbed, run = new_run("undisturbed", **settings), new_run("killed", **settings)
    assert start(undisturbed).wait(timeout=120) == 0
    process = start(run)
    wait_for_step(run, 33)
    process.kill()
    process.wait()
    assert not (run.path / "result.json").exists()
    assert start(run).wait(timeout=120) == 0
    assert "Continued from the checkpoint of step" in run.texts()
    assert run.result["adapter_sha256"] == undisturbed.result["adapter_sha256"]
    assert run.points("train") == undisturbed.points("train")
    assert run.points("eval") == undisturbed.points("eval")


def test_sigterm_finishes_the_step_and_leaves_a_checkpoint(new_run: NewRun, start: Start) -> None:
    run = new_run(**(LONG | {"save_steps": 100_000}))
    process = start(run)
    wait_for_step(run, 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == ExitCode.INTERRUPTED
    assert run.result["status"] == "interrupted"
    (path,) = (run.path / "checkpoints").iterdir()
    assert verify_checkpoint(path) == max(run.points("train"))


def test_the_stop_file_keeps_the_model(new_run: NewRun, start: Start) -> None:
    run = new_run(**LONG)
    process = start(run)
    wait_for_step(run, 4)
    (run.path / "stop").touch()
    assert process.wait(timeout=30) == 0
    assert run.result["status"] == "stopped"
    assert run.result["step"] == max(run.points("train")) == max(run.points("eval"))
    assert (run.path / "adapter/adapter_model.safetensors").is_file()


def test_it_dies_with_its_parent(new_run: NewRun, start: Start) -> None:
    run = new_run(**LONG)
    process = start(run, STUDIO_PARENT_PIPE="1")
    wait_for_step(run, 2)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=5) == 1


def test_without_being_told_so_the_end_of_stdin_means_nothing(new_run: NewRun, start: Start) -> None:
    run = new_run(max_steps=3)
    process = start(run)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_sigusr1_writes_the_stacks_and_the_run_goes_on(new_run: NewRun, start: Start) -> None:
    run = new_run(**LONG)
    process = start(run)
    wait_for_step(run, 2)
    process.send_signal(signal.SIGUSR1)
    wait_for_step(run, max(run.points("train")) + 20)
    assert "most recent call first" in (run.path / "engine.log").read_text()
    assert process.poll() is None


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"beta": 0.0}, 2), ({"learning_rate": 1e30, "warmup_ratio": 0.0, "num_train_epochs": 9}, 43)],
)
def test_exit_codes(new_run: NewRun, start: Start, settings: dict[str, Any], code: int) -> None:
    run = new_run()
    text = run.config.to_json()
    for key, value in settings.items():
        text = text.replace(f'"{key}": {getattr(run.config, key)}', f'"{key}": {value}')
    (run.path / "config.json").write_text(text)
    assert start(run).wait(timeout=60) == code
    assert run.result["status"] == "failed"
    assert run.result["next_step"]


def test_a_refusal_of_the_configuration_does_not_wait_for_torch(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run(method="ppo")
    code = (
        "import sys; from pathlib import Path; from training.engine.__main__ import main;"
        f"code = main(['train', {str(run.path)!r}]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == ExitCode.REFUSED


def test_a_missing_directory_is_said_on_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training.engine", "train", str(tmp_path / "no")],
        cwd=ROOT, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is not a directory" in done.stderr
