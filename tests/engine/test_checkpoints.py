"""A checkpoint is whole or not there: every way of being cut off, deaths while it is written, full disks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import NewRun
from tests.engine.interruptions import LeaveAt
from tests.engine.ranks import train_on
from training.contract import CHECKPOINT_FILES, MANIFEST_FILE, ExitCode, verify_checkpoint
from training.engine.checkpoints import Identity, clean_leftovers, find_checkpoint, save_checkpoint
from training.engine.errors import explain

FILES = (*CHECKPOINT_FILES, MANIFEST_FILE)
OURS = Identity("c", "d", "w")


def save(run_dir: Path, step: int, *, value: float = 1.0, spare: int = 0) -> Path:
    """Of one small parameter: what is tested here does not depend on the model."""
    parameter = torch.nn.Parameter(torch.full((3,), value))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return save_checkpoint(
        run_dir, step=step, run_id="r", identity=OURS, fingerprint={}, trainable={"w": parameter},
        optimizer=optimizer, state={"step": step, "value": value}, spare=spare,
    )  # fmt: skip


def found(run_dir: Path) -> tuple[int, float] | None:
    """What a run would go on from: the step, and a value that tells two checkpoints of one step apart."""
    clean_leftovers(run_dir)
    loaded = find_checkpoint(run_dir, "", OURS, say=lambda text: None)
    return None if loaded is None else (loaded.step, loaded.state["value"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_byte_is_found(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 4) / name
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="step-000004"):
            verify_checkpoint(file.parent)
    file.write_bytes(content)
    assert verify_checkpoint(file.parent) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_bit_flipped_in_any_byte_is_found(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 4) / name
    content = bytearray(file.read_bytes())
    for place in range(len(content)):
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        with pytest.raises(ValueError, match="step-000004"):
            verify_checkpoint(file.parent)
        content[place] ^= 1 << place % 8


def longer(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"\n")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    **{f"{name} missing": lambda folder, name=name: (folder / name).unlink() for name in FILES},
    **{f"{name} empty": lambda folder, name=name: (folder / name).write_bytes(b"") for name in FILES},
    **{f"{name} longer": lambda folder, name=name: longer(folder, name) for name in CHECKPOINT_FILES},
    "a folder for a file": lambda folder: [(folder / FILES[0]).unlink(), (folder / FILES[0]).mkdir()],
    "nothing in it": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file too many": lambda folder: (folder / "adapter.safetensors.part").touch(),
    "the manifest of another": lambda folder: shutil.copy(
        folder.parent / "step-000002" / MANIFEST_FILE, folder / MANIFEST_FILE
    ),
    "the weights of another": lambda folder: shutil.copy(
        folder.parent / "step-000002" / FILES[0], folder / FILES[0]
    ),
    "a file for the folder": lambda folder: [shutil.rmtree(folder), folder.touch()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 2, value=2.0)
    newest = save(tmp_path, 4)
    assert found(tmp_path) == (4, 1.0)
    DAMAGES[damage](newest)
    assert found(tmp_path) == (2, 2.0)
    assert not newest.is_dir(), "it is set aside"


def test_the_newest_of_two_runs_is_taken_and_at_the_same_step_the_runs_own(tmp_path: Path) -> None:
    """A run that goes on from another has that one's best from the start, and it may be older."""
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    steps = {}
    for folder, step in ((own, 2), (other, 2), (other, 6), (other, 8)):
        steps[folder, step] = save(folder, step)

    def taken() -> Path | None:
        loaded = find_checkpoint(own, str(steps[other, 6]), OURS, say=lambda text: None)
        return None if loaded is None else loaded.path

    assert taken() == steps[other, 6]
    same = save(own, 6)
    assert taken() == same
    newer = save(own, 7)
    assert taken() == newer


