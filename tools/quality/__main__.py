"""Runs the package of this checkout: `python tools/quality`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # was this folder, whose modules are the package's
    from tools.quality.main import main

    sys.exit(main())
