"""A GGUF file turned once into a folder that every run can load: safetensors, configuration, tokenizer.

Prints JSON lines: {"phase", "text"} while it works, then {"done": true, "path"} or {"error", "next_step"}.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

from training.contract import ExitCode
from training.engine.errors import EngineError, RefusedError, is_disk_full

logger = logging.getLogger(__name__)


def main(gguf: Path, out_dir: Path) -> int:
    """The `convert-gguf` subcommand. A folder that is already complete is left as it is."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        if not (out_dir / "config.json").is_file():
            convert(gguf.absolute(), out_dir.absolute())
    except Exception as error:
        logger.exception("the conversion failed")
        return _failed(error)
    _say(done=True, path=str(out_dir))
    return ExitCode.OK


def convert(gguf: Path, out_dir: Path) -> None:
    """Read, write beside, try, rename: `out_dir` is either a model that loads or not there."""
    if not gguf.is_file():
        raise RefusedError(
            f"The file {gguf.name} is not there.", "Install the starter model again: make setup."
        )
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RefusedError(f"{gguf.name} is not a GGUF file.", "Choose a file that ends in .gguf.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_dir.with_name(f".{out_dir.name}-{uuid.uuid4().hex}.tmp")
    try:
        _say(phase="reading", text=f"Reading {gguf.name}")
        model = _read_model(gguf)
        _say(phase="tokenizer", text="Reading the tokenizer")
        tokenizer = _read_tokenizer(gguf)
        _say(phase="writing", text="Writing the model's weights")
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _say(phase="checking", text="Checking that the model loads")
        _check(temporary)
        _flush(temporary)
        if out_dir.exists():  # an earlier attempt without config.json
            shutil.rmtree(out_dir)
        temporary.replace(out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_model(gguf: Path) -> Any:
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # The tensors are plain float32 now, but the model still calls itself quantised and refuses to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _read_tokenizer(gguf: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    if not tokenizer.chat_template:
        raise RefusedError(f"{gguf.name} carries no chat template.", "Choose the GGUF of an instruct model.")
    return tokenizer


def _check(folder: Path) -> None:
    """Load what was written and look at one prediction."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    if not bool(torch.isfinite(logits).all()):
        raise RefusedError(
            "The converted model answers with numbers that are not finite.", "Try another file."
        )


def _flush(folder: Path) -> None:
    from training.engine.checkpoints import flush_to_disk

    for path in folder.iterdir():
        flush_to_disk(path)
    flush_to_disk(folder)


def _failed(error: Exception) -> int:
    if isinstance(error, EngineError):
        _say(error=error.sentence, next_step=error.next_step)
        return error.exit_code
    if is_disk_full(error):
        _say(error="The disk is full.", next_step="Free some space and start again.")
        return ExitCode.DISK_FULL
    first = str(error).strip().split("\n")[0][:300]
    _say(error=f"The GGUF file cannot be converted: {first}", next_step="Install the starter model again.")
    return 1


def _say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")
    sys.stdout.flush()
