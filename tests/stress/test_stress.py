"""Four processes on one mount at once, with sync, remounts and a full disk; threads that share files.

FUSEWIRE_STRESS_SECONDS says for how long in all (6 by default; only then every kind of file system has its turn),
FUSEWIRE_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.stress.run import SHAPES, WORKERS, stress
from tests.stress.together import together

SECONDS = float(os.environ.get("FUSEWIRE_STRESS_SECONDS", "0"))
SEED = int(os.environ.get("FUSEWIRE_SEED", random.randrange(1 << 30)))
SHORT = ("ext4-1k", "ext3-4k")
SHORT_SECONDS = 3
CHOSEN = tuple(SHAPES) if SECONDS else SHORT


@pytest.mark.parametrize("name", CHOSEN)
def test_mixed_stress(name: str, mounts: None, tmp_path: Path) -> None:
    print(f"FUSEWIRE_SEED={SEED}: python -m tests.stress.run {name} {SEED} 60")
    done = stress(name, SEED, SECONDS / len(SHAPES) or SHORT_SECONDS, tmp_path)
    assert done["mounts"] and done["calls"] >= WORKERS, done


@pytest.mark.parametrize("name", SHAPES if SECONDS else ["ext4-1k"])
def test_threads_write_to_one_file(name: str, mounts: None, tmp_path: Path) -> None:
    operations = 3000 if SECONDS else 200
    print(f"FUSEWIRE_SEED={SEED}: python -m tests.stress.together {name} {SEED} {operations}")
    together(name, SEED, operations, tmp_path)
