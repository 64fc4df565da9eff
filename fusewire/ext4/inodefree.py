"""Freeing inodes that have no name and are not in use any more, in steps that are a transaction each.

An inode stays an orphan until its last step, so whatever happens in between, recovery goes on from there.

I1  The blocks of directories and links are metadata: they are revoked as they are freed, so that no older version of
    them is replayed over what uses them next.
"""

from functools import partial
from typing import TYPE_CHECKING

from . import inodealloc, inodestore, iomap, mapping, namespace, orphan, xattrwrite
from .extents import END_OF_FILE_BLOCKS
from .inode import Inode
from .mapping import EXTENTS_AT_ONCE

if TYPE_CHECKING:
    from .transaction import Transaction

REVOKED_AT_ONCE = 2048      # blocks: their records take a few blocks of the journal


def release(tx: "Transaction", inode: Inode) -> bool:
    """Free an orphan: its blocks, as many as one transaction should, then its attributes and the inode itself.

    Returns whether that is done; if not, call it again in another transaction.  Raises ``Corrupt``, ``BlockMiss``.
    """
    assert not inode.links, "an inode with names is in use"
    if _has_blocks(tx, inode) and not mapping.is_empty(inode):
        if not inode.is_regular:
            inode, done = _cut_metadata(tx, inode)
            if not done:
                return False
        inode, done = mapping.unmap(tx, inode, 0, END_OF_FILE_BLOCKS)
        if not done:
            return False
    inode = xattrwrite.drop_all(tx, inode)
    number, is_dir = inode.number, inode.is_dir
    last = {"dtime": tx.now[0], "size": 0 if inode.is_regular else inode.size}
    if orphan.contains(tx, number):
        orphan.remove(tx, number, **last)
    else:
        inodestore.change(tx, inode, **last)
    inodealloc.free(tx, number, is_dir)
    assert tx.writing is not None
    tx.after_commit(partial(tx.writing.cuts.remove, number))
    tx.after_commit(partial(tx.writing.windows.drop, number))
    return True


def _has_blocks(tx: "Transaction", inode: Inode) -> bool:
    """Whether the block array maps blocks: of files and directories, and of links that are not stored in it."""
    return inode.is_regular or inode.is_dir or (inode.is_symlink and not namespace.is_fast_link(tx, inode))


def _cut_metadata(tx: "Transaction", inode: Inode) -> tuple[Inode, bool]:
    """Revoke and free blocks from the end of a directory or link; whether none is left up to its size."""
    end = first = tx.geometry.blocks_for(inode.size)
    runs = revoked = 0
    while first and runs < EXTENTS_AT_ONCE and revoked < REVOKED_AT_ONCE:
        run = iomap.find(tx, inode, first - 1)
        low = run.file_block
        if run.start is not None:
            low = max(low, first - (REVOKED_AT_ONCE - revoked))
            for file_block in range(low, first):
                tx.revoke(run.start + file_block - run.file_block)
            runs, revoked = runs + 1, revoked + first - low
        first = low
    inode, done = mapping.unmap(tx, inode, first, end) if first < end else (inode, True)
    if done and first < end:
        inode = inodestore.change(tx, inode, size=tx.geometry.byte_of(first))
    return inode, done and not first
