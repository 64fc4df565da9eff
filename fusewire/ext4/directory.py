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

from . import blockmap, casefold, checksum, dirblock, dirhash, extents, fscrypt, htree, inlinedata, iomap, xattrstore
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
DOTS = (b".", b"..")
UNUSABLE_INDEX = (Check.HTREE_ROOT, Check.HTREE_NODE, Check.HTREE_DEPTH)  # the entries are there without the index too


class Name(NamedTuple):
    """One name of a directory: the cookie after it, the inode number, the d_type of readdir(3), the name."""

    cookie: int
    inode: int
    d_type: int
    name: bytes


class Sought(NamedTuple):
    """What a lookup looks for: the bytes of a name on disk, or failing that its folded form.

    Where ``presented`` is set, the name is one of an encrypted directory, and stands for the ciphertext ``name`` or for
    one that only begins with it.
    """

    name: bytes
    folded: bytes | None = None
    presented: fscrypt.PresentedName | None = None


def find(fs: "Ext4", directory: Inode, name: bytes) -> int:
    """The inode number that a name has in a directory.  Raises ``Refused(ENOENT)``, ``Corrupt``, ``BlockMiss``."""
    sought = _sought(directory, name)
    if sought is None:
        raise Refused(errno.ENOENT)
    if directory.is_inline:
        found = _find_inline(fs, directory, sought)
    elif is_indexed(fs, directory):
        found = _find_indexed(fs, directory, sought)
    else:
        found = _find_linear(fs, directory, sought)
    if found is None:
        raise Refused(errno.ENOENT)
    return found.inode


def _sought(directory: Inode, name: bytes) -> Sought | None:
    """How to look for a name; None if no entry can have it."""
    if name in DOTS:
        return Sought(name)
    if directory.is_encrypted:
        presented = fscrypt.parse_name(name)
        return None if presented is None else Sought(presented.ciphertext, None, presented)
    return Sought(name, casefold.fold(name) if directory.is_casefold else None)


def read(fs: "Ext4", directory: Inode, cookie: int) -> Iterator[Name]:
    """The names from a cookie on, "." and ".." among them.  Raises ``Corrupt`` or ``BlockMiss`` when advanced."""
    if directory.is_inline:
        return _read_inline(fs, directory, cookie)
    return _read_blocks(fs, directory, cookie)


def _read_blocks(fs: "Ext4", directory: Inode, cookie: int) -> Iterator[Name]:
    """The names in blocks.  Blocks without names are stepped over once, however often reading has to wait."""
    byte_of, within = fs.geometry.byte_of, fs.geometry.within_block(cookie)
    file_block = fs.geometry.block_of(cookie)
    while file_block < fs.geometry.blocks_for(directory.size):
        gap = ("no names", directory.raw, directory.number, cookie)
        beyond = fs.scans.get(gap, file_block)
        if beyond > file_block:
            file_block, within = beyond, 0
        try:
            block = names_at(fs, directory, file_block)
        except BlockMiss:
            fs.remember(gap, file_block)
            raise
        start, shown = byte_of(file_block), _shown(fs, directory, block)
        if within:
            shown = shown[_begun_before(fs, directory, file_block, within):]
        for end, inode, d_type, name in shown:
            cookie = start + end
            yield Name(cookie, inode, d_type, name)
        file_block, within = file_block + 1, 0


def _begun_before(fs: "Ext4", directory: Inode, file_block: int, within: int) -> int:
    """How many names of a block have records that begin before an offset: records may have grown over it since."""
    data = fs.cache.read(device_block(fs, directory, file_block))
    return sum(start < within for start in dirblock.starts(data))


def _find_linear(fs: "Ext4", directory: Inode, sought: Sought) -> Entry | None:
    """Search block by block, going on where an earlier attempt had to wait for blocks.

    A changed directory has a changed inode, and is searched from its start.
    """
    search = ("lookup", directory.raw, directory.number, sought)
    file_block = first = fs.scans.pop(search, 0)
    try:
        for file_block in range(first, fs.geometry.blocks_for(directory.size)):
            found = _find_in_block(names_at(fs, directory, file_block), sought)
            if found is not None:
                return found
    except BlockMiss:
        fs.remember(search, file_block)
        raise
    return None


