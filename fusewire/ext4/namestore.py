"""Making and removing names: create, mknod, mkdir, symlink, link, unlink, rmdir, tmpfile.

The kernel's VFS has checked who may do it; here are the rules of ext4 itself, in the order of the kernel's checks, so
that the same call gives the same errno.  ``rename`` has a module of its own, and so has freeing inodes (``inodefree``).

Every function returns the inode that it made, linked or took a name from; of the directories there are new views, too.
A directory entry and the inode that it leads to change in one transaction, so neither is seen without the other.
"""

import errno
import stat
from typing import TYPE_CHECKING

from . import directory, dirstore, inode, inodestore, mapping, newinode, orphan
from .dirstore import Found
from .errors import Check, Corrupt, Refused
from .features import Feature
from .inode import FLAG_APPEND, FLAG_EXTENTS, FLAG_IMMUTABLE, FLAG_PROJINHERIT, Inode
from .namespace import FAST_SYMLINK_BYTES, NAME_BYTES
from .newinode import Caller
from .units import ROOT_INODE

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .transaction import Transaction

MAX_LINKS = 65000
MANY_LINKS = 1          # the count of a directory that once had more subdirectories than can be counted
EMPTY_DIRECTORY_LINKS = 2
DIRECTORY_MODE = 0o1777     # what of a mode mkdir(2) takes
_KINDS = frozenset((stat.S_IFREG, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK))


def create(tx: "Transaction", parent: Inode, name: bytes, mode: int, caller: Caller,
           device: tuple[int, int] = (0, 0)) -> Inode:
    """A new file: regular, or what the mode's type says; ``device`` is the number (major, minor) of one.

    Raises ``Refused``: EEXIST, ENOENT (the directory was removed), ENOTDIR, ENAMETOOLONG, EPERM (it is immutable),
    EINVAL (no such type), ENOSPC.
    """
    if not stat.S_IFMT(mode):
        mode |= stat.S_IFREG
    if stat.S_IFMT(mode) not in _KINDS:
        raise Refused(errno.EPERM if stat.S_ISDIR(mode) else errno.EINVAL)
    check_new(tx, parent, name)
    fields = {"block": newinode.device_block(*device)} if newinode.is_device(mode) else {}
    made = newinode.make(tx, parent, mode, caller, **fields)
    dirstore.add(tx, parent, name, made.number, mode)
    return made


def mkdir(tx: "Transaction", parent: Inode, name: bytes, mode: int, caller: Caller) -> Inode:
    """A new directory.  Raises ``Refused`` as ``create``, EMLINK."""
    check_new(tx, parent, name)
    check_links(tx, parent)
    made = newinode.make(tx, parent, stat.S_IFDIR | mode & DIRECTORY_MODE, caller, links=EMPTY_DIRECTORY_LINKS)
    made = dirstore.start(tx, made, parent.number)
    count_subdirectory(tx, dirstore.add(tx, parent, name, made.number, made.mode), 1)
    return made


def symlink(tx: "Transaction", parent: Inode, name: bytes, target: bytes, caller: Caller) -> Inode:
    """A new symbolic link: in the inode if it is short, else in a block.

    Raises ``Refused`` as ``create``; ENAMETOOLONG where the target and a NUL do not fit into a block, ENOENT for none.
    """
    if not target:
        raise Refused(errno.ENOENT)
    check_new(tx, parent, name)
    if len(target) >= tx.geometry.block_bytes or b"\0" in target:
        raise Refused(errno.EINVAL if b"\0" in target else errno.ENAMETOOLONG)
    made = newinode.make(tx, parent, stat.S_IFLNK | 0o777, caller, size=len(target))
    if len(target) < FAST_SYMLINK_BYTES:
        made = inodestore.change(tx, made, flags=made.flags & ~FLAG_EXTENTS, block=target.ljust(60, b"\0"))
    else:
        made, run = mapping.allocate(tx, made, 0, 1, unwritten=False)
        assert run.start is not None
        tx.create(run.start)[:len(target)] = target
    dirstore.add(tx, parent, name, made.number, made.mode)
    return made


def tmpfile(tx: "Transaction", parent: Inode, mode: int, caller: Caller) -> Inode:
    """A new regular file without a name: an orphan until ``link`` gives it one.

    Raises ``Refused``: ENOENT (the directory was removed), ENOTDIR, EPERM, ENOSPC.
    """
    check_directory(parent)
    check_changeable(parent)
    made = newinode.make(tx, parent, stat.S_IFREG | stat.S_IMODE(mode), caller, links=0)
    return orphan.add(tx, made.number)


def link(tx: "Transaction", source: Inode, parent: Inode, name: bytes) -> Inode:
    """Another name for a file.

    Raises ``Refused`` as ``create``; EPERM for directories, immutable and append-only files, EMLINK, EXDEV from one
    project to another, ENOENT for a file that lost its last name.
    """
    check_new(tx, parent, name)
    if source.flags & (FLAG_APPEND | FLAG_IMMUTABLE) or source.is_dir:
        raise Refused(errno.EPERM)
    if not source.links and not orphan.contains(tx, source.number):
        raise Refused(errno.ENOENT)
    if source.links >= MAX_LINKS:
        raise Refused(errno.EMLINK)
    check_project(parent, source)
    dirstore.add(tx, parent, name, source.number, source.mode)
    if not source.links:
        return orphan.remove(tx, source.number, links=1, ctime=tx.now)
    return inodestore.change(tx, tx.inode(source.number), links=source.links + 1, ctime=tx.now)


