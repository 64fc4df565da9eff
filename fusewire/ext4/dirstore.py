"""Changing directories: entering names, taking them out, letting them lead elsewhere.

Kernel documentation, ext4, "Directory Entries".  A directory of one block is searched from end to end; when it is full
it becomes indexed (``htreestore``), where the file system has that feature, and otherwise grows block by block.

Every function that changes a directory returns it as it is then: with new times and a new version, perhaps larger.
"""

import stat
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from . import directory, dirspace, htreestore, inodestore
from .dirblock import ALIGN, Entry
from .dirrecords import FILE_TYPES, LONGEST_RECORD, Link, record_bytes
from .errors import Check, Corrupt
from .inode import FLAG_INDEX, Inode

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .transaction import Transaction

_CLASSES = LONGEST_RECORD // ALIGN + 1


class Found(NamedTuple):
    """A name of a directory: in which of its blocks, and its entry there."""

    file_block: int
    entry: Entry


def locate(fs: "Ext4", of: Inode, name: bytes) -> Found | None:
    """Where a name is, None if the directory does not have it.  Raises ``Corrupt``, ``BlockMiss``."""
    for file_block in _candidates(fs, of, name):
        entry = dirspace.names(fs, of, file_block).names.get(name)
        if entry is not None:
            return Found(file_block, entry)
    return None


def locate_again(fs: "Ext4", of: Inode, found: Found) -> Found:
    """Where a name is that ``locate`` found before other names were entered, which may have moved it."""
    entry = dirspace.names(fs, of, found.file_block).names.get(found.entry.name)
    again = Found(found.file_block, entry) if entry is not None else locate(fs, of, found.entry.name)
    assert again is not None, "a name goes only where it is taken out"
    return again


def add(tx: "Transaction", of: Inode, name: bytes, number: int, mode: int) -> Inode:
    """Enter a name that the directory does not have; ``mode`` tells the inode's type.

    Raises ``Refused(ENOSPC)``: the directory cannot grow.
    """
    link = _link(tx, name, number, mode)
    if directory.is_indexed(tx, of):
        try:
            return _touched(tx, htreestore.add(tx, of, link))
        except Corrupt as error:
            if error.check not in directory.UNUSABLE_INDEX or tx.has_checksums:
                raise
            of = inodestore.change(tx, of, flags=of.flags & ~FLAG_INDEX)
    return _touched(tx, _add_linear(tx, of, link))


def remove(tx: "Transaction", of: Inode, found: Found) -> Inode:
    """Take out a name where ``locate`` found it, with nothing entered in between."""
    dirspace.leave(tx, of, found.file_block, found.entry.name)
    vacancies = _vacancies(tx, of)
    if vacancies is not None:
        vacancies[:] = [min(first, found.file_block) for first in vacancies]
    return _touched(tx, of)


def replace(tx: "Transaction", of: Inode, found: Found, number: int, mode: int) -> Inode:
    """Let a name lead to another inode."""
    dirspace.point(tx, of, found.file_block, _link(tx, found.entry.name, number, mode))
    return _touched(tx, of)


def set_parent(tx: "Transaction", of: Inode, parent: int) -> None:
    """Let ".." lead to another directory; the directory's own inode stays as it is.

    Raises ``Corrupt(DIRENT_NAME)`` if there is no "..".
    """
    parent_of(tx, of)
    dirspace.point(tx, of, 0, _link(tx, b"..", parent, of.mode))


def parent_of(fs: "Ext4", of: Inode) -> int:
    """The inode number that ".." leads to.  Raises ``Corrupt(DIRENT_NAME)`` if there is no ".."."""
    entry = dirspace.names(fs, of, 0).names.get(b"..")
    if entry is None:
        raise Corrupt(Check.DIRENT_NAME, inode=of.number, name=b"..", found=False)
    return entry.inode


