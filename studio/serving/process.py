"""One child process that answers (`python -m training.engine chat`): start it, talk to it, notice its end.

Knows the lines of `training.contract`, not what they mean; who may ask and when is `studio.serving.turns`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path
from typing import cast

from django.conf import settings

from training.chat_contract import ChatEvent, ChatRequest

logger = logging.getLogger(__name__)
LINE_BYTES = 4 * 1024 * 1024  # the longest line that is read; an answer comes in far shorter pieces
CLOSE_SECONDS = 3.0
# The child gets these and nothing else of the web process's environment: no secrets, no database address.
PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV",
    "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
)  # fmt: skip


class ChatEnded(Exception):
    """The process is gone or silent. The message is a sentence for the person who asked."""


class ChatProcess:
    """The child and its two pipes. It ends by itself when the web process does: its stdin closes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid
        assert process.stdin is not None and process.stdout is not None  # noqa: S101 - both were asked for
        self._stdin = process.stdin
        self._stdout = process.stdout

    @classmethod
    async def start(cls) -> ChatProcess:
        log_path = Path(settings.LOGS_DIR) / "chat.log"
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with log_path.open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *settings.CHAT_COMMAND,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    cwd=settings.BASE_DIR,
                    env=_environment(),
                    limit=LINE_BYTES,
                )
        except OSError as error:
            logger.exception("chat process cannot start")
            raise ChatEnded(
                f"The process that answers could not be started ({error.strerror}). "
                "Check the free disk space and memory of this machine, then try again."
            ) from error
        return cls(process)

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None and not self._stdout.at_eof()

    async def send(self, request: ChatRequest) -> None:
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
            await self._stdin.drain()
        except OSError:
            raise await self._ended() from None

    def cancel(self, name: str) -> None:
        """Ask it to stop an answer; not awaited, because the one who asked may be gone already."""
        if self.is_alive and not self._stdin.is_closing():
            self._stdin.write(json.dumps({"type": "cancel", "id": name}).encode() + b"\n")

    async def receive(self, seconds: float) -> ChatEvent:
        """The next event. A process that says nothing for so long is taken for hung, and killed."""
        try:
            async with asyncio.timeout(
                seconds
            ):  # not wait_for: in 3.11 it swallows a cancel that meets a line
                line = await self._stdout.readline()
        except TimeoutError:
            await self.kill()
            raise ChatEnded(
                f"The process that answers said nothing for {seconds:.0f} seconds and was ended. "
                "Try a shorter prompt; a large model on a busy machine may need a task to end first."
            ) from None
        if not line.endswith(b"\n"):
            raise await self._ended()
        return cast(ChatEvent, json.loads(line))

    async def _ended(self) -> ChatEnded:
        code = await self._wait()
        logger.error("chat process %s ended with %s; see logs/chat.log", self.pid, code)
        if code == -signal.SIGKILL:
            return ChatEnded(
                "The process that answers was killed, most likely because memory ran out. Send the prompt "
                "again: it starts anew. If that repeats, wait until running tasks have ended."
            )
        return ChatEnded(
            "The process that answers ended unexpectedly. Send the prompt again: it starts anew. "
            "If that repeats, the reason is in chat.log in the studio's log folder."
        )

    async def close(self) -> None:
        """Let it go: it leaves when its stdin closes, and is killed if it does not."""
        self._stdin.close()
        await self._wait()

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _wait(self) -> int:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                return await self._process.wait()
        except TimeoutError:
            await self.kill()
            return self._process.returncode or 0


def _environment() -> dict[str, str]:
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    home = str(Path(settings.DATA_DIR) / "hf")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "TOKENIZERS_PARALLELISM": "false"}
    return passed | offline | settings.ENGINE_ENV
