"""Extent trees: from a file block to the run of device blocks that holds it.

Kernel documentation, ext4, "Extent Tree".  A node is decoded once into parallel lists and kept beside its block (the
root beside its inode); a look-up is one bisect per level.

I1  every node's entries are ascending and do not overlap, and lie within the range that the parent's index gives them
I2  every extent lies within the file system
I3  depth falls by one per level, so no tree can loop
"""

import struct
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from . import checksum, layout
from .errors import Check, Corrupt
from .inode import Inode

if TYPE_CHECKING:
    from .filesystem import Ext4

MAGIC = 0xF30A
MAX_DEPTH = 5
MAX_WRITTEN = 32768          # a length above it marks an unwritten extent of (length - 32768) blocks
READAHEAD_NODES = 32         # who reads one leaf will read the next ones
END_OF_FILE_BLOCKS = 1 << 32
_ENTRIES = struct.Struct("<IHHI")


class Run(NamedTuple):
    """File blocks that lie together on the device from ``start`` on, or a hole (``start`` is None)."""

    file_block: int
    length: int
    start: int | None
    unwritten: bool = False


class Node(NamedTuple):
    """One decoded node: ``firsts[i]`` is the first file block of entry i; a leaf has counts, starts and flags, an inner
    node the block of each child in ``starts``.  ``end`` is where the node's range ends."""

    depth: int
    firsts: list[int]
    starts: list[int]
    counts: list[int]
    unwritten: list[bool]
    end: int


def find(fs: "Ext4", inode: Inode, file_block: int) -> Run:
    """The whole extent that holds a file block, or the hole around it as far as the nodes on the way show it.

    Raises ``Corrupt`` for a node that breaks a rule, ``BlockMiss`` for one that is not in memory.
    """
    node = root_of(fs, inode)
    while node.depth:
        index = bisect_right(node.firsts, file_block) - 1
        if index < 0:
            return Run(file_block, (node.firsts[0] if node.firsts else node.end) - file_block, None)
        node = child_of(fs, inode, node, index)
    return _find_in_leaf(node, file_block)


def device_block(fs: "Ext4", inode: Inode, file_block: int) -> int | None:
    """The device block of one file block, None for a hole and what is unwritten: ``find`` for who wants no run."""
    node = inode.mapping
    if node is None or node.depth:
        run = find(fs, inode, file_block)
        return None if run.start is None or run.unwritten else run.start + file_block - run.file_block
    index = bisect_right(node.firsts, file_block) - 1
    within = file_block - node.firsts[index] if index >= 0 else 0
    if index < 0 or within >= node.counts[index] or node.unwritten[index]:
        return None
    place: int = node.starts[index] + within
    return place


def _find_in_leaf(node: Node, file_block: int) -> Run:
    index = bisect_right(node.firsts, file_block) - 1
    if index >= 0:
        first, count = node.firsts[index], node.counts[index]
        if file_block < first + count:
            return Run(first, count, node.starts[index], node.unwritten[index])
        hole_start = first + count
    else:
        hole_start = min(file_block, node.firsts[0]) if node.firsts else file_block
    hole_end = node.firsts[index + 1] if index + 1 < len(node.firsts) else node.end
    return Run(hole_start, hole_end - hole_start, None)


def root_of(fs: "Ext4", inode: Inode) -> Node:
    """The root node, in the inode's block array."""
    if inode.mapping is None:
        inode.mapping = _decode(fs, inode, inode.block, None, 0, END_OF_FILE_BLOCKS)
    root: Node = inode.mapping
    return root


def child_of(fs: "Ext4", inode: Inode, parent: Node, index: int) -> Node:
    """The node that entry ``index`` of an inner node leads to; nodes after it are read ahead."""
    first = parent.firsts[index]
    end = parent.firsts[index + 1] if index + 1 < len(parent.firsts) else parent.end
    block, depth = parent.starts[index], parent.depth - 1
    if not fs.cache.holds(block):
        fs.cache.want(parent.starts[index:index + READAHEAD_NODES])
    key = view_key(inode, depth, first, end)
    return fs.cache.view(block, key, lambda data: _decode(fs, inode, data, depth, first, end),
                         lambda data: _verify(fs, inode, data, block))


