"""rename(2): moving a name, replacing or exchanging what stands at its new place, leaving a whiteout behind.

Checks come in the order of the kernel's, so that the same call gives the same errno.  The new name is entered before
the old one goes, as in the kernel, so that a full disk refuses what it refuses there.
"""

import errno
import stat
from typing import TYPE_CHECKING, NamedTuple

from . import dirstore, inode, inodestore, newinode
from .dirstore import Found
from .errors import Check, Corrupt, Refused
from .inode import Inode
from .namestore import (
    check_changeable,
    check_directory,
    check_links,
    check_name,
    check_project,
    check_removable,
    count_subdirectory,
    drop_directory,
    drop_link,
    existing,
)
from .newinode import Caller
from .units import ROOT_INODE

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .transaction import Transaction

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4      # renameat2(2)


class Name(NamedTuple):
    """One side of a rename: a directory, a name in it, the inode that it leads to, and where it is (None: nowhere)."""

    parent: Inode
    name: bytes
    child: Inode | None = None
    found: Found | None = None


class Renamed(NamedTuple):
    """The inode that was moved, and the one that stood at its new place: replaced, exchanged, or None."""

    moved: Inode
    other: Inode | None


def rename(tx: "Transaction", old_parent: Inode, old_name: bytes, new_parent: Inode, new_name: bytes, flags: int = 0,
           caller: Caller | None = None) -> Renamed:
    """Move a name; ``caller`` owns the whiteout that WHITEOUT leaves in its old place.

    A file or directory that was replaced and has no name left is an orphan then (see ``inodefree``).

    Raises ``Refused``: ENOENT, ENOTDIR, EISDIR, EEXIST (NOREPLACE), ENOTEMPTY, EINVAL (flags; a directory into itself),
    EPERM (immutable or append-only), EMLINK, EXDEV (another project), ENAMETOOLONG, EBUSY, ENOSPC.
    """
    if flags & ~(NOREPLACE | EXCHANGE | WHITEOUT) or (flags & EXCHANGE and flags & (NOREPLACE | WHITEOUT)) \
            or (flags & WHITEOUT and caller is None):
        raise Refused(errno.EINVAL)
    old, new = _sides(tx, Name(old_parent, old_name), Name(new_parent, new_name), flags)
    assert old.child is not None
    if new.child is not None and new.child.number == old.child.number:
        return Renamed(old.child, None)
    _check(tx, old, new, flags)
    if flags & EXCHANGE:
        return _exchange(tx, old, new)
    return _move(tx, old, new, caller if flags & WHITEOUT else None)


def _sides(tx: "Transaction", old: Name, new: Name, flags: int) -> tuple[Name, Name]:
    """Both names with what they lead to, the old one to something."""
    for side in (old, new):
        check_directory(side.parent)
        check_name(side.name)
        if side.name in (b".", b".."):
            raise Refused(errno.EBUSY)
    child, found = existing(tx, old.parent, old.name)
    old = Name(old.parent, old.name, child, found)
    if dirstore.locate(tx, new.parent, new.name) is not None:
        if flags & NOREPLACE:
            raise Refused(errno.EEXIST)
        try:
            child, found = existing(tx, new.parent, new.name)
        except Corrupt:
            _check_no_circle(tx, old.child, new.parent, errno.EINVAL)
            raise
        new = Name(new.parent, new.name, child, found)
    elif flags & EXCHANGE:
        raise Refused(errno.ENOENT)
    return old, new


def _check(tx: "Transaction", old: Name, new: Name, flags: int) -> None:
    """Whether the kernel's VFS and ext4 would let it happen."""
    assert old.child is not None
    if old.parent.number != new.parent.number:
        _check_no_circle(tx, old.child, new.parent, errno.EINVAL)
        if new.child is not None:
            _check_no_circle(tx, new.child, old.parent, errno.EINVAL if flags & EXCHANGE else errno.ENOTEMPTY)
    check_removable(old.parent, old.child)
    if new.child is None:
        check_changeable(new.parent)
    else:
        check_removable(new.parent, new.child)
        if not flags & EXCHANGE and old.child.is_dir != new.child.is_dir:
            raise Refused(errno.ENOTDIR if old.child.is_dir else errno.EISDIR)
    check_project(new.parent, old.child)
    if flags & EXCHANGE and new.child is not None:
        check_project(old.parent, new.child)
        _check_exchange_links(tx, old, new)
    elif old.child.is_dir:
        if new.child is not None:
            if not dirstore.is_empty(tx, new.child):
                raise Refused(errno.ENOTEMPTY)
        elif old.parent.number != new.parent.number:
            check_links(tx, new.parent)


