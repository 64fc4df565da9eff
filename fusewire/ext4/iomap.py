"""Byte ranges of a file ↔ mappings on the device: the one contract by which file data moves.

``begin`` answers which device bytes hold a range of a file.  On a kernel with fuse iomap the kernel asks and moves the
data itself; elsewhere ``fileio`` asks and moves it.  Types and operation flags have the meaning and the values of the
fuse iomap interface (generations G6 and G7); ``end`` and ``ioend`` come with writing.
"""

import errno
from typing import TYPE_CHECKING, NamedTuple

from . import blockmap, extents, inlinedata
from .blocks import BlockMiss
from .errors import Refused
from .inode import Inode

if TYPE_CHECKING:
    from .extents import Run
    from .filesystem import Ext4


HOLE = 0            # no space; reads give zeroes
MAPPED = 2          # written bytes at ``addr``
UNWRITTEN = 3       # allocated, reads give zeroes
INLINE = 4          # the bytes live in metadata: ``inlinedata``

NULL_ADDR = (1 << 64) - 1

OP_REPORT = 1 << 2

SEEK_STEPS = 1 << 16  # mappings that one seek looks at (0.2 s); after that it calls the rest data, as it always may

MERGED = 1 << 3     # flag: joined from several records on disk


class Mapping(NamedTuple):
    """Where file bytes [offset, offset + length) are: ``addr`` is a byte address on the device, or NULL_ADDR."""

    offset: int
    length: int
    addr: int
    type: int
    flags: int = 0


def begin(fs: "Ext4", inode: Inode, pos: int, count: int, op: int = 0) -> Mapping:
    """The mapping around byte ``pos``, as long as it is known: it may begin before ``pos`` and end after ``count``.

    Args:
        pos, count: the bytes wanted; ``count`` is a hint.
        op: OP_* flags, 0 for reading.

    Raises:
        Refused: EFBIG beyond the largest file, ENOKEY for the data of an encrypted file.
        Corrupt, BlockMiss: from the tree that maps the file.
    """
    if pos < 0 or pos >= fs.max_file_bytes(inode):
        raise Refused(errno.EFBIG)
    if inode.is_encrypted and inode.is_regular and not op & OP_REPORT:
        raise Refused(errno.ENOKEY)
    if inode.is_inline:
        return _inline(fs, pos, count)
    run = find(fs, inode, fs.geometry.block_of(pos))
    return _mapping(fs, inode, run, pos + max(count, 1))


def find(fs: "Ext4", inode: Inode, file_block: int) -> "Run":
    """The run of blocks around a file block, whichever way the inode maps its blocks."""
    if inode.has_extents:
        return extents.find(fs, inode, file_block)
    return blockmap.find(fs, inode, file_block)


def _mapping(fs: "Ext4", inode: Inode, run: "Run", end: int) -> Mapping:
    byte_of = fs.geometry.byte_of
    flags = 0 if inode.has_extents else MERGED
    if run.start is None:
        known_end = max(end, inode.size)
        length = min(run.length, max(fs.geometry.blocks_for(known_end) - run.file_block, 1))
        return Mapping(byte_of(run.file_block), byte_of(length), NULL_ADDR, HOLE, flags)
    kind = UNWRITTEN if run.unwritten else MAPPED
    return Mapping(byte_of(run.file_block), byte_of(run.length), byte_of(run.start), kind, flags)


def _inline(fs: "Ext4", pos: int, count: int) -> Mapping:
    block_bytes = fs.geometry.block_bytes
    if pos < block_bytes:
        return Mapping(0, block_bytes, NULL_ADDR, INLINE)
    first = fs.geometry.block_of(pos)
    length = max(fs.geometry.blocks_for(pos + count) - first, 1)
    return Mapping(fs.geometry.byte_of(first), fs.geometry.byte_of(length), NULL_ADDR, HOLE)


def seek(fs: "Ext4", inode: Inode, offset: int, data: bool) -> int:
    """lseek(2) with SEEK_DATA (``data``) or SEEK_HOLE: the next byte at or after ``offset`` that is of that kind.

    The end of the file counts as a hole.  Unwritten extents count as holes: they hold nothing that was written.

    Raises ``Refused(ENXIO)`` at or beyond the end of the file, or if no data follows.
    """
    if offset < 0 or offset >= inode.size:
        raise Refused(errno.ENXIO)
    if inode.is_inline:
        return offset if data else inode.size
    search = ("seek", inode.raw, inode.number, offset, data)
    offset, steps = fs.scans.pop(search, (offset, 0))
    try:
        while steps < SEEK_STEPS and offset < inode.size:
            mapping = begin(fs, inode, offset, inode.size - offset, OP_REPORT)
            if (mapping.type == MAPPED) == data:
                return offset
            offset, steps = mapping.offset + mapping.length, steps + 1
    except BlockMiss:
        fs.remember(search, (offset, steps))
        raise
    if data and offset >= inode.size:
        raise Refused(errno.ENXIO)
    return offset if data else inode.size


def inline_data(fs: "Ext4", inode: Inode) -> bytes:
    """The content of an inode that stores it inline, as long as its size says."""
    return inlinedata.read(fs, inode)
