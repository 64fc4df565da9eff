"""Directories: finding a name, and reading names in order, whichever way the directory stores them.

Kernel documentation, ext4, "Directory Entries".  A directory is a file of blocks of entries (``dirblock``), indexed or
not (``htree``), or lies in its inode.  Indexed directories can be read like the others, because their nodes look like
unused entries.  Encrypted names are presented as the kernel does without the key (``fscrypt``), casefolded ones are
found by their folded form (``casefold``).

I1  A cookie is where the next entry begins, counted in bytes from the start of the directory; 0 is the start.
"""

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from . import casefold, checksum, dirblock, dirhash, fscrypt, htree, inlinedata, iomap, xattrstore
from .blocks import BlockMiss
from .dirblock import DirBlock, Entry
from .errors import Check, Corrupt, Refused
from .inode import FLAG_INDEX, Inode

if TYPE_CHECKING:
    from .filesystem import Ext4

READAHEAD_BLOCKS = 32
MOST_READAHEAD_BLOCKS = 1024
D_TYPE_DIRECTORY = 4
INLINE_PARENT_BYTES = 4
DOT_COOKIE, DOTDOT_COOKIE = 1, 2


class Name(NamedTuple):
    """One name of a directory: the cookie after it, the inode number, the d_type of readdir(3), the name."""

    cookie: int
    inode: int
    d_type: int
    name: bytes


def find(fs: "Ext4", directory: Inode, name: bytes) -> int:
    """The inode number that a name has in a directory.  Raises ``Refused(ENOENT)``, ``Corrupt``, ``BlockMiss``."""
    if directory.is_inline:
        found = _find_inline(fs, directory, name)
    elif _is_indexed(fs, directory):
        found = _find_indexed(fs, directory, name)
    else:
        found = _find_linear(fs, directory, name)
    if found is None:
        raise Refused(errno.ENOENT)
    return found.inode


def read(fs: "Ext4", directory: Inode, cookie: int) -> Iterator[Name]:
    """The names from a cookie on, "." and ".." among them.  Raises ``Corrupt`` or ``BlockMiss`` when advanced."""
    names = _read_inline(fs, directory, cookie) if directory.is_inline else _read_blocks(fs, directory, cookie)
    if not directory.is_encrypted:
        return names
    return (name._replace(name=_presented(fs, directory, name.name)) for name in names)


def _read_blocks(fs: "Ext4", directory: Inode, cookie: int) -> Iterator[Name]:
    byte_of, within = fs.geometry.byte_of, fs.geometry.within_block(cookie)
    for file_block in range(fs.geometry.block_of(cookie), fs.geometry.blocks_for(directory.size)):
        start = byte_of(file_block)
        before = 0
        for end, inode, d_type, name in _block(fs, directory, file_block).entries:
            if before >= within:
                yield Name(start + end, inode, d_type, name)
            before = end
        within = 0


def _find_linear(fs: "Ext4", directory: Inode, name: bytes) -> Entry | None:
    """Search block by block, going on where an earlier attempt had to wait for blocks.

    A changed directory has a changed inode, and is searched from its start.
    """
    search = ("lookup", directory.raw, directory.number, name)
    file_block = first = fs.scans.pop(search, 0)
    try:
        for file_block in range(first, fs.geometry.blocks_for(directory.size)):
            found = _find_in_block(fs, directory, _block(fs, directory, file_block), name)
            if found is not None:
                return found
    except BlockMiss:
        fs.remember(search, file_block)
        raise
    return None


def _find_indexed(fs: "Ext4", directory: Inode, name: bytes) -> Entry | None:
    """Search the leaves that the name's hash leads to; a broken or unusable index only costs speed."""
    if name in (b".", b".."):
        return _find_in_block(fs, directory, _block(fs, directory, 0), name)
    try:
        top = _root(fs, directory)
        if top.version not in dirhash.COMPUTABLE or directory.is_encrypted:
            return _find_linear(fs, directory, name)
        hash_value, _ = dirhash.dirhash(_hashed_form(directory, name), top.version, fs.superblock.hash_seed)
        for leaf in htree.leaves(top, lambda block: _inner(fs, directory, block), hash_value):
            found = _find_in_block(fs, directory, _block(fs, directory, leaf), name)
            if found is not None:
                return found
    except Corrupt as error:
        if error.check not in (Check.HTREE_ROOT, Check.HTREE_NODE, Check.HTREE_DEPTH):
            raise
        return _find_linear(fs, directory, name)
    return None


def _hashed_form(directory: Inode, name: bytes) -> bytes:
    if not directory.is_casefold:
        return name
    folded = casefold.fold(name)
    return name if folded is None else folded


def _find_in_block(fs: "Ext4", directory: Inode, block: DirBlock, name: bytes) -> Entry | None:
    """The entry of a name: by its bytes, or by its folded or presented form where the directory compares by that."""
    if directory.is_encrypted:
        if block.alias is None:
            block.alias = {_presented(fs, directory, entry.name): entry for entry in block.entries}
        return block.alias.get(name)
    found = block.names.get(name)
    if found is not None or not directory.is_casefold:
        return found
    folded = casefold.fold(name)
    if folded is None:
        return None
    if block.alias is None:
        block.alias = {casefold.fold(entry.name) or entry.name: entry for entry in block.entries}
    return block.alias.get(folded)


