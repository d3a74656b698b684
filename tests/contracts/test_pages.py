"""Templates and committed files: nothing unescaped, nothing inline, nothing from elsewhere, no foreign words."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "templates").rglob("*.html"))
# Written apart, so that this file does not hold what it looks for.
FORBIDDEN_WORDS = [
    "/wo" + "rk/",
    "/tmp/scr" + "atch",
    "pypi." + "org",
    "files.python" + "hosted",
    "deb.deb" + "ian",
]


def committed_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: str(path.relative_to(ROOT / "templates")))
def test_a_template_is_escaped_and_fit_for_the_strict_policy(template: Path) -> None:
    text = template.read_text(encoding="utf-8")
    for pattern, what in (
        (r"\|\s*(safe|safeseq)\b", "unescaped text"),
        (r"\{%\s*autoescape\s+off", "unescaped text"),
        (r"\son[a-z]+\s*=\s*[\"']", "an inline event handler"),
        (r"<style[\s>]", "an inline style sheet"),
        (r"<script(?![^>]*\ssrc=)(?![^>]*type=\"application/json\")[^>]*>", "an inline script"),
        (r"hx-on", "an inline event handler of htmx"),
        (
            r"(src|href)\s*=\s*[\"'](https?:)?//(?!127\.0\.0\.1)[^\"']*\.(js|css|mjs|woff2?)",
            "a file from elsewhere",
        ),
        (r"javascript:", "a script in an address"),
    ):
        assert not re.search(pattern, text, re.IGNORECASE), f"{what} in {template}"


def test_every_post_form_has_its_csrf_token() -> None:
    for template in TEMPLATES:
        text = template.read_text(encoding="utf-8")
        for form in re.findall(
            r"<form\b[^>]*method=[\"']post[\"'].*?</form>", text, re.IGNORECASE | re.DOTALL
        ):
            assert "csrf_token" in form, f"{template}: {form[:120]}"


def test_scripts_and_styles_ask_nobody_else() -> None:
    for folder, endings in (("static/js", "*.js"), ("static/css", "*.css")):
        for path in (ROOT / folder).rglob(endings):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(import|from|url\(|fetch\()\s*[\"'(]*\s*https?://", text), path
            assert not re.search(
                r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|new Function)\b|\beval\(", text
            ), path


def test_no_committed_file_names_a_place_it_must_not_know() -> None:
    for path in committed_files():
        data = path.read_bytes()
        for word in FORBIDDEN_WORDS:
            assert word.encode() not in data, f"{path.relative_to(ROOT)} has {word}"


def test_no_test_reaches_another_machine() -> None:
    with socket.socket() as line, pytest.raises(AssertionError, match="tried to reach"):
        line.settimeout(0.2)
        line.connect(("192.0.2.1", 80))
