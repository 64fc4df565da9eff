"""``python -m tests.crash FORMAT SEED [CUTS]``: one recording of the sweep, examined in every way (as root)."""

from __future__ import annotations

import sys

from tests.crash.sweep import Recording, Sweep
from tests.mounting import private_mounts


def main(name: str, seed: str, cuts: str = "500") -> None:
    private_mounts()
    recording = Recording(name, int(seed))
    sweep = Sweep(recording, 1.0, 1.0, 1.0)
    sweep.run(int(cuts))
    print(f"{len(recording.recorder.events)} events, {len(recording.snapshots)} batches, {sweep.checked}, "
          f"{len(sweep.states)} states; {recording.workload.done}")


main(*sys.argv[1:])
