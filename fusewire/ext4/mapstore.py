"""Changing block maps of ext2 and ext3: entering pointers, growing the trees, clearing them again.

Kernel documentation, ext4, "Direct/Indirect Block Addressing".  A pointer block is freed when its last pointer goes.
"""

import errno
import struct
from typing import TYPE_CHECKING

from . import alloc, blockmap, inodestore
from .blockmap import DIRECT, LEVELS
from .errors import Refused
from .extentstore import counted
from .inode import Inode

if TYPE_CHECKING:
    from .transaction import Transaction

POINTER_LIMIT = 1 << 32
_POINTER = struct.Struct("<I")
_ROOT = struct.Struct("<15I")


def prepare(tx: "Transaction", inode: Inode, file_block: int, goal: int, *, reserve: bool = False) -> tuple[Inode, int]:
    """Create the pointer blocks that lead to a file block, near ``goal``; how many pointers the last of them holds from
    that file block on.  They come first, so that the data get what is left on a disk that is almost full.

    ``reserve`` is what ``alloc.allocate`` is told for them.  Raises ``Refused``: EFBIG, ENOSPC.
    """
    way, grown = indexes(tx, file_block), 0
    array = bytearray(inode.block)
    holder, at = None, way[0]
    for index in way[1:]:
        data = array if holder is None else tx.cache.entry(holder).data
        below = _POINTER.unpack_from(data, at * 4)[0]
        if not below:
            below = alloc.allocate(tx, goal, 1, reserve=reserve).start
            if below >= POINTER_LIMIT:
                raise Refused(errno.ENOSPC)
            tx.create(below)
            grown += 1
            _POINTER.pack_into(array if holder is None else tx.edit(holder), at * 4, below)
        blockmap.check_pointer(tx, inode, below)
        holder, at = below, index
    if bytes(array) != inode.block:
        inode = inodestore.change(tx, inode, block=bytes(array))
    return counted(tx, inode, grown), (DIRECT if holder is None else tx.geometry.block_bytes // 4) - at


def insert(tx: "Transaction", inode: Inode, file_block: int, start: int, count: int, *,
           reserve: bool = False) -> Inode:
    """Map ``count`` file blocks, all holes, to the device blocks from ``start`` on.

    Raises ``Refused`` as ``prepare``; ENOSPC also for device blocks that 32 bits cannot name.
    """
    if start + count > POINTER_LIMIT:
        raise Refused(errno.ENOSPC)
    while count:
        inode, room = prepare(tx, inode, file_block, start, reserve=reserve)
        part = min(count, room)
        inode = _point(tx, inode, file_block, range(start, start + part))
        file_block, start, count = file_block + part, start + part, count - part
    return inode


def _point(tx: "Transaction", inode: Inode, file_block: int, targets: range) -> Inode:
    """Set neighbouring pointers, all in one pointer block that is there, or in the inode."""
    *above, at = indexes(tx, file_block)
    words = struct.pack(f"<{len(targets)}I", *targets)
    array, holder = bytearray(inode.block), 0
    for index in above:
        holder = _POINTER.unpack_from(tx.cache.entry(holder).data if holder else array, index * 4)[0]
    data = tx.edit(holder) if holder else array
    data[at * 4:at * 4 + len(words)] = words
    if not holder:
        inode = inodestore.change(tx, inode, block=bytes(array))
    return counted(tx, inode, len(targets))


def unmap(tx: "Transaction", inode: Inode, first: int, end: int, budget: int) -> tuple[Inode, bool]:
    """Free the blocks of file blocks [first, end), from the end on, about ``budget`` runs in this transaction.

    Returns the inode and whether all is done.
    """
    end = min(end, largest(tx))
    while budget > 0 and end > first:
        run = blockmap.find(tx, inode, end - 1)
        low = max(first, run.file_block)
        if run.start is not None:
            low = max(low, end - tx.geometry.block_bytes // 4)
            alloc.free(tx, run.start + low - run.file_block, end - low)
            inode = _clear(tx, inode, low, end)
            budget -= 1
        end = low
    return inode, end <= first


def largest(tx: "Transaction") -> int:
    """How many file blocks a block map can map."""
    pointers = tx.geometry.block_bytes // 4
    return DIRECT + pointers + pointers ** 2 + pointers ** 3


def indexes(tx: "Transaction", file_block: int) -> list[int]:
    """The way to a file block: an index into the inode's block array, then one into each pointer block."""
    if file_block < DIRECT:
        return [file_block]
    pointers, rest = tx.geometry.block_bytes // 4, file_block - DIRECT
    for level in range(1, LEVELS + 1):
        if rest < pointers ** level:
            return [DIRECT + level - 1, *(rest // pointers ** power % pointers for power in range(level - 1, -1, -1))]
        rest -= pointers ** level
    raise Refused(errno.EFBIG)


def _clear(tx: "Transaction", inode: Inode, low: int, end: int) -> Inode:
    """Clear the pointers of file blocks [low, end), which one pointer block (or the inode) holds; free what empties."""
    freed = end - low
    way = indexes(tx, low)
    holders: list[int] = []
    array = bytearray(inode.block)
    for depth in range(len(way) - 1):
        data = array if depth == 0 else tx.cache.entry(holders[-1]).data
        holders.append(_POINTER.unpack_from(data, way[depth] * 4)[0])
    data = tx.edit(holders[-1]) if holders else array
    data[way[-1] * 4:(way[-1] + freed) * 4] = bytes(freed * 4)
    while holders and tx.cache.entry(holders[-1]).data == bytes(tx.geometry.block_bytes):
        alloc.free(tx, holders.pop(), 1, metadata=True)
        freed += 1
        _POINTER.pack_into(tx.edit(holders[-1]) if holders else array, way[len(holders)] * 4, 0)
    if bytes(array) != inode.block:
        inode = inodestore.change(tx, inode, block=bytes(array))
    return counted(tx, inode, -freed)