def _find_indexed(fs: "Ext4", directory: Inode, sought: Sought) -> Entry | None:
    """Search the leaves that the name's hash leads to; a broken or unusable index only costs speed."""
    if sought.name in DOTS:
        return _find_in_block(names_at(fs, directory, 0), sought)
    try:
        top = index_root(fs, directory)
        hash_value = _hash_of(fs, top, sought)
        if hash_value is None:
            return _find_linear(fs, directory, sought)
        for leaf in htree.leaves(top, lambda block: index_node(fs, directory, block), hash_value):
            found = _find_in_block(names_at(fs, directory, leaf), sought)
            if found is not None:
                return found
    except Corrupt as error:
        if error.check not in UNUSABLE_INDEX:
            raise
        return _find_linear(fs, directory, sought)
    return None


def _hash_of(fs: "Ext4", top: htree.Root, sought: Sought) -> int | None:
    """The hash that leads to a name in a tree, None if only the key of an encrypted directory could tell it."""
    if top.version not in dirhash.COMPUTABLE:
        return None
    if sought.presented is not None and not sought.presented.whole:
        return sought.presented.hashes[0] & ~htree.CONTINUED
    return dirhash.dirhash(sought.folded or sought.name, top.version, fs.superblock.hash_seed)[0]


def _find_in_block(block: DirBlock, sought: Sought) -> Entry | None:
    """The entry of a name: by its bytes, or by its folded or presented form where the directory compares by that."""
    if sought.presented is not None and not sought.presented.whole:
        return next((entry for entry in block.entries if sought.presented.matches(entry.name)), None)
    found = block.names.get(sought.name)
    if found is not None or sought.folded is None:
        return found
    if block.alias is None:
        block.alias = {casefold.fold(entry.name) or entry.name: entry for entry in block.entries}
    return block.alias.get(sought.folded)


def _shown(fs: "Ext4", directory: Inode, block: DirBlock) -> list[Entry]:
    """The entries of a block as readdir shows them: encrypted names presented as the kernel does without the key."""
    if not directory.is_encrypted:
        return block.entries
    if block.shown is None:
        block.shown = [entry if entry.name in DOTS else entry._replace(name=fscrypt.present_name(entry.name, hashes))
                       for entry, hashes in _with_hashes(fs, directory, block)]
    return block.shown


def _with_hashes(fs: "Ext4", directory: Inode, block: DirBlock) -> list[tuple[Entry, tuple[int, int]]]:
    """Each entry with the pair that its presented name holds; see ``fscrypt`` for when that is (0, 0)."""
    version = listing_order(fs, directory)
    if version is None:
        return [(entry, (0, 0)) for entry in block.entries]
    if directory.is_casefold:
        return [(entry, block.hashes.get(entry.name, (0, 0))) for entry in block.entries]
    seed = fs.superblock.hash_seed
    return [(entry, dirhash.dirhash(entry.name, version, seed)) for entry in block.entries]


def listing_order(fs: "Ext4", directory: Inode) -> int | None:
    """The hash version in whose order the kernel lists a directory, None if it goes by the order of the blocks."""
    single = directory.is_inline or fs.geometry.block_of(directory.size) == 1
    version: int | None = None
    if is_indexed(fs, directory):
        try:
            version = index_root(fs, directory).version
        except Corrupt as error:
            if error.check not in UNUSABLE_INDEX:
                raise
    elif fs.has_dir_index and single:
        version = fs.superblock.hash_version(fs.superblock.fields["def_hash_version"])
    return version if directory.is_casefold or version in dirhash.COMPUTABLE else None


def is_indexed(fs: "Ext4", directory: Inode) -> bool:
    """Whether a directory is to be searched by its hash tree."""
    return bool(directory.flags & FLAG_INDEX) and fs.has_dir_index


def index_root(fs: "Ext4", directory: Inode) -> htree.Root:
    """The checked root of an indexed directory's hash tree.  Raises ``Corrupt``."""
    block = device_block(fs, directory, 0)
    key = ("htree root", directory.number, directory.generation)
    return fs.cache.view(block, key, lambda data: htree.root(fs, directory, data),
                         lambda data: htree.check_node(fs, directory, data, 0))


