"""Power cuts and kills of the daemon while threads use its mount: what fsync acknowledged is there, in every recovery.

FUSEWIRE_CRASH_CUTS and FUSEWIRE_SEED as in ``test_crash_sweep``; these cuts come on top of those.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.crash.bases import BASES
from tests.crash.mounted import MountedRecording, MountedSweep

CUTS = int(os.environ.get("FUSEWIRE_CRASH_CUTS", "0"))
CUTS_OF_ONE = 125
SHORT_CUTS = 25
FORMATS = [name for name in BASES if BASES[name].journal] if CUTS else ["v3-64", "v3-4k", "ext3"]
SEED = int(os.environ.get("FUSEWIRE_SEED", random.randrange(1 << 32)))
ROUNDS = -(-CUTS // (len(FORMATS) * CUTS_OF_ONE)) or 1


@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_mount_acknowledged_is_recovered(name: str, round_: int, mounts: None) -> None:
    seed = SEED + round_
    print(f"FUSEWIRE_SEED={SEED}: python -m tests.crash.mounted {name} {seed} {CUTS_OF_ONE}")
    sweep = MountedSweep(MountedRecording(name, seed), fsck=0.2, compare=0.2, kernel=0.05)
    sweep.run(CUTS_OF_ONE if CUTS else SHORT_CUTS)
    assert sweep.states or sweep.recording.killed