def is_empty(fs: "Ext4", of: Inode) -> bool:
    """Whether a directory has no names but "." and ".."."""
    return not any(dirspace.names(fs, of, file_block).names.keys() - (() if file_block else directory.DOTS)
                   for file_block in _from_end_to_end(fs, of, None))


def start(tx: "Transaction", of: Inode, parent: int) -> Inode:
    """Give a new directory its first block, with "." and "..".  Raises ``Refused(ENOSPC)``."""
    of, first = dirspace.append(tx, of)
    dirspace.fill(tx, of, first, [_link(tx, b".", of.number, of.mode), _link(tx, b"..", parent, of.mode)])
    return of


def _link(fs: "Ext4", name: bytes, number: int, mode: int) -> Link:
    kind = FILE_TYPES.get(stat.S_IFMT(mode))
    if kind is None:
        raise Corrupt(Check.INODE_MODE, inode=number, mode=f"{mode:#o}")
    return Link(name, number, kind if fs.has_file_types else 0)


def _touched(tx: "Transaction", of: Inode) -> Inode:
    """The directory, just changed.  A flag for an index that the file system does not have goes, as the index does not
    hold from now on."""
    flags = of.flags if tx.has_dir_index else of.flags & ~FLAG_INDEX
    return inodestore.change(tx, of, mtime=tx.now, ctime=tx.now, version=of.version + 1, flags=flags)


def _candidates(fs: "Ext4", of: Inode, name: bytes) -> Iterable[int]:
    """The blocks that can hold a name."""
    if directory.is_indexed(fs, of):
        if name in directory.DOTS:
            return (0,)
        try:
            return htreestore.leaves(fs, of, name)
        except Corrupt as error:
            if error.check not in directory.UNUSABLE_INDEX:
                raise
    return _from_end_to_end(fs, of, name)


def _from_end_to_end(fs: "Ext4", of: Inode, name: bytes | None) -> Iterator[int]:
    """All blocks, going on where an earlier attempt had to wait for one, unless the directory changed meanwhile."""
    search = ("change", of.raw, of.number, name)
    first = fs.scans.pop(search, 0)
    for file_block in range(first, fs.geometry.blocks_for(of.size)):
        if not fs.cache.holds(dirspace.device_block(fs, of, file_block)):
            fs.remember(search, file_block)
        yield file_block


def _add_linear(tx: "Transaction", of: Inode, link: Link) -> Inode:
    blocks, need = tx.geometry.blocks_for(of.size), record_bytes(len(link.name))
    vacancies = _vacancies(tx, of)
    first = min(vacancies[need // ALIGN], blocks) if vacancies is not None else 0
    for file_block in range(first, blocks):
        if dirspace.enter(tx, of, file_block, link):
            _none_before(tx, of, need, file_block)
            return of
    if blocks == 1 and htreestore.can_index(tx):
        return htreestore.index(tx, of, link)
    of, new = dirspace.append(tx, of)
    dirspace.fill(tx, of, new, [link])
    _none_before(tx, of, need, new)
    return of


# How far a directory without an index is known to be full is remembered beside its first block, by length of record:
# no block before the one noted has room for so many bytes.  Being wrong (after a transaction that failed) costs room.

def _vacancies(fs: "Ext4", of: Inode) -> list[int] | None:
    found: list[int] | None = fs.cache.entry(dirspace.device_block(fs, of, 0)).views.get(_vacancies_key(of))
    return found


def _none_before(tx: "Transaction", of: Inode, need: int, file_block: int) -> None:
    if not file_block:
        return
    vacancies = _vacancies(tx, of)
    if vacancies is None:
        vacancies = [0] * _CLASSES
        tx.cache.entry(dirspace.device_block(tx, of, 0)).views[_vacancies_key(of)] = vacancies
    for size in range(need // ALIGN, _CLASSES):
        vacancies[size] = max(vacancies[size], file_block)


def _vacancies_key(of: Inode) -> tuple[str, int, int]:
    return "vacancies", of.number, of.generation


