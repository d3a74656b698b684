"""The real command on two ranks: its own launcher and torchrun, exit codes, and that nothing outlives anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.conftest import NewRun, RunFolder
from training.contract import ExitCode, verify_checkpoint
from training.engine import launch

ROOT = Path(__file__).parents[2]
LONG: dict[str, Any] = {"pairs": 24, "num_train_epochs": 400, "lora_dropout": 0.1, "save_steps": 5}
SHORT: dict[str, Any] = {"pairs": 12, "lora_dropout": 0.1}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2")

Start = Callable[..., psutil.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[psutil.Popen] = []

    def begin(run: RunFolder, *launcher: str, **environment: str) -> psutil.Popen:
        process = psutil.Popen(
            [sys.executable, *launcher, "-m", "training.engine", "train", str(run.path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.is_running():
            for child in process.children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


def wait_for_step(run: RunFolder, step: int) -> None:
    deadline = time.monotonic() + 90
    path = run.path / "events.jsonl"
    while not (path.exists() and f'"split": "train", "step": {step},' in path.read_text()):
        assert time.monotonic() < deadline, "the engine did not get there"
        time.sleep(0.05)


def ranks_of(process: psutil.Popen) -> list[psutil.Process]:
    found = [child for child in process.children(recursive=True) if "training.engine" in child.cmdline()]
    assert len(found) == 2
    return found


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


@pytest.mark.slow
def test_num_devices_and_torchrun_give_the_same_bits(new_run: NewRun, start: Start) -> None:
    own, by_torchrun = new_run("own", num_devices=2, **SHORT), new_run("torchrun", **SHORT)
    assert start(own).wait(timeout=120) == 0
    assert start(by_torchrun, *TORCHRUN).wait(timeout=120) == 0
    assert own.result["adapter_sha256"] == by_torchrun.result["adapter_sha256"]
    assert own.result["num_devices"] == by_torchrun.result["num_devices"] == 2
    assert [event["step"] for event in own.events if event["type"] == "metrics"] == [0, 1, 2, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["own", "torchrun"])
def test_the_ranks_die_with_their_launcher(new_run: NewRun, start: Start, launcher: tuple[str, ...]) -> None:
    run = new_run(**LONG, num_devices=2)
    process = start(run, *launcher)
    wait_for_step(run, 2)
    ranks = ranks_of(process)
    process.send_signal(signal.SIGKILL)
    assert_gone(ranks)


@pytest.mark.slow
def test_the_launcher_dies_with_its_parent_and_takes_the_ranks_along(new_run: NewRun, start: Start) -> None:
    run = new_run(**LONG, num_devices=2)
    process = start(run, STUDIO_PARENT_PIPE="1")
    wait_for_step(run, 2)
    ranks = ranks_of(process)
    process.stdin.close()
    assert process.wait(timeout=10) == 1
    assert_gone(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_and_the_launcher_like_it(new_run: NewRun, start: Start, victim: int) -> None:
    """The supervisor reads SIGKILL as what it mostly is: the machine's memory was full."""
    run = new_run(**LONG, num_devices=2)
    process = start(run)
    wait_for_step(run, 6)
    ranks = ranks_of(process)
    ranks[victim].send_signal(signal.SIGKILL)
    assert process.wait(timeout=launch.GRACE_SECONDS + 10) == -signal.SIGKILL
    assert_gone(ranks)
    assert verify_checkpoint(run.path / "checkpoints/step-000005") == 5


@pytest.mark.slow
def test_sigterm_and_a_question_for_the_stacks_reach_every_rank(new_run: NewRun, start: Start) -> None:
    run = new_run(**(LONG | {"save_steps": 100_000}), num_devices=2)
    process = start(run)
    wait_for_step(run, 3)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == ExitCode.INTERRUPTED
    assert run.result["status"] == "interrupted"
    (path,) = (run.path / "checkpoints").iterdir()
    assert verify_checkpoint(path) == max(run.points("train"))


@pytest.mark.slow
def test_a_refusal_is_exit_code_2_and_one_result(new_run: NewRun, start: Start) -> None:
    run = new_run(num_devices=2, method="ppo")
    assert start(run).wait(timeout=60) == ExitCode.REFUSED
    assert "'ppo' is not known here" in run.result["error"]


SLEEPER = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
how = sys.argv[1]
if how == "code" and rank == 1: sys.exit(42)
if how == "signal" and rank == 1: os.kill(os.getpid(), signal.SIGSEGV)
if how == "fine": sys.exit(0)
time.sleep(60)
"""


@pytest.mark.parametrize(("how", "code"), [("fine", 0), ("code", 42), ("signal", -signal.SIGSEGV)])
def test_the_launcher_ends_as_the_first_rank_that_ended_badly(tmp_path: Path, how: str, code: int) -> None:
    """The other one is asleep and would be for a minute: after the grace it is killed."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from training.engine import launch;"
        "launch.GRACE_SECONDS = 0.2; sys.argv = ['x'];"
        f"launch.COMMAND = (sys.executable, '-c', {SLEEPER!r});"
        f"sys.exit(launch.launch([{how!r}], count=2))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=30, stdin=subprocess.DEVNULL)
    assert done.returncode == code


def test_the_launcher_does_not_import_torch() -> None:
    code = "import sys; import training.engine.session, training.engine.launch; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
