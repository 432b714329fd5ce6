"""`python -m engine.launch` is `mainstem` where that script is not installed."""

from __future__ import annotations

import sys

from engine.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
