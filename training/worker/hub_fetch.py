"""A child program that copies one model from the Hub: `python -m training.worker.hub_fetch REPO REVISION
FOLDER`.

Talks to its parent in JSON lines on stdout and ends when its stdin closes. Fetches weights, JSON and
tokenizer
files only, the small ones first, and refuses a model that needs code before the weights are touched. No
Django.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training.model_folder import CONFIG_LIMIT, FolderProblem, check_config, load_json

# Top-level files only; no code, no pickles, no duplicates of the weights in other formats.
WANTED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", "*.jinja", "README.md", "LICENSE*",
    "*.safetensors.index.json", "*.safetensors",
)  # fmt: skip
UNWANTED = ("consolidated*", "adapter_*", "*.py", "*/*")


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)  # noqa: T201 - the parent reads it


def choose(names: Iterable[str]) -> list[str]:
    """The files of a model that the studio uses, weights last."""
    chosen = [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, wanted) for wanted in WANTED)
        and not any(fnmatch.fnmatchcase(name, unwanted) for unwanted in UNWANTED)
    ]
    return sorted(chosen, key=lambda name: (name.endswith(".safetensors"), name != "config.json", name))


def fetch(repo: str, revision: str, folder: Path) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repo, revision=revision or None, files_metadata=True, timeout=30)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    names = choose(sizes)
    if not any(name.endswith(".safetensors") for name in names):
        raise FolderProblem(f"{repo} has no safetensors weights. Choose a model that has them.")
    if "config.json" not in names:
        raise FolderProblem(
            f"{repo} has no config.json. Choose a complete model, not an adapter or a GGUF file."
        )
    sha = str(info.sha or revision)
    say(type="plan", sha=sha, bytes=sum(sizes[name] for name in names))
    for name in names:
        hf_hub_download(repo, name, revision=sha, local_dir=folder)
        if name == "config.json":
            check_config(load_json(folder / name, limit=CONFIG_LIMIT, what="config.json"))
    say(type="done", sha=sha)


def _kind(error: Exception) -> str:
    """What went wrong, in one word for the parent, which has the sentences."""
    from huggingface_hub import errors

    if isinstance(error, FolderProblem):
        return "refused"
    if isinstance(error, errors.GatedRepoError):
        return "gated"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        return "missing"
    if isinstance(error, OSError) and error.errno == 28:
        return "disk"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "gated"
    if status is not None:
        return f"answer {status}"
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {
        "ConnectionError",
        "TransportError",
        "TimeoutError",
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
    }:
        return "offline"
    return "other"


def _end_with_parent() -> None:
    """The parent holds this program's stdin; its end is the parent's end."""

    def wait() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would be held when the interpreter shuts down
            pass
        os._exit(75)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    repo, revision, folder = sys.argv[1:4]
    _end_with_parent()
    try:
        fetch(repo, revision, Path(folder))
    except Exception as error:
        say(type="failed", kind=_kind(error), text=str(error)[:500])
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