def _check_exchange_links(tx: "Transaction", old: Name, new: Name) -> None:
    assert old.child is not None
    assert new.child is not None
    if old.parent.number != new.parent.number and old.child.is_dir != new.child.is_dir:
        check_links(tx, new.parent if old.child.is_dir else old.parent)


def _check_no_circle(fs: "Ext4", moved: Inode | None, parent: Inode, refusal: int) -> None:
    """Raise ``Refused(refusal)`` if an inode is the directory ``parent`` or above it."""
    if moved is None or not moved.is_dir:
        return
    above, seen = parent, set[int]()
    while above.number != ROOT_INODE:
        if above.number == moved.number:
            raise Refused(refusal)
        if above.number in seen or not above.is_dir:
            raise Corrupt(Check.DIRENT_INODE, inode=above.number, name=b"..")
        seen.add(above.number)
        above = inode.load(fs, dirstore.parent_of(fs, above))


def _move(tx: "Transaction", old: Name, new: Name, whiteout: Caller | None) -> Renamed:
    child = old.child
    assert child is not None
    if new.found is not None:
        dirstore.replace(tx, new.parent, new.found, child.number, child.mode)
    else:
        dirstore.add(tx, new.parent, new.name, child.number, child.mode)
    old_parent = tx.inode(old.parent.number)
    _vacate(tx, old_parent, old, whiteout)
    moved = _moved(tx, child, old, new)
    if child.is_dir:
        count_subdirectory(tx, tx.inode(old.parent.number), -1)
        if new.child is None:
            count_subdirectory(tx, tx.inode(new.parent.number), 1)
    other = None
    if new.child is not None:
        replaced = tx.inode(new.child.number)
        other = drop_directory(tx, replaced) if replaced.is_dir else drop_link(tx, replaced)
    return Renamed(tx.inode(moved.number), other)


def _vacate(tx: "Transaction", parent: Inode, old: Name, whiteout: Caller | None) -> None:
    """Take the old name away, or let it lead to a whiteout: a character device 0:0.  It may stand elsewhere by now."""
    assert old.found is not None
    found = dirstore.locate_again(tx, parent, old.found)
    if whiteout is None:
        dirstore.remove(tx, parent, found)
        return
    made = newinode.make(tx, parent, stat.S_IFCHR, whiteout, block=newinode.device_block(0, 0))
    dirstore.replace(tx, tx.inode(parent.number), found, made.number, made.mode)


def _moved(tx: "Transaction", child: Inode, old: Name, new: Name) -> Inode:
    """The inode of a name that was moved: a directory learns of its new parent."""
    if child.is_dir and old.parent.number != new.parent.number:
        dirstore.set_parent(tx, child, new.parent.number)
    return inodestore.change(tx, tx.inode(child.number), ctime=tx.now)


def _exchange(tx: "Transaction", old: Name, new: Name) -> Renamed:
    one, two = old.child, new.child
    assert one is not None
    assert two is not None
    assert old.found is not None
    assert new.found is not None
    dirstore.replace(tx, new.parent, new.found, one.number, one.mode)
    dirstore.replace(tx, tx.inode(old.parent.number), old.found, two.number, two.mode)
    moved, other = _moved(tx, one, old, new), _moved(tx, two, new, old)
    if old.parent.number != new.parent.number and one.is_dir != two.is_dir:
        change = -1 if one.is_dir else 1
        count_subdirectory(tx, tx.inode(old.parent.number), change)
        count_subdirectory(tx, tx.inode(new.parent.number), -change)
    return Renamed(tx.inode(moved.number), tx.inode(other.number))
