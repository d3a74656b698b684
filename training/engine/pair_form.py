"""The form of one line of a pairs file: what it must be, and in words what it is instead. Knows no tokens.

Standard library only. The studio's upload converts other forms; the engine reads this one and says which it met.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.engine.errors import RefusedError

MESSAGES = '[{"role": "user", "content": "…"}]'
ANSWER = '[{"role": "assistant", "content": "…"}]'
# By the keys that give them away: forms that other programs read.
OTHER_FORMS = (
    ({"input", "preferred_output", "non_preferred_output"}, "the preference form of Together and OpenAI"),
    ({"prompt", "completion", "label"}, "one rated answer, as KTO reads them"),
    ({"prompt", "completion"}, "TRL's prompt and completion"),
    ({"conversations"}, "ShareGPT's form"),
    ({"messages"}, "one conversation"),
    ({"instruction", "output"}, "Alpaca's form"),
    ({"chosen", "rejected"}, "TRL's form with the prompt inside both sides"),
)
KEYS_SHOWN = 8
TEXT_SHOWN = 40


def pair_of_line(line: str, path: Path, number: int, sides: Sequence[str]) -> dict[str, Any]:
    """The object of this line with its `prompt` and these sides; `id` is the line's number where it has none.

    Raises `RefusedError` with file, line, what was found and the form that is read.
    """
    problem, pair = _read(line, ("prompt", *sides))
    if problem:
        what = _noun(sides)
        raise RefusedError(f"Line {number} of {path} is not {what}: {problem}.", _next_step(sides))
    pair.setdefault("id", str(number))
    return pair


def is_blank(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether an answer says nothing somewhere: what the dataset page calls `empty_answer`.

    The template would still write its end of answer, and training would teach to end at once. A message that
    calls a tool, or carries anything else beside its text, says that.
    """
    said = [message for message in messages if message["role"] == "assistant"]
    return not messages or not all(_says_something(message) for message in said)


def _says_something(message: dict[str, Any]) -> bool:
    beside = any(value for key, value in message.items() if key not in {"role", "content"})
    return bool(message["content"].strip()) or beside


def _read(line: str, keys: Sequence[str]) -> tuple[str, dict[str, Any]]:
    try:
        pair = json.loads(line.strip())
    except json.JSONDecodeError as error:
        if line.strip().startswith("["):
            return "it begins a list, and each line must be one object", {}
        return f"it is not JSON ({error.msg} at character {error.pos + 1})", {}
    except RecursionError:
        return "it is nested too deeply", {}
    except ValueError:  # of Python itself, which reads no number of thousands of digits
        return "it holds a number with too many digits", {}
    if not isinstance(pair, dict):
        return f"it is {_found(pair)}, not an object", {}
    missing = [key for key in keys if key not in pair]
    if missing:
        return _other_form(pair, missing), {}
    for key in keys:
        problem = _not_messages(pair[key])
        if problem:
            return f"its {key} is {problem}, not a list of messages", {}
    return "", pair


def _other_form(pair: dict[str, Any], missing: Sequence[str]) -> str:
    """Which keys it lacks, which it has, and whose form that is."""
    shown = [_cut(key) for key in sorted(pair)[:KEYS_SHOWN]]
    found = ", ".join(shown) + (", …" if len(pair) > KEYS_SHOWN else "")
    text = f"it has no {' and no '.join(missing)}; its keys are {found or 'none'}"
    whose = next((name for keys, name in OTHER_FORMS if keys <= set(pair)), "")
    return f"{text} ({whose})" if whose else text


def _not_messages(value: Any) -> str:
    """What it is instead of a list of messages; "" for one."""
    if not isinstance(value, list):
        return _found(value)
    for message in value:
        if not isinstance(message, dict):
            return f"a list with {_found(message)}"
        for key in ("role", "content"):
            if key not in message:
                return f"a list with a message without {key}"
            if not isinstance(message[key], str):
                return f"a list with a message whose {key} is {_found(message[key])}"
    return ""


def _found(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text “{_cut(value)}”"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return "a list" if isinstance(value, list) else "an object"


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}…"


def _noun(sides: Sequence[str]) -> str:
    if not sides:
        return "a prompt"
    return "a preference pair" if "rejected" in sides else "an example with a prompt and a chosen answer"


def _next_step(sides: Sequence[str]) -> str:
    form = ", ".join((f'"prompt": {MESSAGES}', *(f'"{side}": {ANSWER}' for side in sides)))
    return f"Write {{{form}}} on each line, or upload the file to the studio, which converts the usual forms."
