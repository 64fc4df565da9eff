#!/usr/bin/env python3
"""Run the daemon from a checkout: ``python daemon.py SOURCE TARGET``."""

import os
import sys
from pathlib import Path

try:
    from fusewire.daemon import main
except ModuleNotFoundError as error:
    # Started by a Python without the packages: the one of ``make venv`` has them.
    python = Path(__file__).resolve().parent / ".venv" / "bin" / "python"
    if not python.exists() or Path(sys.executable) == python:
        sys.exit(f"fusewire: the package {error.name} is missing; run make venv first")
    os.execv(python, [str(python), __file__, *sys.argv[1:]])

if __name__ == "__main__":
    raise SystemExit(main())
