"""What a person sees in the terminal: short lines, and of the programs' logs only what needs attention."""

from __future__ import annotations

import os
import re
import sys

from studio.launch.children import Child

ATTENTION = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b")
LINE_LENGTH = 300


class Console:
    """Writes lines; survives a terminal that was closed. Control characters in a log line are shown, not obeyed."""

    def __init__(self, *, verbose: bool) -> None:
        self.verbose = verbose
        self.closed = False

    def say(self, text: str = "") -> None:
        if self.closed:
            return
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except (OSError, ValueError):
            self.closed = True
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - kept for good

    def relay(self, child: Child) -> None:
        """Show what a program logged: everything when asked for, else the first line of what went wrong."""
        for line in child.new_lines():
            if self.verbose or ATTENTION.search(line[:100]):
                shown = "".join(letter if letter.isprintable() else "·" for letter in line[:LINE_LENGTH])
                self.say(f"  {child.name:<8} {shown}")