def index_node(fs: "Ext4", directory: Inode, file_block: int) -> htree.Node:
    """A checked inner node of an indexed directory's hash tree.  Raises ``Corrupt``."""
    block = device_block(fs, directory, file_block)
    key = ("htree", directory.number, directory.generation)
    return fs.cache.view(block, key, lambda data: htree.inner(fs, directory, data, file_block),
                         lambda data: htree.check_node(fs, directory, data, file_block))


def names_at(fs: "Ext4", directory: Inode, file_block: int) -> DirBlock:
    """The decoded entries of one block of a directory, which is read ahead if it is not in memory."""
    block = device_block(fs, directory, file_block)
    key = ("directory", directory.number, directory.generation)
    try:
        found: DirBlock | None = fs.cache.entry(block).views.get(key)
    except BlockMiss:
        _read_ahead(fs, directory, file_block)
        raise
    if found is None:
        found = fs.cache.view(block, key, lambda data: _decode(fs, directory, data, file_block=file_block),
                              lambda data: _verify(fs, directory, data, file_block))
    if found.file_block is None:
        found.file_block = file_block
    if found.file_block != file_block:
        raise Corrupt(Check.DIRECTORY_REPEATS, inode=directory.number, block=block, file_block=file_block,
                      also=found.file_block)
    return found


def _decode(fs: "Ext4", directory: Inode, data: bytes, base: int = 0, **where: object) -> DirBlock:
    encrypted = directory.is_encrypted
    return dirblock.decode(fs, data, encrypted=encrypted, hashed=encrypted and directory.is_casefold, base=base,
                           inode=directory.number, **where)


def device_block(fs: "Ext4", directory: Inode, file_block: int) -> int:
    """Where a block of a directory lies on the device; ``Corrupt(DIRECTORY_HOLE)`` if nowhere."""
    if directory.has_extents:
        place = extents.device_block(fs, directory, file_block)
    else:
        run = blockmap.find(fs, directory, file_block)
        place = None if run.start is None else run.start + file_block - run.file_block
    if place is None:
        raise Corrupt(Check.DIRECTORY_HOLE, inode=directory.number, file_block=file_block)
    return place


def _read_ahead(fs: "Ext4", directory: Inode, file_block: int) -> None:
    """Miss all blocks of the window around ``file_block``; the further a reader has come, the longer it is."""
    window, most = READAHEAD_BLOCKS, min(MOST_READAHEAD_BLOCKS, fs.most_readahead)
    while window < min(file_block, most):
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
    if not is_indexed(fs, directory):
        return False
    return file_block == 0 or dirblock.is_one_record(data)


def _inline_areas(fs: "Ext4", directory: Inode) -> list[DirBlock]:
    """The two areas of an inline directory: behind the parent's number in the block array, and in the attribute."""
    first, rest = directory.block[INLINE_PARENT_BYTES:], xattrstore.inline_rest(fs, directory)
    total = inlinedata.check_size(fs, directory)
    areas = ((first, INLINE_PARENT_BYTES), (rest[:max(total - len(directory.block), 0)], len(directory.block)))
    return [_decode(fs, directory, area, base) for area, base in areas if area]


def _inline_parent(directory: Inode) -> int:
    return int.from_bytes(directory.block[:INLINE_PARENT_BYTES], "little")


def _find_inline(fs: "Ext4", directory: Inode, sought: Sought) -> Entry | None:
    if sought.name == b"..":
        return Entry(DOTDOT_COOKIE, _inline_parent(directory), D_TYPE_DIRECTORY, sought.name)
    for area in _inline_areas(fs, directory):
        found = _find_in_block(area, sought)
        if found is not None:
            return found
    return None


def _read_inline(fs: "Ext4", directory: Inode, cookie: int) -> Iterator[Name]:
    yield_from = [Entry(DOT_COOKIE, directory.number, D_TYPE_DIRECTORY, b"."),
                  Entry(DOTDOT_COOKIE, _inline_parent(directory), D_TYPE_DIRECTORY, b"..")]
    for area in _inline_areas(fs, directory):
        yield_from.extend(_shown(fs, directory, area))
    for end, inode, d_type, name in yield_from:
        if end > cookie:
            yield Name(end, inode, d_type, name)
