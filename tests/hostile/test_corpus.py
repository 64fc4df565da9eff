"""Every image of the e2fsprogs test suite: walked by the core, and mounted and walked, with limits of time and memory.

Those that e2fsck finds clean and the kernel mounts without complaint must show what the kernel shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import require
from tests.hostile.corewalk import bounds, walk_image
from tests.hostile.corpus import FOLDER, Known, corpus, unpack
from tests.hostile.mounted import BOUNDED, survive
from tests.mount.test_differential import IGNORED, IGNORED_STATFS
from tests.mounting import kernel_mount
from tests.walk import Fields, differences, entries, statfs_fields

NAMES = sorted(corpus()) or ["missing"]
EXPECTED_IMAGES = 328
OTHERWISE = {
    "f_uninit_enable": "read-only, the kernel only logs that every group's checksum is wrong; fusewire refuses",
    "m_rootdir.g0": "mke2fs stores 1 GiB of zeros as inline data: SEEK_DATA of the kernel fails with ENOENT on it",
    "m_rootdir_acl.g0": "the same",
}


@pytest.fixture(scope="session")
def unpacked(image_cache: Path) -> Callable[[str], tuple[Known, Path]]:
    """A function from the name of an image to what is known of it and its unpacked file."""

    def open_image(name: str) -> tuple[Known, Path]:
        require([] if corpus() else [f"the corpus {FOLDER} (FUSEWIRE_CORPUS)"])
        known, path = corpus()[name], image_cache / f"{name}.img"
        if not path.exists():
            unpack(known, path)
        return known, path

    return open_image


def test_corpus_is_whole() -> None:
    require([] if corpus() else [f"the corpus {FOLDER} (FUSEWIRE_CORPUS)"])
    assert len(corpus()) >= EXPECTED_IMAGES


@pytest.mark.parametrize("name", NAMES)
def test_core(name: str, unpacked: Callable[[str], tuple[Known, Path]]) -> None:
    _, path = unpacked(name)
    with bounds(name):
        walk_image(path)


@pytest.mark.parametrize("name", NAMES)
def test_mounted(name: str, mounts: None, unpacked: Callable[[str], tuple[Known, Path]]) -> None:
    known, path = unpacked(name)
    outcome = survive(path)
    if name in OTHERWISE or not (known.fsck_clean and known.kernel_mounts and known.kernel_errors == 0):
        return
    assert not outcome.refusal, f"the kernel mounts it: {outcome.refusal}"
    found = differences(kernel_tree(path), outcome.tree, IGNORED | IGNORED_STATFS)
    assert not found, "\n".join(found[:40])


def kernel_tree(path: Path) -> list[tuple[str, Fields]]:
    """What the kernel shows of the image."""
    with kernel_mount(path, "ro,noatime,noload") as mounted:
        return [*entries(mounted.root, BOUNDED), ("statfs", statfs_fields(mounted.root))]


@pytest.mark.parametrize("name", [name for name, known in corpus().items() if known.replay] or ["missing"])
def test_journal_to_replay(name: str, mounts: None, unpacked: Callable[[str], tuple[Known, Path]]) -> None:
    """Without noload the mount is refused, for the journal or for what else is wrong."""
    _, path = unpacked(name)
    outcome = survive(path, "ro,noloop")
    assert outcome.refusal, "mounted although its journal holds more"
