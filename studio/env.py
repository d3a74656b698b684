"""Strict getters for settings that come from the environment.

Knows nothing of Django's settings. A bad value raises `ImproperlyConfigured` with the name of the
variable, what was found and what is allowed; a secret may also be given as a file (`NAME_FILE`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured

TRUE = {"1", "true", "yes", "on"}
FALSE = {"0", "false", "no", "off"}

# Every variable that a getter below was asked for; `reject_unknown` compares the environment with it.
_known: set[str] = set()


def env_str(name: str, default: str = "") -> str:
    _known.add(name)
    return os.environ.get(name, default)


def env_bool(name: str, default: bool) -> bool:
    _known.add(name)
    raw = os.environ.get(name)
    if raw is None:
        return default
    if raw.strip().lower() in TRUE:
        return True
    if raw.strip().lower() in FALSE:
        return False
    raise ImproperlyConfigured(
        f"{name}={raw!r} is not a yes or a no. Use 1 or 0, or unset it for {int(default)}."
    )


def env_int(name: str, default: int, *, low: int, high: int) -> int:
    _known.add(name)
    raw = os.environ.get(name)
    if raw is None:
        return default
    try:
        value = int(raw)
    except ValueError:
        raise ImproperlyConfigured(
            f"{name}={raw!r} is not a whole number. Use one from {low} to {high}, or unset it for {default}."
        ) from None
    if not low <= value <= high:
        raise ImproperlyConfigured(f"{name}={value} is out of range. Use a number from {low} to {high}.")
    return value


def env_list(name: str, default: str = "") -> list[str]:
    return [part.strip() for part in env_str(name, default).split(",") if part.strip()]


def env_choice(name: str, default: str, choices: tuple[str, ...]) -> str:
    raw = env_str(name, default).strip().upper()
    if raw not in choices:
        raise ImproperlyConfigured(f"{name}={raw!r} is not one of {', '.join(choices)}.")
    return raw


def env_path(name: str, default: Path, *, make: bool = False) -> Path:
    """A folder; with `make` it exists afterwards and can be written to, and nobody else may look into a new one."""
    raw = env_str(name)
    path = (Path(raw).expanduser() if raw else default).resolve()
    advice = f"Name a folder, or unset {name} for {default}."
    if path.exists() and not path.is_dir():
        raise ImproperlyConfigured(f"{name}={str(path)!r} is a file, not a folder. {advice}")
    if make:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ImproperlyConfigured(
                f"{name}={str(path)!r} cannot be made ({error.strerror}). {advice}"
            ) from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise ImproperlyConfigured(
                f"{name}={str(path)!r} cannot be written to. Change its rights. {advice}"
            )
    return path


def env_secret(name: str) -> str:
    """The variable itself, or the content of the file that `NAME_FILE` names."""
    _known.add(f"{name}_FILE")
    file_name = os.environ.get(f"{name}_FILE")
    if file_name is None:
        return env_str(name)
    _known.add(name)
    try:
        return Path(file_name).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ImproperlyConfigured(
            f"{name}_FILE={file_name!r} cannot be read ({error.strerror}). Check the path and its rights."
        ) from None


def known() -> frozenset[str]:
    """Every variable that has been asked for so far."""
    return frozenset(_known)


def env_file(name: str, default: Path) -> None:
    """Read `NAME=value` lines into the environment; what is set there already wins. `none` reads no file."""
    raw = env_str(name)
    if raw == "none":
        return
    path = Path(raw).expanduser() if raw else default
    if not raw and not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ImproperlyConfigured(f"{name}: {path} cannot be read ({error}).") from None
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key, sign, value = text.partition("=")
        if not sign or not key.strip().isidentifier():
            raise ImproperlyConfigured(f"{path}, line {number}: {text!r} is not of the form NAME=value.")
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        else:
            value = re.split(r"(?:^|\s)#", value, maxsplit=1)[0].rstrip()  # a remark after the value
        os.environ.setdefault(key.strip(), value)


def reject_unknown(prefix: str = "STUDIO_") -> None:
    """Refuse to start with a variable nobody reads: it is nearly always a misspelt one."""
    unknown = sorted(name for name in os.environ if name.startswith(prefix) and name not in _known)
    if unknown:
        known = ", ".join(sorted(name for name in _known if name.startswith(prefix)))
        raise ImproperlyConfigured(
            f"Unknown setting {', '.join(unknown)}. Known ones are: {known}. See .env.example."
        )
