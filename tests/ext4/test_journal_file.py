"""Where the journal lies: its inode's mapping, the superblock's copy of it, and inodes that cannot be a journal's."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from fusewire.ext4 import checksum, journalfile
from fusewire.ext4.errors import Check, Corrupt, Unsupported
from fusewire.ext4.filesystem import Ext4, Options
from fusewire.ext4.journalfile import Extent, JournalFile
from fusewire.ext4.superblock import Superblock
from tests.images import debugfs
from tests.journals import opened
from tests.mounting import run

LAYOUTS = {"extents": "-t ext4 -O metadata_csum,64bit", "block map": "-t ext3",
           "block map, small inodes": "-t ext3 -I 128"}


def make(path: Path, layout: str, more: str = "") -> Path:
    path.touch()
    os.truncate(path, 16 << 20)
    run("mke2fs", "-q", "-F", "-b", "1024", "-J", "size=2", *layout.split(), *more.split(), path)
    return path


def blocks_by_debugfs(path: Path) -> list[int]:
    """Where debugfs finds the blocks of inode 8, in order, without those that map others."""
    text = run("debugfs", "-R", "blocks <8>", path).stdout
    found = [int(word) for word in text.split()]
    tree = {int(word) for line in run("debugfs", "-R", "stat <8>", path).stdout.splitlines() if "IND" in line
            for part in line.split(", ") if "IND" in part for word in [part.split(":")[1]]}
    return [block for block in found if block not in tree]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_mapping_is_what_debugfs_finds(layout: str, tmp_path: Path) -> None:
    path = make(tmp_path / "image", layout)
    with opened(path) as disk:
        file = disk.file
    expected = blocks_by_debugfs(path)
    assert [file.place(block) for block in range(file.blocks)] == expected and file.blocks == 2048
    assert not file.from_backup
    outside = {0, expected[0] - 1, max(expected) + 1} - set(expected)
    assert all(map(file.owns, expected)) and not any(map(file.owns, outside))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_superblocks_copy_serves_when_the_inode_is_damaged(layout: str, tmp_path: Path) -> None:
    path = make(tmp_path / "image", layout)
    with opened(path) as disk:
        intact = disk.file
    debugfs(path, ["clri <8>"])
    with opened(path) as disk:
        assert disk.file.extents == intact.extents and disk.file.from_backup
    debugfs(path, ["ssv jnl_backup_type 0"])
    with pytest.raises(Corrupt) as refused, opened(path):
        pass
    assert refused.value.check in (Check.JOURNAL_INODE, Check.INODE_CHECKSUM)


@pytest.mark.parametrize("field, value", [
    ("mode", "040755"), ("links_count", "0"), ("size", "1047552"), ("size", "1099511627776"), ("size", "4194304"),
    ("block[0]", "0"), ("block[DIND]", "0"), ("block[1]", "600"),
])
def test_an_inode_that_cannot_be_the_journals_is_refused(field: str, value: str, tmp_path: Path) -> None:
    """Kind, links, size, holes, and blocks used twice (block 1 of the journal put where block 580 lies)."""
    path = make(tmp_path / "image", "-t ext3")
    with opened(path) as disk:
        twice = disk.file.place(580)
    debugfs(path, ["ssv jnl_backup_type 0", f"sif <8> {field} {twice if field == 'block[1]' else value}"])
    with pytest.raises(Corrupt) as refused, opened(path):
        pass
    assert refused.value.check in (Check.JOURNAL_INODE, Check.INODE_SIZE)


def test_without_a_journal_there_is_none_and_another_device_is_unsupported(tmp_path: Path) -> None:
    path = make(tmp_path / "image", "-t ext4")
    raw = bytearray(path.read_bytes()[1024:2048])
    struct.pack_into("<I", raw, 0xE0, 0)
    checksum.seal_superblock(raw)
    with pytest.raises(Unsupported, match="another device"):
        journalfile.locate(Ext4(Superblock.parse(bytes(raw), 16 << 20), options=Options(noload=True)))
    struct.pack_into("<I", raw, 0x5C, struct.unpack_from("<I", raw, 0x5C)[0] & ~4)
    checksum.seal_superblock(raw)
    assert journalfile.locate(Ext4(Superblock.parse(bytes(raw), 16 << 20), options=Options(noload=True))) is None


def test_runs_are_cut_at_the_ends_of_extents() -> None:
    file = JournalFile([Extent(0, 100, 10), Extent(10, 50, 5), Extent(15, 300, 20)])
    assert file.runs(8, 10) == [(108, 2), (50, 5), (300, 3)] and file.runs(34, 1) == [(319, 1)]
    assert file.blocks == 35 and file.owns(50) and file.owns(319) and not file.owns(320) and not file.owns(55)
    with pytest.raises(AssertionError):
        file.runs(30, 6)
