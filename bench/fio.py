"""Direct input and output at random places, many at a time, by fio."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from bench.workload import Sample, timed
from tests.mounting import Mount

SECONDS = 3


def random_direct(mounted: Mount, file: Path, kind: str) -> Sample:
    """``read`` or ``write`` of 4 KiB with O_DIRECT, 16 at a time [operations per second]."""
    command = ["fio", "--name=direct", f"--filename={file}", f"--rw=rand{kind}", "--bs=4k", "--direct=1"]
    command += ["--ioengine=libaio", "--iodepth=16", "--time_based", f"--runtime={SECONDS}", "--randseed=1"]
    command += ["--output-format=json", *(["--readonly"] if kind == "read" else [])]
    output = ""

    def run() -> None:
        nonlocal output
        output = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/tmp").stdout

    timing = timed(mounted, 1, run)
    figures = json.loads(output[output.index("{") :])["jobs"][0][kind]
    each = None if timing.cpu is None else timing.cpu / figures["total_ios"] * 1e6
    return Sample(float(figures["iops"]), each)
