"""`python -m training.engine`: see `command_line.py`."""

from __future__ import annotations

import os
import sys

# Before torch is loaded. Threads that wait for each other spin for some milliseconds by default and so take the
# processor from whom they wait for: with one other busy process on two cores, products took 2 to 3 times as long and
# whole steps over 10 times. Waiting this short costs nothing where nobody else computes.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from training.engine.command_line import main

if __name__ == "__main__":
    sys.exit(main())
