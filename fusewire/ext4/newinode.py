"""New inodes: what they take from their directory, and what from their creator.

mkdir(2), mknod(2) and inode(7) say what owner, group and mode become; chattr(1) which flags are inherited.
"""

import random
import stat
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from . import extentstore, inodealloc, inodestore, setattr
from .features import Feature
from .inode import (
    DEVICES,
    FLAG_CASEFOLD,
    FLAG_DIRSYNC,
    FLAG_EXTENTS,
    FLAG_NOATIME,
    FLAG_NODUMP,
    FLAG_PROJINHERIT,
    FLAG_SYNC,
    FLAG_TOPDIR,
    Inode,
)

if TYPE_CHECKING:
    from .transaction import Transaction

FLAG_JOURNAL_DATA = 0x4000
FLAG_DAX = 0x02000000
# secure deletion, undelete, compress, not to be compressed, no tail merging: without meaning, but inherited
_MEANINGLESS = 0x1 | 0x2 | 0x4 | 0x400 | 0x8000
INHERITED = (_MEANINGLESS | FLAG_SYNC | FLAG_NODUMP | FLAG_NOATIME | FLAG_JOURNAL_DATA | FLAG_DIRSYNC
             | FLAG_PROJINHERIT | FLAG_CASEFOLD | FLAG_DAX)
_NOT_FOR_FILES = FLAG_DIRSYNC | FLAG_TOPDIR | FLAG_CASEFOLD | FLAG_PROJINHERIT
_FOR_OTHERS = FLAG_NODUMP | FLAG_NOATIME
_MAPPED = frozenset((stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK))
_BLOCK_BYTES = 60
_DEVICE = struct.Struct("<II")
_OLD_MAJORS = _OLD_MINORS = 256
FIRST_VERSION = 1


class Caller(NamedTuple):
    """Who creates an inode.  ``umask`` is taken from its mode unless its directory has a default access control list;
    0 if that has happened already."""

    uid: int
    gid: int
    umask: int = 0


def make(tx: "Transaction", parent: Inode, mode: int, caller: Caller, **fields: Any) -> Inode:
    """A new inode, to be entered in ``parent``; ``fields`` (of ``inodestore.change``) come before what is usual.

    Raises ``Refused(ENOSPC)``: no inode is left, or no block for the attributes that it inherits.
    """
    kind, directory = stat.S_IFMT(mode), stat.S_ISDIR(mode)
    by_directory = parent.mode & stat.S_ISGID
    gid = parent.gid if by_directory or tx.options.grpid else caller.gid
    if by_directory and directory and not tx.options.grpid:
        mode |= stat.S_ISGID
    inherits_project = tx.has_project and parent.flags & FLAG_PROJINHERIT
    number = inodealloc.allocate(tx, parent, directory)
    made = inodestore.create(tx, number, mode, **{
        "uid": caller.uid, "gid": gid, "links": 1, "flags": _flags(tx, parent, kind),
        "generation": random.getrandbits(32), "version": FIRST_VERSION,
        "project": parent.project if inherits_project else 0,
        "block": extentstore.empty_root() if _has_extents(tx, kind) else bytes(_BLOCK_BYTES), **fields})
    return setattr.inherit_acl(tx, parent, made, caller.umask)


def device_block(major: int, minor: int) -> bytes:
    """The block array of a device: 8 and 8 bits in the first word if they suffice, else 12 and 20 in the second."""
    if major < _OLD_MAJORS and minor < _OLD_MINORS:
        words = _DEVICE.pack(major << 8 | minor, 0)
    else:
        words = _DEVICE.pack(0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)
    return words.ljust(_BLOCK_BYTES, b"\0")


def is_device(mode: int) -> bool:
    """Whether a mode is that of a device, which has a number."""
    return stat.S_IFMT(mode) in DEVICES


def _has_extents(tx: "Transaction", kind: int) -> bool:
    return kind in _MAPPED and Feature.EXTENTS in tx.superblock.features


def _flags(tx: "Transaction", parent: Inode, kind: int) -> int:
    flags = parent.flags & INHERITED
    if kind == stat.S_IFREG:
        flags &= ~_NOT_FOR_FILES
    elif kind != stat.S_IFDIR:
        flags &= _FOR_OTHERS
    return flags | FLAG_EXTENTS if _has_extents(tx, kind) else flags
