"""Random operations on kernel ext4 and on fusewire at once, and the sequences that once told them apart.

FUSEWIRE_SEED replays a run.  FUSEWIRE_LONG=1 runs every kind of file system with long sequences of several seeds.
``python -m tests.model.run CONFIG SEED LENGTH --shrink`` finds the shortest sequence that fails.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.model import regressions
from tests.model.configs import CONFIGS, FULL
from tests.model.run import Difference, run, sequence

LONG = bool(os.environ.get("FUSEWIRE_LONG"))
SEED = int(os.environ.get("FUSEWIRE_SEED", "0")) or (random.randrange(1 << 30) if LONG else 20240229)
LENGTH = 1000 if LONG else 150
SEEDS = 5 if LONG else 1
USUAL = ("4k-mixed", "2k-mixed", "1k-data", "ext3-mixed", "ext3-1k-data", "no-csum-names", "orphan-file-mixed",
         "no-journal-mixed", "inode-128-attributes", "ext2-mixed", "4k-attributes", "4k-names",
         "small-cache", "no-loop")


def judge(name: str, seed: int) -> None:
    print(f"FUSEWIRE_SEED={seed}: python -m tests.model.run {name} {seed} {LENGTH} --shrink")
    try:
        run(CONFIGS[name], sequence(CONFIGS[name], seed, LENGTH))
    except Difference as difference:
        pytest.fail(str(difference), pytrace=False)


@pytest.mark.parametrize("offset", range(SEEDS))
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(FULL)) if LONG else USUAL)
def test_same_answers_and_trees(name: str, offset: int, mounts: None) -> None:
    judge(name, SEED + offset)


@pytest.mark.parametrize("offset", range(SEEDS))
@pytest.mark.parametrize("name", FULL if LONG else ("full-4k", "full-2k", "full-inodes"))
def test_same_answers_on_full_disks(name: str, offset: int, mounts: None) -> None:
    judge(name, SEED + offset)


@pytest.mark.parametrize("name", regressions.SEQUENCES)
def test_once_different(name: str, mounts: None) -> None:
    config, operations = regressions.SEQUENCES[name]
    run(CONFIGS[config], operations)
