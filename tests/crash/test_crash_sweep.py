"""Power cuts at every flush and between: each image that one could leave is recovered to what was acknowledged.

FUSEWIRE_CRASH_CUTS says how many cuts in all (500 by default), FUSEWIRE_SEED repeats a run.  A failure names the
format, the seed and the cut; ``python -m tests.crash FORMAT SEED`` shows that recording alone.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.crash.bases import BASES
from tests.crash.sweep import Recording, Sweep

CUTS = int(os.environ.get("FUSEWIRE_CRASH_CUTS", "500"))
CUTS_OF_ONE = 125       # of one recording: more than it has flushes
FORMATS = [name for name in BASES if BASES[name].journal]
SEED = int(os.environ.get("FUSEWIRE_SEED", random.randrange(1 << 32)))
ROUNDS = -(-CUTS // (len(FORMATS) * CUTS_OF_ONE))


@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("name", FORMATS)
def test_every_cut_is_recovered_to_what_was_acknowledged(name: str, round_: int, mounts: None) -> None:
    seed = SEED + round_
    print(f"FUSEWIRE_SEED={SEED} (this recording: {seed})")
    recording = Recording(name, seed)
    assert len(recording.snapshots) > 1 and recording.recorder.events
    sweep = Sweep(recording, fsck=0.2, compare=0.2, kernel=0.05)
    sweep.run(-(-CUTS // (len(FORMATS) * ROUNDS)))
    assert sweep.checked["ours"] and len(sweep.states) > 1
