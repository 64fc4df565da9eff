"""The tree of names: looking a name up, reading a symbolic link, and the figures of statfs(2)."""

import errno
from typing import TYPE_CHECKING

from . import directory, fscrypt, inlinedata, inode, iomap
from .errors import Check, Corrupt, Refused
from .features import Feature
from .inode import Inode
from .units import ROOT_INODE, InodeNumber

if TYPE_CHECKING:
    from .filesystem import Ext4

NAME_BYTES = 255
FAST_SYMLINK_BYTES = 60
PATH_BYTES = 4096  # PATH_MAX of <linux/limits.h>: no path that is followed is as long


def lookup(fs: "Ext4", parent: Inode, name: bytes) -> InodeNumber:
    """The inode number of a name in a directory.

    Raises:
        Refused: ENOENT, ENOTDIR if ``parent`` is no directory, ENAMETOOLONG.
        Corrupt: the directory is broken, or the entry leads back to its directory or to the root.
    """
    if not parent.is_dir:
        raise Refused(errno.ENOTDIR)
    if len(name) > NAME_BYTES:
        raise Refused(errno.ENAMETOOLONG)
    if name == b"." or (name == b".." and parent.number == ROOT_INODE):
        return parent.number
    number = directory.find(fs, parent, name)
    if name != b".." and number in (parent.number, ROOT_INODE):
        raise Corrupt(Check.DIRENT_INODE, inode=parent.number, name=name, inode_named=number)
    return InodeNumber(number)


def lookup_inode(fs: "Ext4", parent: Inode, name: bytes) -> Inode:
    """The inode of a name in a directory, checked as one that a name may lead to; errors as ``lookup``."""
    return inode.check_in_use(fs, inode.load(fs, lookup(fs, parent, name)))


def readlink(fs: "Ext4", link: Inode) -> bytes:
    """The target of a symbolic link, as the kernel shows it without a key if it is encrypted.

    Raises ``Refused(EINVAL)`` if it is none, ``Corrupt(SYMLINK_SIZE)`` if it cannot be one.
    """
    if not link.is_symlink:
        raise Refused(errno.EINVAL)
    target = _target(fs, link)
    if link.is_encrypted:
        return fscrypt.symlink_target(target)
    if not target or b"\0" in target or len(target) >= PATH_BYTES:
        raise Corrupt(Check.SYMLINK_SIZE, inode=link.number, size=link.size)
    return target


def _target(fs: "Ext4", link: Inode) -> bytes:
    """The stored bytes: in the block array if they are short and no block is allocated, else in one block."""
    if link.is_inline:
        target = inlinedata.read(fs, link)
        if len(target) != link.size:
            raise Corrupt(Check.SYMLINK_SIZE, inode=link.number, size=link.size, stored=len(target))
        return target
    if is_fast_link(fs, link):
        if link.size >= FAST_SYMLINK_BYTES:
            raise Corrupt(Check.SYMLINK_SIZE, inode=link.number, size=link.size)
        return link.block[:link.size]
    if not 0 < link.size <= fs.geometry.block_bytes:
        raise Corrupt(Check.SYMLINK_SIZE, inode=link.number, size=link.size)
    run = iomap.find(fs, link, 0)
    if run.start is None or run.unwritten:
        raise Corrupt(Check.SYMLINK_SIZE, inode=link.number, size=link.size)
    return fs.cache.read(run.start - run.file_block)[:link.size]


def is_fast_link(fs: "Ext4", link: Inode) -> bool:
    """Whether the target stands in the block array: the link owns no block but, perhaps, one of attributes.

    With ea_inode, values in inodes of their own count as the link's blocks too, so its size has to tell.
    """
    if link.has_extents:
        return False
    if Feature.EA_INODE in fs.superblock.features:
        return 0 < link.size < FAST_SYMLINK_BYTES
    attribute_sectors = fs.geometry.cluster_sectors() if link.file_acl else 0
    return link.sectors == attribute_sectors
