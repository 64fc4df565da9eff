"""Giving a file blocks and taking them away, whichever way its inode maps them."""

import errno
from typing import TYPE_CHECKING

from . import alloc, extentstore, iomap, mapstore
from .errors import Refused
from .extents import END_OF_FILE_BLOCKS, Run
from .inode import Inode

if TYPE_CHECKING:
    from .transaction import Transaction

SMALL_FILE_BYTES = 256 << 10
LEAST_AHEAD_BYTES, MOST_AHEAD_BYTES = 64 << 10, 8 << 20
CROWDED_SHARE = 16      # less than this part of the file system is free
AHEAD_SHARE = 64        # of what is free: one file may keep so much from others, and all together may not have it all
EXTENTS_AT_ONCE = 16    # extents freed in one transaction: with their bitmaps, far below the smallest journal's limit


def allocate(tx: "Transaction", inode: Inode, file_block: int, count: int, *, unwritten: bool,
             goal: int | None = None, reserve: bool = False, appending: bool = False) -> tuple[Inode, Run]:
    """Map up to ``count`` blocks of the hole at ``file_block`` to neighbouring new blocks.

    Extents can be marked unwritten; with a block map the caller must see that the blocks hold zeroes or data before
    the transaction is durable.  ``reserve``: the metadata that this needs may take blocks that are kept back for that,
    as the kernel does when data are written, and not when room is reserved.  ``appending``: at the end of a file, more
    will be asked for behind them.  Returns the inode and the run that was added.

    Raises:
        Refused: ENOSPC, EFBIG.
        CommitFirst: see ``alloc.allocate``.
    """
    hole = iomap.find(tx, inode, file_block)
    assert hole.start is None, "only holes are filled"
    room = tx.geometry.block_of(tx.max_file_bytes(inode)) - file_block
    if room < 1:
        raise Refused(errno.EFBIG)
    count = min(count, hole.file_block + hole.length - file_block, extentstore.MAX_UNWRITTEN, room)
    goal = _goal(tx, inode, hole, file_block) if goal is None else goal
    if not inode.has_extents:
        inode, room = mapstore.prepare(tx, inode, file_block, goal, reserve=reserve)
        count = min(count, room)
    ahead = _ahead(tx, file_block, count) if appending and file_block >= tx.geometry.block_of(inode.size) else 0
    found = alloc.allocate(tx, goal, count, owner=inode.number if inode.is_regular else 0, ahead=ahead)
    run = Run(file_block, found.length, found.start, unwritten and inode.has_extents)
    if inode.has_extents:
        inode = extentstore.insert(tx, extentstore.counted(tx, inode, found.length), run, reserve=reserve)
    else:
        inode = mapstore.insert(tx, inode, file_block, found.start, found.length, reserve=reserve)
    return inode, run


def _ahead(tx: "Transaction", file_block: int, count: int) -> int:
    """How many blocks to leave to a file that grows by ``count`` blocks from ``file_block`` on: as many as it has then.

    None for the first data of a small file, which often are all; and none on a disk that is almost full.
    """
    geometry = tx.geometry
    assert tx.writing is not None
    free = tx.writing.free_clusters * geometry.cluster_blocks
    if (not file_block and geometry.byte_of(count) < SMALL_FILE_BYTES) or free * CROWDED_SHARE < geometry.blocks:
        return 0
    least, most = geometry.blocks_for(LEAST_AHEAD_BYTES), geometry.blocks_for(MOST_AHEAD_BYTES)
    return min(max(file_block + count, least), most, free // AHEAD_SHARE)


def _goal(tx: "Transaction", inode: Inode, hole: Run, file_block: int) -> int:
    """Where a block in a hole should be: as far from the extent before it, or from the one behind it, as in the file;
    without any, at the start of the inode's group."""
    for neighbour in (hole.file_block - 1, hole.file_block + hole.length):
        if 0 <= neighbour < END_OF_FILE_BLOCKS:
            found = iomap.find(tx, inode, neighbour)
            if found.start is not None and found.start + file_block > found.file_block:
                return found.start + file_block - found.file_block
    return tx.geometry.first_block_of(tx.geometry.group_of_inode(inode.number)[0])


def is_empty(inode: Inode) -> bool:
    """Whether the block array of an inode that maps blocks maps none."""
    return extentstore.is_empty(inode) if inode.has_extents else not any(inode.block)


def unmap(tx: "Transaction", inode: Inode, first: int, end: int) -> tuple[Inode, bool]:
    """Free what file blocks [first, end) are mapped to, as much as one transaction should; whether all is done."""
    if inode.has_extents:
        return extentstore.unmap(tx, inode, first, end, EXTENTS_AT_ONCE)
    return mapstore.unmap(tx, inode, first, end, EXTENTS_AT_ONCE)
