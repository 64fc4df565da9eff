"""Where the journal lies: the journal inode's mapping, flattened once, or the copy of it that the superblock keeps.

Kernel documentation, ext4, "Journal (jbd2)": the journal is a regular file, usually inode 8, all of whose blocks are
allocated.  ``jnl_blocks`` of the superblock holds its block array and size for the day that the inode cannot be read.
"""

import stat
import struct
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from . import inode, iomap
from .errors import Check, Corrupt, Unsupported
from .extents import MAGIC
from .features import Feature
from .inode import FLAG_EXTENTS, Inode
from .journalsuper import MIN_BLOCKS
from .units import FsBlock, InodeNumber

if TYPE_CHECKING:
    from .filesystem import Ext4

MAX_BLOCKS = 10_240_000     # the longest journal that mke2fs makes
MAX_RUNS = 1 << 16          # an honest journal has a handful; this bounds what a hostile one can make us hold
_BACKUP_OF_BLOCKS = 1       # jnl_backup_type
_COPY = struct.Struct("<60sII")


class Extent(NamedTuple):
    """Journal blocks that lie together on the device."""

    journal_block: int
    start: int
    length: int


class JournalFile:
    """The mapping of an internal journal: journal block ↔ block of the file system.  Immutable."""

    def __init__(self, extents: list[Extent], from_backup: bool = False) -> None:
        self.extents = tuple(extents)
        self.blocks = sum(extent.length for extent in extents)
        self.from_backup = from_backup  # the journal inode is damaged, the superblock's copy of its mapping is in use
        self._firsts = [extent.journal_block for extent in extents]
        by_place = sorted(extents, key=lambda extent: extent.start)
        self._starts = [extent.start for extent in by_place]
        self._ends = [extent.start + extent.length for extent in by_place]

    def place(self, journal_block: int) -> FsBlock:
        """Where a journal block lies; it must be one of the journal's."""
        return self.runs(journal_block, 1)[0][0]

    def runs(self, journal_block: int, count: int) -> list[tuple[FsBlock, int]]:
        """Where ``count`` journal blocks lie, as runs of (first block, count) in journal order."""
        assert journal_block >= 0 and journal_block + count <= self.blocks
        found, at = [], bisect_right(self._firsts, journal_block) - 1
        while count:
            extent = self.extents[at]
            skip = journal_block - extent.journal_block
            length = min(count, extent.length - skip)
            found.append((FsBlock(extent.start + skip), length))
            journal_block, count, at = journal_block + length, count - length, at + 1
        return found

    def owns(self, block: int) -> bool:
        """Whether a block of the file system belongs to the journal."""
        at = bisect_right(self._starts, block) - 1
        return at >= 0 and block < self._ends[at]


def locate(fs: "Ext4") -> JournalFile | None:
    """The journal's mapping; None without a journal.

    The inode is asked first; if it is damaged, the superblock's copy.

    Raises:
        Unsupported: the journal is on another device.
        Corrupt: both are damaged (the error is the inode's).
        BlockMiss: for the blocks that map it.
    """
    superblock = fs.superblock
    if Feature.HAS_JOURNAL not in superblock.features:
        return None
    number = superblock.fields["journal_inum"]
    if not number:
        raise Unsupported("unsupported: the journal is on another device")
    try:
        return JournalFile(_flatten(fs, _checked(fs, number, inode.load(fs, number))))
    except Corrupt as damage:
        copy = _backup(fs, number)
        if copy is None:
            raise
        try:
            return JournalFile(_flatten(fs, _checked(fs, number, copy)), from_backup=True)
        except Corrupt:
            raise damage from None


def _checked(fs: "Ext4", number: int, found: Inode) -> Inode:
    blocks = fs.geometry.block_of(found.size)
    if not found.is_regular or not found.links or found.is_inline or found.is_encrypted:
        raise Corrupt(Check.JOURNAL_INODE, inode=number, mode=f"{found.mode:#o}", links=found.links)
    if not MIN_BLOCKS <= blocks <= min(MAX_BLOCKS, fs.geometry.blocks):
        raise Corrupt(Check.JOURNAL_INODE, inode=number, size=found.size)
    return found


def _flatten(fs: "Ext4", found: Inode) -> list[Extent]:
    """All blocks of the journal as extents, neighbours joined; it may have no hole."""
    extents: list[Extent] = []
    at, blocks = 0, fs.geometry.block_of(found.size)
    while at < blocks:
        run = iomap.find(fs, found, at)
        if run.start is None or run.unwritten or len(extents) >= MAX_RUNS:
            raise Corrupt(Check.JOURNAL_INODE, inode=found.number, journal_block=at)
        start, length = run.start + at - run.file_block, min(run.file_block + run.length, blocks) - at
        if extents and extents[-1].start + extents[-1].length == start:
            extents[-1] = extents[-1]._replace(length=extents[-1].length + length)
        else:
            extents.append(Extent(at, start, length))
        at += length
    _refuse_overlap(found, extents)
    return extents


def _refuse_overlap(found: Inode, extents: list[Extent]) -> None:
    end = 0
    for extent in sorted(extents, key=lambda extent: extent.start):
        if extent.start < end:
            raise Corrupt(Check.JOURNAL_INODE, inode=found.number, block=extent.start)
        end = extent.start + extent.length


def _backup(fs: "Ext4", number: int) -> Inode | None:
    """An inode made from the superblock's copy of the journal inode's block array and size, if it keeps one."""
    fields = fs.superblock.fields
    if fields["jnl_backup_type"] != _BACKUP_OF_BLOCKS:
        return None
    block, size_high, size_low = _COPY.unpack(fields["jnl_blocks"])
    copy = Inode()
    copy.number, copy.raw, copy.block = InodeNumber(number), b"", block
    copy.mode, copy.kind, copy.links, copy.generation = stat.S_IFREG | 0o600, stat.S_IFREG, 1, 0
    copy.size = size_low | size_high << 32
    copy.flags = FLAG_EXTENTS if int.from_bytes(block[:2], "little") == MAGIC else 0
    copy.mapping = copy.memo = copy.attributes = None
    return copy
