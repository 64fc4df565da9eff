"""Every image of the e2fsprogs test suite: walked by the core, and mounted and walked, with limits of time and memory.

Those that e2fsck finds clean and the kernel mounts without complaint must show what the kernel shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.corewalk import bounds, walk_image
from tests.hostile.corpus import FOLDER, Ahead, corpus, unpack
from tests.hostile.mounted import BOUNDED, Outcome, survive
from tests.mount.test_differential import IGNORED, IGNORED_STATFS
from tests.mounting import kernel_mount, run
from tests.walk import Fields, differences, entries, statfs_fields

NAMES = sorted(corpus()) or ["missing"]
EXPECTED_IMAGES = 328
OTHERWISE = {
    "f_uninit_enable": "read-only, the kernel only logs that every group's checksum is wrong; fusewire refuses",
    "m_rootdir.g0": "mke2fs stores 1 GiB of zeros as inline data: SEEK_DATA of the kernel fails with ENOENT on it",
    "m_rootdir_acl.g0": "the same",
}


def need_corpus() -> None:
    """Skip what needs the corpus where there is none beside the checkout; fail if its place was named, and is empty."""
    if corpus():
        return
    if "FUSEWIRE_CORPUS" in os.environ:
        pytest.fail(f"no images in {FOLDER}", pytrace=False)
    pytest.skip(f"needs the corpus {FOLDER}, which is not part of the project (FUSEWIRE_CORPUS names its place)")


@pytest.fixture(scope="session")
def unpacked(image_cache: Path) -> Iterator[Callable[[str], Path]]:
    """A function from the name of an image to its unpacked file, which is for reading only."""
    need_corpus()

    def open_image(name: str) -> Path:
        path = image_cache / f"{name}.img"
        unpack(corpus()[name], path)
        return path

    ahead = Ahead(open_image, NAMES)
    yield ahead
    ahead.close()


@pytest.fixture(scope="session")
def survived(mounts: None, unpacked: Callable[[str], Path]) -> Iterator[Callable[[str], Outcome]]:
    """A function from the name of an image to how mounting and walking it went."""
    ahead = Ahead(lambda name: survive(unpacked(name)), NAMES)
    yield ahead
    ahead.close()


def test_corpus_is_whole() -> None:
    need_corpus()
    assert len(corpus()) >= EXPECTED_IMAGES


@pytest.mark.parametrize("name", NAMES)
def test_core(name: str, unpacked: Callable[[str], Path]) -> None:
    path = unpacked(name)
    with bounds(name):
        walk_image(path)


@pytest.mark.parametrize("name", NAMES)
def test_mounted(name: str, unpacked: Callable[[str], Path], survived: Callable[[str], Outcome]) -> None:
    known, outcome = corpus()[name], survived(name)
    if name in OTHERWISE or not (known.fsck_clean and known.kernel_mounts and known.kernel_errors == 0):
        return
    assert not outcome.refusal, f"the kernel mounts it: {outcome.refusal}"
    found = differences(kernel_tree(unpacked(name)), outcome.tree, IGNORED | IGNORED_STATFS)
    assert not found, "\n".join(found[:40])


def kernel_tree(path: Path, options: str = "ro,noatime,noload", writable: bool = False) -> list[tuple[str, Fields]]:
    """What the kernel shows of the image."""
    with kernel_mount(path, options, writable) as mounted:
        return [*entries(mounted.root, BOUNDED), ("statfs", statfs_fields(mounted.root))]


@pytest.mark.parametrize("name", [name for name, known in corpus().items() if known.replay] or ["missing"])
def test_journal_to_replay(name: str, mounts: None, unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    """Without noload the mount is refused, or shows what the kernel shows once it has replayed the journal."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for copy in (ours, theirs):
        run("cp", "--sparse=always", unpacked(name), copy)
    outcome = survive(theirs, "ro,noatime,noloop")
    if outcome.refusal or not corpus()[name].kernel_mounts:
        return
    found = differences(kernel_tree(ours, "ro,noatime", writable=True), outcome.tree, IGNORED | IGNORED_STATFS)
    assert not found, "\n".join(found[:40])
