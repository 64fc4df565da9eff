"""Seeded damage to small images, mounted and walked: few in CI, since each is a mount; the core sees many more.

``FUSEWIRE_FUZZ_MOUNTS`` sets how many of each base, ``FUSEWIRE_SEED`` where the seeds begin.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hostile.bases import BASES
from tests.hostile.mounted import survive
from tests.hostile.mutate import Mutator
from tests.images import make_cached

ROUNDS = int(os.environ.get("FUSEWIRE_FUZZ_MOUNTS", "8"))
FIRST_SEED = int(os.environ.get("FUSEWIRE_SEED", "1"))


@pytest.mark.parametrize("name", BASES)
def test_damaged_images(name: str, mounts: None, image_cache: Path, tmp_path: Path) -> None:
    mutator = Mutator(make_cached(BASES[name], image_cache).read_bytes())
    print(f"FUSEWIRE_SEED={FIRST_SEED} FUSEWIRE_FUZZ_MOUNTS={ROUNDS}")
    path = tmp_path / "image"
    for seed in range(FIRST_SEED, FIRST_SEED + ROUNDS):
        image, text = mutator.damaged(seed)
        path.write_bytes(image)
        try:
            survive(path)
        except Exception as error:
            raise AssertionError(f"{name}, {text}") from error
