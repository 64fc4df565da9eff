"""Data stored in the inode itself: 60 bytes in the block array, the rest in the attribute ``system.data``.

Kernel documentation, ext4, "Inline Data".
"""

from typing import TYPE_CHECKING

from . import xattrstore
from .errors import Check, Corrupt
from .inode import Inode

if TYPE_CHECKING:
    from .filesystem import Ext4


def read(fs: "Ext4", inode: Inode) -> bytes:
    """The inode's inline content: its size in bytes, or fewer where nothing is stored behind it (those read as zero).

    A file may well be larger than what its inode can hold: truncated to that size, or copied as one hole.
    """
    return (inode.block + xattrstore.inline_rest(fs, inode))[:inode.size]


def check_size(fs: "Ext4", inode: Inode) -> int:
    """The size of an inline directory in bytes, if the inode could hold as much; else ``Corrupt(INLINE_DATA)``."""
    if inode.size > len(inode.block) + fs.geometry.inode_bytes:
        raise Corrupt(Check.INLINE_DATA, inode=inode.number, size=inode.size)
    return inode.size
