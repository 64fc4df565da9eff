"""Where the daemon's time goes under one workload: ``python -m bench.profile WORKLOAD [--lines N] [--sort KEY]``.

The daemon runs under cProfile, which makes each call slower by about a microsecond: trust the order, not the digits.
"""

from __future__ import annotations

import argparse
import os
import pstats
import sys
import tempfile
from pathlib import Path

from bench.__main__ import measure_once
from bench.images import cached
from bench.sides import SIDES
from bench.workloads import WORKLOADS
from tests.mounting import CHECKOUT, private_mounts

# Both commands of a mount run through this: only the daemon's figures are wanted.
RUNNER = """
import cProfile, sys
sys.path.insert(0, {checkout!r})
from fusewire.cli import main
profile = cProfile.Profile()
code = 1
try:
    code = profile.runcall(main)
finally:
    if "umount" not in sys.argv:
        profile.dump_stats({output!r})
raise SystemExit(code)
"""


def profiled(work_name: str, output: Path, cache: Path) -> float:
    """The figure of the workload, measured on a fusewire that writes its profile to ``output``."""
    work = next(work for work in WORKLOADS if work.name == work_name)
    with tempfile.TemporaryDirectory(prefix="fusewire-profile-") as folder:
        script = Path(folder, "run.py")
        script.write_text(RUNNER.format(checkout=str(CHECKOUT), output=str(output)))
        os.environ["FUSEWIRE"] = f"{sys.executable} {script}"
        return measure_once(work, SIDES["fusewire"], cached(work.image, cache)).value


def main() -> int:
    names = [work.name for work in WORKLOADS if work.measure and "fusewire" in work.sides]
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("workload", choices=names)
    parser.add_argument("--lines", type=int, default=40)
    parser.add_argument("--sort", default="tottime", choices=("tottime", "cumulative", "ncalls"))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fusewire-bench")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the profile for other tools")
    options = parser.parse_args()
    private_mounts()
    options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fusewire-profile-") as folder:
        output = options.keep or Path(folder, "daemon.prof")
        print(f"{options.workload}: {profiled(options.workload, output, options.cache):.4g}")
        pstats.Stats(str(output)).sort_stats(options.sort).print_stats(options.lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
