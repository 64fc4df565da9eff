#!/usr/bin/env python3
"""Run the daemon from a checkout: ``python daemon.py SOURCE TARGET``."""

from fusewire.daemon import main

if __name__ == "__main__":
    raise SystemExit(main())
