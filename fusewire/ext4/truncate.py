"""Changing a file's size, reserving room in it, and punching holes: in steps, a transaction each.

Every step leaves a consistent file and can be run again: an operation that had to wait for blocks starts over and
finds what is done already done.  A file that is being cut is an orphan meanwhile, so that recovery finishes the cut.

    set_size ─▶ shrink, until all is free ─▶ … the cut is durable ─▶ zeroes behind the end in its block ─▶ cleared

I1  What a cut leaves in the last block of a file is zeroed, but only when the cut is durable (``batch.Cuts``): a crash
    before that brings the old size back, with what stood there.  Until it is done the file stays an orphan.
I2  A file grows over such a block only after that: ``iomapwrite.tail_to_clear``.
"""

import errno
from functools import partial
from typing import TYPE_CHECKING

from . import extentstore, inodestore, iomap, mapping, orphan
from .batch import Writing
from .errors import Refused
from .extents import END_OF_FILE_BLOCKS
from .inode import Inode

if TYPE_CHECKING:
    from .transaction import Transaction

RUNS_AT_ONCE = 4096     # looked at for a hole: 10 ms


def set_size(tx: "Transaction", inode: Inode, size: int) -> Inode:
    """Store a new size in bytes.  If the file shrinks it becomes an orphan; ``shrink``, in a transaction of its own,
    then frees what lies behind.

    Raises ``Refused(EFBIG)`` beyond the largest file.
    """
    if size > tx.max_file_bytes(inode):
        raise Refused(errno.EFBIG)
    if size < inode.size:
        tx.after_commit(partial(_writing(tx).windows.drop, inode.number))
        if inode.links:
            inode = orphan.add(tx, inode.number)
        if inode.is_regular:
            tx.after_commit(partial(_note_cut, _writing(tx), inode.number, bool(tx.geometry.within_block(size))))
    return inodestore.change(tx, inode, size=size, version=inode.version + (size != inode.size))


def _note_cut(writing: Writing, number: int, within_block: bool) -> None:
    writing.cuts.add(number, writing.batch.number, within_block)


def _writing(tx: "Transaction") -> Writing:
    assert tx.writing is not None
    return tx.writing


def shrink(tx: "Transaction", inode: Inode) -> tuple[Inode, bool]:
    """Free blocks behind the end of a file, as many as one transaction should; whether all are free."""
    inode, done = mapping.unmap(tx, inode, tx.geometry.blocks_for(inode.size), END_OF_FILE_BLOCKS)
    cuts = _writing(tx).cuts
    if done:
        tx.after_commit(partial(cuts.finish, inode.number))
        if inode.number not in cuts:
            inode = _whole(tx, inode)
    return inode, done


def cleared(tx: "Transaction", inode: Inode) -> None:
    """What stood behind the end of a cut file, in its last block, is zero on the device."""
    tx.wrote_data = True
    if not _writing(tx).cuts.is_unfinished(inode.number):   # it was cut again: who does that, ends it
        _whole(tx, inode)


def _whole(tx: "Transaction", inode: Inode) -> Inode:
    """The file as one that nothing is to be cut off any more."""
    if inode.links and orphan.contains(tx, inode.number):
        orphan.remove(tx, inode.number)
    return tx.inode(inode.number)


def reserve(tx: "Transaction", inode: Inode, pos: int, length: int) -> tuple[Inode, int]:
    """Allocate unwritten blocks for one hole of bytes [pos, pos + length): up to which byte there is room then.

    Raises ``Refused``: EOPNOTSUPP for files without extents, ENOSPC, EFBIG.
    """
    check_reservable(tx, inode, pos, length)
    inode = _whole(tx, inode)   # what recovery would cut from an orphan is room that was promised from now on
    geometry, end = tx.geometry, pos + length
    at, last = geometry.block_of(pos), geometry.blocks_for(end)
    for _ in range(RUNS_AT_ONCE):
        if at >= last:
            break
        run = iomap.find(tx, inode, at)
        if run.start is None:
            inode, run = mapping.allocate(tx, inode, at, last - at, unwritten=True)
            return inode, min(geometry.byte_of(run.file_block + run.length), end)
        at = run.file_block + run.length
    return inode, min(geometry.byte_of(at), end)


def check_reservable(tx: "Transaction", inode: Inode, pos: int, length: int) -> None:
    """Raise ``Refused`` where ``reserve`` will for sure: EOPNOTSUPP for files without extents, EFBIG."""
    if not inode.has_extents:
        raise Refused(errno.EOPNOTSUPP)
    if pos + length > tx.max_file_bytes(inode):
        raise Refused(errno.EFBIG)


def punch(tx: "Transaction", inode: Inode, pos: int, length: int) -> tuple[Inode, bool]:
    """Free the whole blocks inside bytes [pos, pos + length), in one transaction's share; whether all are free.

    The parts of blocks at both ends are not touched: who moves the data writes zeroes there.
    """
    first, end = tx.geometry.blocks_for(pos), tx.geometry.block_of(pos + length)
    return mapping.unmap(tx, inode, first, end) if first < end else (inode, True)


def make_unwritten(tx: "Transaction", inode: Inode, pos: int, length: int) -> tuple[Inode, int]:
    """Make the whole blocks inside bytes [pos, pos + length) read as zeroes without freeing them, in one transaction's
    share: up to which byte that is done.  Raises ``Refused`` as ``check_reservable``."""
    check_reservable(tx, inode, pos, length)
    first, end = tx.geometry.blocks_for(pos), tx.geometry.block_of(pos + length)
    inode, done = extentstore.convert(tx, inode, first, end, unwritten=True)
    return inode, tx.geometry.byte_of(done) if done < end else pos + length
