"""Random data, written in every way there is, is there: see ``verifier``.

FUSEWIRE_STRESS_SECONDS says for how long in all, on every kind of file system; without it a few hundred operations
are done on some.  FUSEWIRE_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.stress.run import SHAPES
from tests.stress.verifier import verify

SECONDS = float(os.environ.get("FUSEWIRE_STRESS_SECONDS", "0")) / len(SHAPES)
SEED = int(os.environ.get("FUSEWIRE_SEED", random.randrange(1 << 30)))
OPERATIONS = 1500 if SECONDS else 250
CHOSEN = tuple(SHAPES) if SECONDS else ("ext4-1k", "ext4-4k", "ext3-1k", "no-journal")


@pytest.mark.parametrize("name", CHOSEN)
def test_random_data_are_there(name: str, mounts: None, tmp_path: Path) -> None:
    end, seed = time.monotonic() + SECONDS, SEED
    while seed == SEED or time.monotonic() < end:
        print(f"FUSEWIRE_SEED={seed}: python -m tests.stress.verifier {name} {seed} {OPERATIONS}")
        verify(name, seed, OPERATIONS, tmp_path)
        seed += 1


def test_random_data_are_there_by_kernel_ext4(mounts: None, tmp_path: Path) -> None:
    """The verifier is right about what must be there."""
    verify("ext4-1k", SEED, OPERATIONS, tmp_path, "kernel")
