"""The chat process: JSON lines in on stdin, JSON lines out on stdout (`training.contract`, Chat…).

Holds one base model and any number of adapters beside it. Ends when stdin closes. Knows no rows.
"""

from __future__ import annotations

import copy
import ctypes
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.chat_contract import ChatEvent, ChatGenerate, ChatLoad, ChatRequest
from training.engine.generation import Answer, GenerationError, Sampling, generate
from training.engine.surroundings import without_peft_s_old_name

log = logging.getLogger(__name__)
BASE_SIDE = "base"
MEMORY_RESERVE = 512 * 1024**2  # for the cache of keys and values, the tokenizer, the libraries


class ChatRefused(Exception):
    """A sentence for the person, with what to do."""


class Models:
    """One base model, and for each adapter a second set of modules over the very same weight tensors."""

    def __init__(self, model_path: str) -> None:
        started = time.perf_counter()
        folder = Path(model_path)
        if not (folder / "config.json").is_file():
            raise ChatRefused(
                f"The base model's files are not in {folder.name} any more. Choose the base model again in a "
                "new task, which brings them back, or restore the folder."
            )
        self.model_path = model_path
        self.device, dtype = choose_device(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        base: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        self.base: Any = base.to(self.device).eval().requires_grad_(False)
        self.dtype = str(dtype).removeprefix("torch.")
        self.sides: dict[str, Any] = {BASE_SIDE: self.base}
        self._paths: dict[str, str] = {}
        self.seconds = time.perf_counter() - started

    def attach(self, adapters: dict[str, str]) -> None:
        """Make the sides exactly these; an adapter that is already there is kept."""
        for side in set(self._paths) - set(adapters):
            del self.sides[side], self._paths[side]
        for side, path in adapters.items():
            if self._paths.get(side) != path:
                self.sides[side] = self._with_adapter(Path(path))
                self._paths[side] = path

    def _with_adapter(self, folder: Path) -> Any:
        """The base's modules copied, its weights shared; peft then adds the adapter to the copy only.

        No switch has to be turned between tokens, and the bare base stays the plain transformers model.
        """
        if not (folder / "adapter_model.safetensors").is_file():
            raise ChatRefused(
                "The files of this model are gone. It cannot be tried; delete it or restore its folder."
            )
        shared: dict[int, Any] = {
            id(tensor): tensor for tensor in (*self.base.parameters(), *self.base.buffers())
        }
        skeleton = copy.deepcopy(self.base, shared)
        try:
            with without_peft_s_old_name():
                peft_model = PeftModel.from_pretrained(skeleton, folder, is_trainable=False)
            check_every_weight_has_a_place(peft_model, folder)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            log.exception("adapter %s does not fit", folder)
            raise ChatRefused(
                "The adapter does not fit this base model: it was trained on another one, or its files are "
                "damaged. Look at the base model on the model's page."
            ) from error
        return peft_model.eval().get_base_model()  # the adapter's layers sit inside it


def check_every_weight_has_a_place(peft_model: Any, folder: Path) -> None:
    """peft only warns about weights that it could not put anywhere; the answers would be the bare base's."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    lost = names ^ set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if lost:
        raise ValueError(f"{len(lost)} weights without a place, {min(lost)} among them")


def choose_device(folder: Path) -> tuple[torch.device, torch.dtype]:
    """CUDA when the weights take at most half of what is free there, so that a training beside it can live.

    On a CPU float32, as in training; bfloat16 when only that fits.
    """
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    parameters = stored // bytes_per_weight(folder)
    if torch.cuda.is_available() and parameters * 2 * 2 <= torch.cuda.mem_get_info()[0]:
        return torch.device("cuda"), torch.bfloat16
    free = psutil.virtual_memory().available - MEMORY_RESERVE
    for dtype in (torch.float32, torch.bfloat16):
        if parameters * dtype.itemsize <= free:
            return torch.device("cpu"), dtype
    raise ChatRefused(
        f"This base model needs about {parameters * 2 / 1024**3:.1f} GiB of memory to answer and "
        f"{max(free, 0) / 1024**3:.1f} GiB are free. Wait until running tasks have ended, then try again."
    )


def bytes_per_weight(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = getattr(torch, name, torch.float32)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def prompt_tokens(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The conversation as the model was trained to read it, up to where its answer begins."""
    if not tokenizer.chat_template:
        raise ChatRefused(
            "The base model has no chat template, so nobody can say how it reads a conversation. "
            "Put a chat_template.jinja file into its folder."
        )
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # the template is the model's own program: it may raise anything
        log.exception("chat template failed")
        raise ChatRefused(
            f"The model's chat template cannot render this conversation ({str(error)[:200]}). "
            "Some models accept no system prompt: try without one."
        ) from error


class ChatServer:
    """Answers requests one after the other; `cancel` is heard at any time by the thread that reads stdin."""

    def __init__(self, requests: IO[bytes], events: IO[bytes]) -> None:
        self._requests = requests
        self._events = events
        self._queue: queue.Queue[ChatRequest] = queue.Queue()
        self._cancelled: set[str] = set()
        self._models: Models | None = None

    def read(self) -> None:
        """Runs in its own thread. When the other end is gone nobody waits for an answer: leave at once."""
        for line in self._requests:
            message = json.loads(line)
            if message["type"] == "cancel":
                self._cancelled.add(message["id"])
            else:
                self._queue.put(message)
        os._exit(0)

    def serve(self) -> None:
        while True:
            message = self._queue.get()
            try:
                if message["type"] == "load":
                    self._load(message)
                elif message["type"] == "generate":
                    self._generate(message)
            except (ChatRefused, GenerationError) as refusal:
                self._say({"type": "error", "id": str(message.get("id", "")), "text": str(refusal)})
            except (MemoryError, torch.OutOfMemoryError):
                log.exception("out of memory")
                text = (
                    "There was not enough memory for this answer. Shorten the prompt or ask for fewer tokens."
                )
                self._say({"type": "error", "id": str(message.get("id", "")), "text": text})
            except Exception:
                log.exception("request failed")
                text = "The model could not answer. The reason is in chat.log in the studio's log folder."
                self._say({"type": "error", "id": str(message.get("id", "")), "text": text})

    def _say(self, event: ChatEvent) -> None:
        self._events.write(json.dumps(event).encode() + b"\n")
        self._events.flush()

    def _load(self, message: ChatLoad) -> None:
        started = time.perf_counter()
        if self._models is None or self._models.model_path != message["model_path"]:
            self._models = None  # the old weights go before the new ones come
            self._models = Models(message["model_path"])
        self._models.attach(message["adapters"])
        seconds = round(time.perf_counter() - started, 2)
        self._say(
            {
                "type": "ready",
                "device": self._models.device.type,
                "dtype": self._models.dtype,
                "seconds": seconds,
            }
        )

    def _generate(self, message: ChatGenerate) -> None:
        if self._models is None:
            raise ChatRefused("No model is loaded yet. Try again.")
        sampling = Sampling(
            temperature=message["temperature"],
            top_p=message["top_p"],
            max_new_tokens=message["max_new_tokens"],
            seed=message["seed"],
        )
        answers = [
            Answer(
                side,
                self._models.sides[side],
                prompt_tokens(self._models.tokenizer, messages),
                self._models.tokenizer,
                sampling,
            )
            for side, messages in message["sides"].items()
        ]
        name = message["id"]
        for piece in generate(answers, is_cancelled=lambda: name in self._cancelled):
            if piece.text:
                self._say({"type": "text", "id": name, "side": piece.side, "text": piece.text})
            if piece.finish_reason is not None:
                self._say(
                    {
                        "type": "done",
                        "id": name,
                        "side": piece.side,
                        "finish_reason": piece.finish_reason,
                        "num_prompt_tokens": piece.num_prompt_tokens,
                        "num_tokens": piece.num_tokens,
                        "seconds": piece.seconds,
                    }
                )
        self._cancelled.discard(name)
        self._say({"type": "end", "id": name})


def die_with_parent() -> None:
    """Linux: SIGKILL when the parent ends. Elsewhere the closed pipe does it (`ChatServer.read`)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main(arguments: Sequence[str] = ()) -> int:
    """Takes no arguments: what to load comes by the first line."""
    if arguments:
        raise SystemExit(f"chat takes no arguments, found {' '.join(arguments)}")
    die_with_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write into the protocol
    server = ChatServer(sys.stdin.buffer, events)
    threading.Thread(target=server.read, daemon=True, name="requests").start()
    server.serve()
    return 0
