"""Seeded damage to small images, read by the core: every error is an `Ext4Error`, every walk ends, memory stays small.

``FUSEWIRE_FUZZ`` sets how many damaged images of each base are tried, ``FUSEWIRE_SEED`` where the seeds begin; a
failure names its seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.bases import BASES
from tests.hostile.corewalk import bounds, walk_image
from tests.hostile.mutate import Mutator
from tests.images import make_cached

ROUNDS = int(os.environ.get("FUSEWIRE_FUZZ", "150"))
FIRST_SEED = int(os.environ.get("FUSEWIRE_SEED", "1"))


@pytest.fixture(scope="session")
def base_of(mounts: None, image_cache: Path) -> Callable[[str], Path]:
    """A function from the name of a base to its image."""
    return lambda name: make_cached(BASES[name], image_cache)


@pytest.mark.parametrize("name", BASES)
def test_base_is_sound(name: str, base_of: Callable[[str], Path]) -> None:
    """Undamaged, nothing but the answers to absent names and attributes comes back."""
    quiet = ("ENOENT", "ENODATA", "ENXIO", "ENAMETOOLONG")
    assert [text for text in walk_image(base_of(name)) if not any(answer in text for answer in quiet)] == []


@pytest.mark.parametrize("name", BASES)
def test_damaged_images(name: str, base_of: Callable[[str], Path]) -> None:
    mutator = Mutator(base_of(name).read_bytes())
    print(f"FUSEWIRE_SEED={FIRST_SEED} FUSEWIRE_FUZZ={ROUNDS}")
    for seed in range(FIRST_SEED, FIRST_SEED + ROUNDS):
        image, text = mutator.damaged(seed)
        try:
            with bounds(text):
                walk_image(image)
        except Exception as error:
            raise AssertionError(f"{name}, {text}") from error


@pytest.mark.parametrize("name", BASES)
def test_truncated_images(name: str, base_of: Callable[[str], Path]) -> None:
    """An image cut at any place is refused or read as far as it goes."""
    whole = base_of(name).read_bytes()
    cuts = [0, 1, 512, 1023, 1024, 1025, 1500, 2047, 2048, 3000, *(len(whole) * part // 16 for part in range(1, 16))]
    for cut in cuts:
        with bounds(f"{name} cut at {cut}"):
            outcome = walk_image(whole[:cut])
        assert outcome, f"{name} cut at {cut} was read as if it were whole"
