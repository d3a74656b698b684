"""Speaks the lines of the chat process without torch: echoes, 10 ms a piece.

Words in the prompt make trouble: "crash" kills it in the middle of an answer, "silent" makes it deaf to a
cancel, "slow" answers for 10 seconds.
A model path ending in "broken" is refused.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from typing import Any

requests: queue.Queue[dict[str, Any]] = queue.Queue()
cancelled: set[str] = set()


def say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def read() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if message["type"] == "cancel":
            cancelled.add(message["id"])
        else:
            requests.put(message)
    os._exit(0)


def answer(message: dict[str, Any]) -> None:
    name, sides = message["id"], message["sides"]
    prompt = next(iter(sides.values()))[-1]["content"]
    count = 1000 if "slow" in prompt or "silent" in prompt else 5
    reason = "stop"
    for number in range(count):
        for side, messages in sides.items():
            say(type="text", id=name, side=side, text=f"{side}{len(messages)}.{number} ")
        if "crash" in prompt and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if name in cancelled and "silent" not in prompt:
            reason = "cancelled"
            break
        time.sleep(0.01)
    for side in sides:
        facts = {"num_prompt_tokens": 3, "num_tokens": number + 1, "seconds": 0.05}
        say(type="done", id=name, side=side, finish_reason=reason, **facts)
    say(type="end", id=name)


threading.Thread(target=read, daemon=True).start()
while True:
    request = requests.get()
    if request["type"] == "generate":
        answer(request)
    elif request["model_path"].endswith("broken"):
        say(type="error", id="", text="The stub cannot load this.")
    else:
        say(type="ready", device="cpu", dtype="float32", seconds=0.0)