def test_a_copy_under_another_name_says_its_step_itself(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    save(own, 6)
    copy = save(other, 8).rename(other / "the good one")
    loaded = find_checkpoint(own, str(copy), OURS, say=lambda text: None)
    assert loaded is not None and loaded.path == copy


@pytest.mark.slow
@pytest.mark.parametrize("before", ["older", "same", "two"])
def test_death_at_any_moment_of_a_save_leaves_a_good_checkpoint(tmp_path: Path, before: str) -> None:
    """The process ends at the first, the second … call that changes the disk, until a save gets through.

    `same`: the only checkpoint there is, is the one being replaced.
    """
    steps = {"older": [2], "same": [4], "two": [1, 2]}[before]
    old = {(step, 2.0) for step in steps}
    seen = set()
    for moment in range(1, 100):
        run_dir = tmp_path / str(moment)
        run_dir.mkdir()
        for step in steps:
            save(run_dir, step, value=2.0)
        died = die_at(moment, lambda run_dir=run_dir: save(run_dir, 4, value=4.0))
        left = found(run_dir)
        assert left in old | {(4, 4.0)}, f"after dying at change {moment}"
        seen.add(left)
        assert not [path for path in (run_dir / "checkpoints").iterdir() if path.name[0] == "."]
        if not died:
            break
    assert moment > 10
    assert left == (4, 4.0)
    assert len(seen) == 2, "some deaths come before the new one counts, some after"


def die_at(moment: int, work: Callable[[], Any]) -> bool:
    """Run `work` in a process that is gone at its nth change of the disk. False: it came to its end."""

    def body() -> None:
        left = iter(range(moment - 1, -1, -1))

        def deadly(name: str, real: Callable[..., Any]) -> None:
            def call(*arguments: Any, **keywords: Any) -> Any:
                if next(left) == 0:
                    os._exit(9)
                return real(*arguments, **keywords)

            setattr(os, name, call)

        for name in ("mkdir", "open", "fsync", "replace", "rename", "unlink", "rmdir"):
            deadly(name, getattr(os, name))
        work()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(30)
    assert process.exitcode in (0, 9)
    return process.exitcode == 9


def test_a_failed_save_puts_back_what_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 4, value=2.0)
    real = Path.replace

    def full(self: Path, target: Any) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 4, value=4.0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
    assert found(tmp_path) == (4, 2.0)


# --- full disks ---------------------------------------------------------------------------------------
SETTINGS: dict[str, Any] = {"pairs": 24, "num_train_epochs": 2, "eval_steps": 3, "save_steps": 2}


@pytest.mark.slow
def test_a_limit_on_file_sizes_ends_with_44_and_the_run_goes_on_when_it_is_gone(new_run: NewRun) -> None:
    """A real one: the kernel refuses the optimizer's file in the middle."""
    run, undisturbed = new_run("run", **SETTINGS), new_run("undisturbed", **SETTINGS)
    assert undisturbed.train() == 0
    assert run.train(LeaveAt(run, 3)) == ExitCode.INTERRUPTED
    sizes = {path.name: path.stat().st_size for path in (run.path / "checkpoints/step-000003").iterdir()}
    limit = (sizes["adapter.safetensors"] + sizes["optimizer.safetensors"]) // 2

    def limited(rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert train_on(run, 1, as_rank=limited) == [ExitCode.DISK_FULL]
    assert run.result["error"] == "A file would be larger than this account or disk allows."
    assert [path.name for path in sorted((run.path / "checkpoints").iterdir())] == [
        "step-000002", "step-000003",
    ]  # fmt: skip
    assert run.train() == 0
    assert run.result["adapter_sha256"] == undisturbed.result["adapter_sha256"]
    assert run.points("train") == undisturbed.points("train")


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of its own with little room; skipped where one may not be mounted."""
    folder = Path(tempfile.mkdtemp(prefix="small-"))
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if not mounted or mounted.returncode:
        folder.rmdir()
        pytest.skip("this account may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


@pytest.mark.slow
def test_a_really_full_disk_ends_with_44_and_the_best_checkpoint_is_usable(
    new_run: NewRun, small_disk: Path
) -> None:
    run = new_run(**SETTINGS)
    (small_disk / "run").mkdir()
    run.path = small_disk / "run"
    run.write()
    assert run.train(LeaveAt(run, 4)) == ExitCode.INTERRUPTED
    filler = small_disk / "filler"
    room = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(room - 60_000))  # the log still has some room, a checkpoint has not
    assert run.train() == ExitCode.DISK_FULL
    assert run.result["error"] == "The disk is full."
    steps = [verify_checkpoint(path) for path in sorted((run.path / "checkpoints").iterdir())]
    assert 4 in steps
    filler.unlink()
    assert run.train() == 0
    assert "Continued from the checkpoint of step 4." in run.texts()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", ExitCode.DISK_FULL),
        ("Error while serializing: I/O error: Disk quota exceeded (os error 122)", ExitCode.DISK_FULL),
        ("Error while serializing: I/O error: File too large (os error 27)", ExitCode.DISK_FULL),
        ("Error while serializing: I/O error: Permission denied (os error 13)", 1),
    ],
)
def test_what_safetensors_says_of_a_disk_is_understood(text: str, code: int) -> None:
    assert explain(Exception(text), None).exit_code == code


def test_older_checkpoints_go_and_the_spared_one_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000003",
        "step-000004",
    ]
    for step in (5, 6):
        save(tmp_path, step, spare=3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000005", "step-000006"]
