"""The names of a directory in an order that changes do not disturb: for a file system that is being written.

readdir(3) gives every name that is there all the time exactly once, whatever else comes and goes meanwhile.  Splitting
a leaf moves names to other blocks, so directories with an index, and those that will get one, are read in the order of
their names' hashes, as the kernel does.  Other directories never move a record, and are read from block to block.

I1  A cookie behind a name is its hash (31 and 32 bits) and ``FIRST``; names with one hash follow each other by one.
I2  Cookies only rise, also in a broken directory: who reads on comes to an end.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import directory, dirhash, htree
from .dirblock import Entry
from .directory import DOTS, Name
from .htree import CONTINUED
from .inode import Inode

if TYPE_CHECKING:
    from .filesystem import Ext4

FIRST = 3                       # cookies 1 and 2 stand behind "." and ".."
_END = 1 << 32                  # of hashes
Ordered = tuple[int, Entry]     # (key, entry): the key is the hash as 63 bits


def read(fs: "Ext4", of: Inode, cookie: int) -> Iterator[Name]:
    """The names from a cookie on, "." and ".." among them.  Raises ``Corrupt`` or ``BlockMiss`` when advanced."""
    if fs.writing is None or of.is_inline or of.is_casefold or of.is_encrypted:
        return directory.read(fs, of, cookie)
    version = directory.listing_order(fs, of)
    return directory.read(fs, of, cookie) if version is None else _by_hash(fs, of, version, cookie)


def _by_hash(fs: "Ext4", of: Inode, version: int, cookie: int) -> Iterator[Name]:
    dots = directory.names_at(fs, of, 0).names
    for place, name in enumerate(DOTS, 1):
        entry = dots.get(name)
        if entry is not None and place > cookie:
            yield Name(place, entry.inode, entry.d_type, name)
    last = max(cookie, FIRST - 1)
    for rows in _groups(fs, of, version, max(cookie - FIRST, 0)):
        for key, entry in rows:
            if key + FIRST > last:
                last = key + FIRST
                yield Name(last, entry.inode, entry.d_type, entry.name)


def _groups(fs: "Ext4", of: Inode, version: int, key: int) -> Iterator[list[Ordered]]:
    """The names from the leaf on that holds a key: leaf by leaf, those in which one hash goes on taken together."""
    if not directory.is_indexed(fs, of):
        yield _sorted(_keyed(fs, of, version, 0, 0, _END))
        return
    path = htree.descend(directory.index_root(fs, of), lambda block: directory.index_node(fs, of, block),
                         key >> 32 << 1)
    low: int | None = path[-1][0].hashes[path[-1][1]]
    while low is not None:
        rows: list[Ordered] = []
        first = low & ~CONTINUED
        while True:
            node, index = path[-1]
            leaf = node.blocks[index]
            low = htree.advance(path, lambda block: directory.index_node(fs, of, block))
            rows += _keyed(fs, of, version, leaf, first, _END if low is None else low | CONTINUED)
            if low is None or not low & CONTINUED:
                break
        yield _sorted(rows)


def _keyed(fs: "Ext4", of: Inode, version: int, file_block: int, low: int, high: int) -> list[Ordered]:
    """The names of a block with their keys; one whose hash is not of this leaf, in [low, high], comes first in it."""
    block = directory.names_at(fs, of, file_block)
    hashed: list[tuple[int, int, Entry]] | None = block.ordered
    if hashed is None:
        seed = fs.superblock.hash_seed
        hashed = block.ordered = [(*dirhash.dirhash(entry.name, version, seed), entry) for entry in block.entries
                                  if entry.name not in DOTS]
    return [((major if low <= major <= high else low) >> 1 << 32 | minor, entry) for major, minor, entry in hashed]


def _sorted(rows: list[Ordered]) -> list[Ordered]:
    """Rows in order, the keys of equal hashes told apart (by their names' order)."""
    rows.sort(key=lambda row: (row[0], row[1].name))
    result: list[Ordered] = []
    last = -1
    for key, entry in rows:
        last = max(key, last + 1)
        result.append((last, entry))
    return result