def view_key(inode: Inode, depth: int, first: int, end: int) -> tuple[object, ...]:
    """Under which a node is kept beside its block: it was checked for this inode, depth and range of file blocks."""
    return "extents", inode.number, inode.generation, depth, first, end


def _verify(fs: "Ext4", inode: Inode, data: bytes, block: int) -> None:
    if fs.has_checksums and not checksum.extent_block_ok(data, fs.seed_of(inode)):
        raise Corrupt(Check.EXTENT_CHECKSUM, inode=inode.number, block=block)


def _decode(fs: "Ext4", inode: Inode, data: bytes, depth: int | None, first: int, end: int) -> Node:
    """A node of the expected depth (None: any, for the root) whose entries lie in [first, end)."""
    magic, entries, most, found_depth, _ = layout.EXTENT_HEADER.unpack(data)
    if magic != MAGIC:
        raise Corrupt(Check.EXTENT_MAGIC, inode=inode.number, magic=f"{magic:#06x}")
    if found_depth > MAX_DEPTH or found_depth != (found_depth if depth is None else depth):
        raise Corrupt(Check.EXTENT_DEPTH, inode=inode.number, depth=found_depth, expected=depth)
    fits = (len(data) - layout.EXTENT_HEADER.size) // layout.EXTENT.size
    if entries > most or most > fits or (entries == 0 and depth is not None):
        raise Corrupt(Check.EXTENT_ENTRIES, inode=inode.number, entries=entries, max=most, fits=fits)
    rows = list(_ENTRIES.iter_unpack(data[12:12 + 12 * entries]))
    if found_depth:
        return _inner(fs, inode, rows, found_depth, first, end)
    return _leaf(fs, inode, rows, first, end)


def _inner(fs: "Ext4", inode: Inode, rows: list[tuple[int, int, int, int]], depth: int, first: int, end: int) -> Node:
    firsts, starts, least = [], [], first
    for file_block, low_low, low_high, high in rows:
        if file_block < least or file_block >= end:
            raise Corrupt(Check.EXTENT_ORDER, inode=inode.number, file_block=file_block)
        child = low_low | low_high << 16 | (high & 0xFFFF) << 32
        if not fs.geometry.first_data_block < child < fs.geometry.blocks:
            raise Corrupt(Check.EXTENT_RANGE, inode=inode.number, block=child)
        firsts.append(file_block)
        starts.append(child)
        least = file_block + 1
    return Node(depth, firsts, starts, [], [], end)


def _leaf(fs: "Ext4", inode: Inode, rows: list[tuple[int, int, int, int]], first: int, end: int) -> Node:
    firsts, starts, counts, unwritten, least = [], [], [], [], first
    low, blocks = max(fs.geometry.first_data_block, 1), fs.geometry.blocks
    for file_block, length, start_hi, start_lo in rows:
        count = length - MAX_WRITTEN if length > MAX_WRITTEN else length
        start = start_lo | start_hi << 32
        if count == 0:
            raise Corrupt(Check.EXTENT_LENGTH, inode=inode.number, file_block=file_block)
        if file_block < least or file_block + count > end:
            raise Corrupt(Check.EXTENT_ORDER, inode=inode.number, file_block=file_block, count=count)
        if start < low or start + count > blocks:
            raise Corrupt(Check.EXTENT_RANGE, inode=inode.number, block=start, count=count)
        firsts.append(file_block)
        starts.append(start)
        counts.append(count)
        unwritten.append(length > MAX_WRITTEN)
        least = file_block + count
    return Node(0, firsts, starts, counts, unwritten, end)
