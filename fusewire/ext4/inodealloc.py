"""Taking and giving back inodes.  Kernel documentation, ext4, "Block and inode Bitmaps", "Inode and block allocation".

Files go to their directory's group, so that reading the one finds the others near; directories spread: at the top over
the whole disk, below near their parent, where inodes and blocks are not yet scarce (the idea is Orlov's).
"""

import errno
import re
from functools import partial
from typing import TYPE_CHECKING

from . import alloc, group
from .errors import Check, Corrupt, Refused
from .group import INODE_UNINIT, GroupDesc
from .inode import FLAG_TOPDIR, Inode
from .units import ROOT_INODE

if TYPE_CHECKING:
    from .transaction import Transaction

_NOT_FULL = re.compile(rb"[^\xff]")
MANY_GROUPS = 64  # groups looked at for a directory before any group with room will do


def allocate(tx: "Transaction", parent: Inode, directory: bool) -> int:
    """A free inode number, marked as used.  Raises ``Refused(ENOSPC)`` when there is none."""
    writing = tx.writing
    assert writing is not None
    if writing.free_inodes - tx.inodes_taken < 1:
        raise Refused(errno.ENOSPC)
    home = tx.geometry.group_of_inode(parent.number)[0]
    found = _search(tx, _group_for_directory(tx, parent, home) if directory else home)
    if found is None:
        writing.roomy_tables.fill()  # what was remembered may come from transactions that did not apply
        found = _search(tx, home)
    if found is None:
        raise Refused(errno.ENOSPC)
    number, index = found
    mark(tx, number, index, directory, used=True)
    return number * tx.geometry.inodes_per_group + index + 1


def free(tx: "Transaction", number: int, directory: bool) -> None:
    """Give an inode number back.  Raises ``Corrupt(BITMAP_MISMATCH)`` if it was not in use."""
    in_group, index = tx.geometry.group_of_inode(number)
    mark(tx, in_group, index, directory, used=False)
    assert tx.writing is not None
    tx.writing.roomy_tables.add(in_group)


def _search(tx: "Transaction", first: int) -> tuple[int, int] | None:
    """(group, index in its table) of a free inode, in the group ``first`` or one after it; full groups are not looked
    at again."""
    assert tx.writing is not None
    roomy, groups = tx.writing.roomy_tables, tx.geometry.groups
    for low, high in ((first, groups), (0, first)):
        number = roomy.next(low, high)
        while number is not None:
            desc = group.load(tx, number)
            index = _free_index(tx, number, desc) if desc.free_inodes else None
            if index is not None:
                return number, index
            roomy.remove(number)
            number = roomy.next(number + 1, high)
    return None


def _group_for_directory(tx: "Transaction", parent: Inode, home: int) -> int:
    """The group for a new directory: the emptiest that is not worse than the average, starting at home or, at the
    top, where the last one was put."""
    writing, groups = tx.writing, tx.geometry.groups
    assert writing is not None
    at_top = parent.number == ROOT_INODE or parent.flags & FLAG_TOPDIR
    start = (writing.directory_group + 1) % groups if at_top else home
    inodes = (writing.free_inodes - tx.inodes_taken) // groups
    clusters = (writing.free_clusters - tx.clusters_taken) // groups
    if not at_top:
        inodes, clusters = inodes // 4, clusters // 4
    for step in range(min(groups, MANY_GROUPS)):
        candidate = (start + step) % groups
        desc = group.load(tx, candidate)
        if desc.free_inodes and desc.free_inodes >= inodes and desc.free_blocks >= clusters:
            if at_top:
                tx.after_commit(partial(setattr, writing, "directory_group", candidate))
            return candidate
    return start


def _free_index(tx: "Transaction", number: int, desc: GroupDesc) -> int | None:
    """The lowest free index, so that what lies behind it in the table stays untouched as long as possible."""
    raw = bitmap(tx, number, desc)
    found = _NOT_FULL.search(raw, 0, -(-tx.geometry.inodes_per_group // 8))
    if found is None:
        return None
    byte = raw[found.start()]
    index = found.start() * 8 + ((~byte & (byte + 1)).bit_length() - 1)
    inode = number * tx.geometry.inodes_per_group + index + 1
    if inode < tx.superblock.first_inode:
        raise Corrupt(Check.BITMAP_MISMATCH, group=number, inode=inode, expected="used")
    return index if index < tx.geometry.inodes_per_group else None


def bitmap(tx: "Transaction", number: int, desc: GroupDesc) -> bytes:
    """A group's inode bitmap; all free where the disk has none yet (INODE_UNINIT)."""
    if desc.flags & INODE_UNINIT and alloc.has_uninit(tx):
        return _initial(tx)
    return bytes(tx.cache.view(desc.inode_bitmap, "bitmap", bytes,
                               lambda data: alloc.verify_bitmap(tx, number, data, "inode_bitmap")))


def _initial(tx: "Transaction") -> bytes:
    bits, size = tx.geometry.inodes_per_group, tx.geometry.block_bytes
    return (((1 << (size * 8 - bits)) - 1) << bits).to_bytes(size, "little")


def mark(tx: "Transaction", number: int, index: int, directory: bool, *, used: bool) -> None:
    """Mark an inode of a group, by its index there, as used or free, and count it."""
    desc = group.load(tx, number)
    before = bitmap(tx, number, desc)
    byte, bit = index // 8, 1 << index % 8
    if bool(before[byte] & bit) == used:
        raise Corrupt(Check.BITMAP_MISMATCH, group=number, inode_index=index, expected="free" if used else "used")
    if desc.flags & INODE_UNINIT and alloc.has_uninit(tx):
        tx.create(desc.inode_bitmap)[:] = before
    tx.edit(desc.inode_bitmap)[byte] ^= bit
    tx.seal(desc.inode_bitmap, "bitmap", alloc.sealed_elsewhere)
    change = -1 if used else 1
    if not 0 <= desc.free_inodes + change <= tx.geometry.inodes_per_group:
        raise Corrupt(Check.BITMAP_MISMATCH, group=number, inode_index=index, free_in_descriptor=desc.free_inodes)
    fields = {"free_inodes": desc.free_inodes + change, "flags": desc.flags & ~INODE_UNINIT}
    if directory:
        fields["used_dirs"] = min(max(desc.used_dirs - change, 0), tx.geometry.inodes_per_group)
    if used and alloc.has_uninit(tx):
        fields["itable_unused"] = min(desc.itable_unused, tx.geometry.inodes_per_group - index - 1)
    group.change(tx, number, **fields)
    tx.inodes_taken -= change
