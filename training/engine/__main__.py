"""`python -m training.engine`: see `command_line.py`."""

from __future__ import annotations

import sys

from training.engine.command_line import main

if __name__ == "__main__":
    sys.exit(main())
