"""Freeing inodes that have no name and are not in use any more, in steps that are a transaction each.

An inode stays an orphan until its last step, so whatever happens in between, recovery goes on from there.
"""

from typing import TYPE_CHECKING

from . import inodealloc, inodestore, namespace, orphan, truncate, xattrwrite
from .inode import Inode

if TYPE_CHECKING:
    from .transaction import Transaction


def release(tx: "Transaction", inode: Inode) -> bool:
    """Free an orphan: its blocks, as many as one transaction should, then its attributes and the inode itself.

    Returns whether that is done; if not, call it again in another transaction.  Raises ``Corrupt``, ``BlockMiss``.
    """
    assert not inode.links, "an inode with names is in use"
    if _has_blocks(tx, inode):
        if inode.size:
            inode = inodestore.change(tx, inode, size=0)
        inode, done = truncate.shrink(tx, inode)
        if not done:
            return False
    inode = xattrwrite.drop_all(tx, inode)
    number, is_dir = inode.number, inode.is_dir
    if orphan.contains(tx, number):
        orphan.remove(tx, number)
    inodestore.change(tx, tx.inode(number), dtime=tx.now[0])
    inodealloc.free(tx, number, is_dir)
    return True


def _has_blocks(tx: "Transaction", inode: Inode) -> bool:
    """Whether the block array maps blocks: of files and directories, and of links that are not stored in it."""
    return inode.is_regular or inode.is_dir or (inode.is_symlink and not namespace._is_fast(tx, inode))
