"""Who may import what, seen in a fresh interpreter; and every module can be imported at all."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("studio", "training", "datasets_app")
HEAVY = ("torch", "transformers", "peft", "accelerate")


def run_python(code: str, *, timeout: int = 120) -> str:
    env = os.environ | {"DJANGO_SETTINGS_MODULE": "studio.settings_test", "OMP_NUM_THREADS": "1"}
    env.pop("STUDIO_DATA_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules(package: str) -> list[str]:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in found if not name.endswith("__main__") and "settings" not in name]


def test_the_web_side_never_imports_torch() -> None:
    web = [
        name
        for package in PACKAGES
        for name in modules(package)
        if not name.startswith(("training.engine", "training.worker"))
    ]
    loaded = run_python(
        "import importlib, sys, studio.asgi\n"
        "from django.urls import get_resolver\n"
        "def walk(patterns):\n"
        "    for pattern in patterns:\n"
        "        walk(pattern.url_patterns) if hasattr(pattern, 'url_patterns') else pattern.callback\n"
        "walk(get_resolver().url_patterns)\n"
        f"[importlib.import_module(name) for name in {web!r}]\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert loaded == "[]"


def test_the_worker_never_imports_torch() -> None:
    worker = modules("training/worker".replace("/", os.sep))
    loaded = run_python(
        "import importlib, sys, django\n"
        "django.setup()\n"
        f"[importlib.import_module(name) for name in {worker!r}]\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert loaded == "[]"


@pytest.mark.slow
def test_the_engine_never_imports_django() -> None:
    engine = modules("training/engine".replace("/", os.sep))
    loaded = run_python(
        "import importlib, sys\n"
        f"[importlib.import_module(name) for name in {engine!r}]\n"
        "print([name for name in ('django', 'celery', 'channels', 'plotly') if name in sys.modules])"
    )
    assert loaded == "[]"


def test_package_files_between_the_processes_are_empty() -> None:
    """The engine imports through these: a line in them would run on both sides."""
    for name in ("training/__init__.py", "datasets_app/__init__.py"):
        assert (ROOT / name).read_text() == "", name


def calls(tree: ast.AST) -> set[str]:
    """Dotted names of everything called: torch.load, mark_safe, pickle.loads…"""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_no_pickle_no_remote_code_no_unescaped_text() -> None:
    forbidden = {"torch.load", "pickle.load", "pickle.loads", "mark_safe", "SafeString", "eval", "exec"}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
            assert not calls(tree) & forbidden, f"{path}: {calls(tree) & forbidden}"
            for node in ast.walk(tree):
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert isinstance(node.value, ast.Constant) and node.value.value is False, path