def _presented(fs: "Ext4", directory: Inode, name: bytes) -> bytes:
    """An encrypted name as it is shown without the key."""
    if name in (b".", b".."):
        return name
    raise NotImplementedError


def _is_indexed(fs: "Ext4", directory: Inode) -> bool:
    return bool(directory.flags & FLAG_INDEX) and fs.has_dir_index


def _root(fs: "Ext4", directory: Inode) -> htree.Root:
    block = _device_block(fs, directory, 0)
    key = ("htree root", directory.number, directory.generation)
    return fs.cache.view(block, key, lambda data: htree.root(fs, directory, data),
                         lambda data: htree.check_node(fs, directory, data, 0))


def _inner(fs: "Ext4", directory: Inode, file_block: int) -> htree.Node:
    block = _device_block(fs, directory, file_block)
    key = ("htree", directory.number, directory.generation)
    return fs.cache.view(block, key, lambda data: htree.inner(fs, directory, data, file_block),
                         lambda data: htree.check_node(fs, directory, data, file_block))


def _block(fs: "Ext4", directory: Inode, file_block: int) -> DirBlock:
    """The decoded entries of one block of a directory, which is read ahead if it is not in memory."""
    block = _device_block(fs, directory, file_block)
    if not fs.cache.holds(block):
        _read_ahead(fs, directory, file_block)
    key = ("directory", directory.number, directory.generation)
    return fs.cache.view(block, key, lambda data: dirblock.decode(
        fs, data, encrypted=directory.is_encrypted, inode=directory.number, file_block=file_block),
        lambda data: _verify(fs, directory, data, file_block))


def _device_block(fs: "Ext4", directory: Inode, file_block: int) -> int:
    run = iomap.find(fs, directory, file_block)
    if run.start is None or run.unwritten:
        raise Corrupt(Check.DIRECTORY_HOLE, inode=directory.number, file_block=file_block)
    return run.start + file_block - run.file_block


def _read_ahead(fs: "Ext4", directory: Inode, file_block: int) -> None:
    """Miss all blocks of the window around ``file_block``; the further a reader has come, the longer it is."""
    window = READAHEAD_BLOCKS
    while window < min(file_block, MOST_READAHEAD_BLOCKS):
        window *= 2
    at = file_block - file_block % window
    end = min(at + window, fs.geometry.blocks_for(directory.size))
    wanted: list[int] = []
    while at < end:
        run = iomap.find(fs, directory, at)
        stop = min(end, run.file_block + run.length)
        if run.start is not None:
            wanted.extend(range(run.start + at - run.file_block, run.start + stop - run.file_block))
        at = stop
    fs.cache.want(wanted)


def _verify(fs: "Ext4", directory: Inode, data: bytes, file_block: int) -> None:
    if not fs.has_checksums:
        return
    if _is_node(fs, directory, data, file_block):
        htree.check_node(fs, directory, data, file_block)
    elif not checksum.dir_block_ok(data, fs.seed_of(directory)):
        raise Corrupt(Check.DIRECTORY_CHECKSUM, inode=directory.number, file_block=file_block)


def _is_node(fs: "Ext4", directory: Inode, data: bytes, file_block: int) -> bool:
    """Whether a block of an indexed directory is a node of the tree: the root, or one unused entry as long as it."""
    if not _is_indexed(fs, directory):
        return False
    return file_block == 0 or dirblock.is_one_record(data)


def _inline_areas(fs: "Ext4", directory: Inode) -> list[DirBlock]:
    """The two areas of an inline directory: behind the parent's number in the block array, and in the attribute."""
    first, rest = directory.block[INLINE_PARENT_BYTES:], xattrstore.inline_rest(fs, directory)
    total = inlinedata.check_size(fs, directory)
    areas = ((first, INLINE_PARENT_BYTES), (rest[:max(total - len(directory.block), 0)], len(directory.block)))
    return [dirblock.decode(fs, area, encrypted=directory.is_encrypted, base=base, inode=directory.number)
            for area, base in areas if area]


def _inline_parent(directory: Inode) -> int:
    return int.from_bytes(directory.block[:INLINE_PARENT_BYTES], "little")


def _find_inline(fs: "Ext4", directory: Inode, name: bytes) -> Entry | None:
    if name == b"..":
        return Entry(DOTDOT_COOKIE, _inline_parent(directory), D_TYPE_DIRECTORY, name)
    for area in _inline_areas(fs, directory):
        found = _find_in_block(fs, directory, area, name)
        if found is not None:
            return found
    return None


def _read_inline(fs: "Ext4", directory: Inode, cookie: int) -> Iterator[Name]:
    yield_from = [Entry(DOT_COOKIE, directory.number, D_TYPE_DIRECTORY, b"."),
                  Entry(DOTDOT_COOKIE, _inline_parent(directory), D_TYPE_DIRECTORY, b"..")]
    for area in _inline_areas(fs, directory):
        yield_from.extend(area.entries)
    for end, inode, d_type, name in yield_from:
        if end > cookie:
            yield Name(end, inode, d_type, name)