def unlink(tx: "Transaction", parent: Inode, name: bytes) -> Inode:
    """Take a name from a file; without names it is an orphan, and ``inodefree.release`` frees it once nobody uses it.

    Raises ``Refused``: ENOENT, ENOTDIR, ENAMETOOLONG, EISDIR, EPERM (the directory or the file is immutable or
    append-only).
    """
    victim, found = existing(tx, parent, name)
    check_removable(parent, victim)
    if victim.is_dir:
        raise Refused(errno.EISDIR)
    dirstore.remove(tx, parent, found)
    return drop_link(tx, victim)


def rmdir(tx: "Transaction", parent: Inode, name: bytes) -> Inode:
    """Remove an empty directory, which is an orphan then.

    Raises ``Refused`` as ``unlink``; ENOTDIR if the name is none of a directory, ENOTEMPTY, EINVAL for ".".
    """
    if name in directory.DOTS:
        raise Refused(errno.EINVAL if name == b"." else errno.ENOTEMPTY)
    victim, found = existing(tx, parent, name)
    check_removable(parent, victim)
    if not victim.is_dir:
        raise Refused(errno.ENOTDIR)
    if not dirstore.is_empty(tx, victim):
        raise Refused(errno.ENOTEMPTY)
    parent = dirstore.remove(tx, parent, found)
    count_subdirectory(tx, parent, -1)
    return drop_directory(tx, victim)


# ---- rules that rename shares --------------------------------------------------------------------------------------

def check_directory(parent: Inode) -> None:
    """Raise ``Refused``: ENOTDIR, or ENOENT for a directory that was removed."""
    if not parent.is_dir:
        raise Refused(errno.ENOTDIR)
    if not parent.links:
        raise Refused(errno.ENOENT)


def check_changeable(parent: Inode) -> None:
    """Raise ``Refused(EPERM)`` for an immutable directory."""
    if parent.flags & FLAG_IMMUTABLE:
        raise Refused(errno.EPERM)


def check_name(name: bytes) -> None:
    """Raise ``Refused`` for what can be no name: ENAMETOOLONG, ENOENT if it is empty, EINVAL."""
    if len(name) > NAME_BYTES:
        raise Refused(errno.ENAMETOOLONG)
    if not name:
        raise Refused(errno.ENOENT)
    if b"/" in name or b"\0" in name:
        raise Refused(errno.EINVAL)


def check_new(tx: "Transaction", parent: Inode, name: bytes) -> None:
    """Raise ``Refused`` unless a name may be entered: EEXIST, ENOENT, ENOTDIR, ENAMETOOLONG, EINVAL, EPERM."""
    check_directory(parent)
    check_name(name)
    if name in directory.DOTS or dirstore.locate(tx, parent, name) is not None:
        raise Refused(errno.EEXIST)
    check_changeable(parent)


def existing(fs: "Ext4", parent: Inode, name: bytes) -> tuple[Inode, Found]:
    """The inode that a name leads to, and where the name is.

    Raises ``Refused``: ENOENT, ENOTDIR, ENAMETOOLONG, EINVAL; ``Corrupt`` for a name that may not lead where it does.
    """
    check_directory(parent)
    check_name(name)
    if name in directory.DOTS:
        raise Refused(errno.EINVAL)
    found = dirstore.locate(fs, parent, name)
    if found is None:
        raise Refused(errno.ENOENT)
    if found.entry.inode in (parent.number, ROOT_INODE):
        raise Corrupt(Check.DIRENT_INODE, inode=parent.number, name=name, inode_named=found.entry.inode)
    return inode.check_in_use(fs, inode.load(fs, found.entry.inode)), found


def check_removable(parent: Inode, victim: Inode) -> None:
    """Raise ``Refused(EPERM)`` if either is immutable or append-only."""
    if (parent.flags | victim.flags) & (FLAG_IMMUTABLE | FLAG_APPEND):
        raise Refused(errno.EPERM)


def check_project(parent: Inode, child: Inode) -> None:
    """Raise ``Refused(EXDEV)`` if a directory that hands its project on is to get a file of another project."""
    if parent.flags & FLAG_PROJINHERIT and parent.project != child.project:
        raise Refused(errno.EXDEV)


def check_links(tx: "Transaction", parent: Inode) -> None:
    """Raise ``Refused(EMLINK)`` if a directory can have no more subdirectories; indexed ones may stop counting."""
    if parent.links >= MAX_LINKS and not (Feature.DIR_NLINK in tx.superblock.features
                                          and directory.is_indexed(tx, parent)):
        raise Refused(errno.EMLINK)


def count_subdirectory(tx: "Transaction", parent: Inode, change: int) -> Inode:
    """The directory with a subdirectory more or less.  Beyond what can be counted the count is 1, and stays it."""
    links = parent.links
    if change > 0:
        links += 1
        if directory.is_indexed(tx, parent) and (links > MAX_LINKS or links == MANY_LINKS + 1):
            links = MANY_LINKS
    elif links > EMPTY_DIRECTORY_LINKS:
        links -= 1
    return inodestore.change(tx, parent, links=links) if links != parent.links else parent


def drop_link(tx: "Transaction", victim: Inode) -> Inode:
    """A file with one name less, an orphan if that was the last."""
    if victim.links > 1:
        return inodestore.change(tx, tx.inode(victim.number), links=victim.links - 1, ctime=tx.now)
    return orphan.add(tx, victim.number, links=0, ctime=tx.now)


def drop_directory(tx: "Transaction", victim: Inode) -> Inode:
    """A directory that has no name any more, and so is an orphan."""
    return orphan.add(tx, victim.number, links=0, ctime=tx.now, version=victim.version + 1)
