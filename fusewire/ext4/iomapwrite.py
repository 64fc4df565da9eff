"""The writing half of the iomap contract: ``begin`` finds or makes room for data, ``ioend`` says that it is there.

Whoever moves the data (the kernel with fuse iomap, else ``fileio``) asks ``begin`` where it shall go, writes it there,
and then calls ``ioend``.

I1  New blocks of files that map by extents are unwritten until ``ioend``: what the device held before is never shown.
I2  A block map cannot say so, and who writes data before the transaction applies need not.  Such new blocks are
    flagged ``NEW``: who moves the data fills the rest of each with zeroes, and the batch that maps them waits until the
    data is durable (``Transaction.wrote_data``).
I3  The size of a file grows in ``ioend`` only.
"""

import errno
from typing import TYPE_CHECKING

from . import extentstore, inodestore, iomap, mapping
from .errors import Refused
from .inode import FLAG_IMMUTABLE, Inode
from .iomap import HOLE, MAPPED, UNWRITTEN, Mapping
from .transaction import CommitFirst

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .transaction import Transaction

NEW = 1 << 0        # flag: freshly allocated, and written at once: what the data does not cover must be zeroed
DIRTY = 1 << 1      # flag: the mapping is not durable yet

OP_WRITE = 1 << 0
OP_ZERO = 1 << 1
OP_OVERWRITE_ONLY = 1 << 6


def begin(tx: "Transaction", inode: Inode, pos: int, count: int, op: int = OP_WRITE, *,
          unwritten: bool = True) -> tuple[Inode, Mapping]:
    """Where bytes from ``pos`` on shall be written; holes get blocks, as many as ``count`` asks for.

    ``unwritten``: False for a caller that writes the data before the transaction applies (I2 for all files).

    Returns the inode as it is then, and a mapping that holds ``pos``: MAPPED or UNWRITTEN, or HOLE for OP_ZERO, which
    never allocates.

    Raises:
        Refused: EFBIG beyond the largest file, ENOSPC, EAGAIN for OP_OVERWRITE_ONLY where blocks are missing.
        CommitFirst, BlockMiss, Corrupt.
    """
    found = iomap.begin(tx, inode, pos, count, op)
    if op & OP_OVERWRITE_ONLY and found.type != MAPPED:
        raise Refused(errno.EAGAIN)
    if found.type != HOLE or op & OP_ZERO:
        return inode, found
    geometry = tx.geometry
    limit = min(pos + max(count, 1), tx.max_file_bytes(inode))
    first = geometry.block_of(pos)
    inode, run = mapping.allocate(tx, inode, first, geometry.blocks_for(limit) - first, unwritten=unwritten,
                                  reserve=True, appending=True)
    assert run.start is not None
    kind, flags = (UNWRITTEN, DIRTY) if run.unwritten else (MAPPED, DIRTY | NEW)
    return inode, Mapping(geometry.byte_of(run.file_block), geometry.byte_of(run.length), geometry.byte_of(run.start),
                          kind, flags)


def ioend(tx: "Transaction", inode: Inode, pos: int, written: int) -> Inode:
    """Bytes [pos, pos + written) are on the device: their blocks become written, the file as long as they reach.

    Doing it again changes nothing, and holes (blocks punched out meanwhile) stay holes.  The range is that of one I/O,
    which a transaction can always take.  Raises ``Refused(EFBIG)`` beyond the largest file.
    """
    if written <= 0:
        return inode
    if pos < 0 or pos + written > tx.max_file_bytes(inode):
        raise Refused(errno.EFBIG)
    geometry = tx.geometry
    first, end = geometry.block_of(pos), geometry.blocks_for(pos + written)
    while inode.has_extents and first < end:
        inode, first = extentstore.convert(tx, inode, first, end, unwritten=False)
    tx.wrote_data = True
    if pos + written > inode.size:
        inode = inodestore.change(tx, inode, size=pos + written)
    return inode


def tail_to_clear(fs: "Ext4", inode: Inode) -> tuple[int, int] | None:
    """(device address, bytes) of written bytes behind a file's end in its block; None if there are none to be seen.

    What stands there must be zero before the file may grow over it.  Raises ``CommitFirst`` if the cut that left it
    there is not durable: until then a crash brings the old size back, and what stood there.
    """
    size, inside = inode.size, fs.geometry.within_block(inode.size)
    if not inside or inode.is_inline:
        return None
    found = iomap.begin(fs, inode, size, 1, iomap.OP_REPORT)
    if found.type != MAPPED:
        return None
    if fs.writing is not None and fs.writing.cuts.is_open(inode.number):
        raise CommitFirst
    return found.addr + size - found.offset, fs.geometry.block_bytes - inside


def check_writable(inode: Inode) -> None:
    """Raise ``Refused(EPERM)`` for the data of an immutable file."""
    if inode.flags & FLAG_IMMUTABLE:
        raise Refused(errno.EPERM)
