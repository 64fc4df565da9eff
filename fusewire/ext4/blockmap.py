"""Block maps of ext2 and ext3: twelve direct pointers, then trees of one, two and three levels of pointer blocks.

Kernel documentation, ext4, "Direct/Indirect Block Addressing".  Pointers are 32 bits wide, 0 is a hole.  There is no
checksum, so each pointer is checked against the file system before it is used.
"""

import struct
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from .errors import Check, Corrupt
from .extents import Run
from .inode import Inode

if TYPE_CHECKING:
    from .filesystem import Ext4

DIRECT = 12
LEVELS = 3
READAHEAD_TABLES = 64        # who reads one table of pointers will read the next ones
_ROOT = struct.Struct("<15I")
Pointers = tuple[int, ...]


class Runs(NamedTuple):
    """A table of pointers as runs: run i begins at index ``firsts[i]`` with block ``starts[i]`` (0: a hole)."""

    firsts: list[int]
    starts: list[int]
    length: int


def find(fs: "Ext4", inode: Inode, file_block: int) -> Run:
    """The run of file blocks around ``file_block`` that one pointer block maps to neighbours, or to nothing."""
    root = _ROOT.unpack(inode.block)
    if file_block < DIRECT:
        if inode.mapping is None:
            inode.mapping = _runs_of(root[:DIRECT])
        return _run(fs, inode, inode.mapping, file_block, file_block)
    pointers = fs.geometry.block_bytes // 4
    base = DIRECT
    for level in range(1, LEVELS + 1):
        span = pointers ** level
        if file_block < base + span:
            return _descend(fs, inode, root[DIRECT + level - 1], level, base, file_block)
        base += span
    return Run(file_block, 1, None)


def _descend(fs: "Ext4", inode: Inode, block: int, level: int, base: int, file_block: int) -> Run:
    """Follow ``level`` pointer blocks from ``block``, whose tree maps the file from ``base`` on."""
    pointers = fs.geometry.block_bytes // 4
    while True:
        span = pointers ** level
        if block == 0:
            return Run(base, span, None)
        check_pointer(fs, inode, block)
        if level == 1:
            runs = fs.cache.view(block, "runs", _runs_in)
            return _run(fs, inode, runs, file_block - base, file_block)
        level -= 1
        index, within = divmod(file_block - base, pointers ** level)
        table = fs.cache.view(block, "pointers", _pointers_in)
        base, block = file_block - within, table[index]
        if block and not fs.cache.holds(block):
            fs.cache.want(pointer for pointer in table[index:index + READAHEAD_TABLES] if pointer)


def check_pointer(fs: "Ext4", inode: Inode, block: int) -> None:
    """Raise ``Corrupt(BLOCKMAP_RANGE)`` if no pointer block can be there."""
    if not fs.geometry.first_data_block < block < fs.geometry.blocks:
        raise Corrupt(Check.BLOCKMAP_RANGE, inode=inode.number, block=block)


def _pointers_in(data: bytes) -> Pointers:
    return struct.unpack(f"<{len(data) // 4}I", data)


def _runs_in(data: bytes) -> Runs:
    return _runs_of(_pointers_in(data))


def _runs_of(table: Pointers) -> Runs:
    """Neighbouring pointers joined: each one more than the one before it, or all 0."""
    firsts, starts, expected = [0], [table[0]], table[0]
    for index, pointer in enumerate(table):
        if pointer != expected:
            firsts.append(index)
            starts.append(pointer)
        expected = pointer + 1 if pointer else 0
    return Runs(firsts, starts, len(table))


def _run(fs: "Ext4", inode: Inode, runs: Runs, index: int, file_block: int) -> Run:
    """The run that covers ``index`` of a table, where ``index`` maps ``file_block``."""
    at = bisect_right(runs.firsts, index) - 1
    first, start = runs.firsts[at], runs.starts[at]
    count = (runs.firsts[at + 1] if at + 1 < len(runs.firsts) else runs.length) - first
    if start == 0:
        return Run(file_block - index + first, count, None)
    if not fs.geometry.first_data_block < start <= fs.geometry.blocks - count:
        raise Corrupt(Check.BLOCKMAP_RANGE, inode=inode.number, block=start, count=count)
    return Run(file_block - index + first, count, start)
