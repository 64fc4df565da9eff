"""One block of directory entries, decoded and checked.  Kernel documentation, ext4, "Linear (Classic) Directories".

Each entry is checked as it is met: its record ends inside the block and holds its name, its inode number exists, its
name could be a file's name.
"""

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from .errors import Check, Corrupt

if TYPE_CHECKING:
    from .filesystem import Ext4

_HEAD = struct.Struct("<IHBB")
_PAIR = struct.Struct("<II")
HEAD_BYTES = _HEAD.size
ALIGN = 4
SMALLEST = 12
HUGE_BLOCK = 65536
# ext4's file types, as the d_type that readdir(3) gives: regular, directory, character, block, fifo, socket, symlink
_TYPES = (0, 8, 4, 2, 6, 1, 12, 10)
D_TYPES = _TYPES + (0,) * (256 - len(_TYPES))


class Entry(NamedTuple):
    """One entry in use: where its record ends (from the start of its block), and what it names."""

    end: int
    inode: int
    d_type: int
    name: bytes


class DirBlock:
    """The entries of one block in order, and by name.

    ``alias`` (by folded name), ``shown`` (with presented names) and ``ordered`` (with their hashes; see ``dirorder``)
    are made when they are asked for.  ``file_block`` is where in its directory the block was found (None: not looked up
    yet), ``hashes`` the pairs that casefolded and encrypted entries carry.
    """

    __slots__ = ("alias", "entries", "file_block", "hashes", "names", "ordered", "shown")

    def __init__(self, entries: list[Entry], hashes: dict[bytes, tuple[int, int]] | None = None) -> None:
        self.entries = entries
        self.names = {entry.name: entry for entry in entries}
        self.alias: dict[bytes, Entry] | None = None
        self.shown: list[Entry] | None = None
        self.ordered: list[tuple[int, int, Entry]] | None = None
        self.hashes = hashes or {}
        self.file_block: int | None = None


def decode(fs: "Ext4", data: bytes, *, encrypted: bool, hashed: bool = False, base: int = 0,
           **where: object) -> DirBlock:
    """The entries of a block, or of one area of inline data that starts ``base`` bytes into the directory.

    ``hashed``: each entry carries the pair of its hashes behind the name.

    Raises ``Corrupt`` (DIRENT_LENGTH, DIRENT_INODE, DIRENT_NAME) with ``where`` and the offset.
    """
    pairs: dict[bytes, tuple[int, int]] = {}
    entries, at, size, inodes = [], 0, len(data), fs.geometry.inodes
    unpack, typed = _HEAD.unpack_from, fs.has_file_types
    while at < size:
        if at + HEAD_BYTES > size:
            raise Corrupt(Check.DIRENT_LENGTH, offset=base + at, **where)
        inode, length, name_length, kind = unpack(data, at)
        if size == HUGE_BLOCK:
            length = _long_record(length)
        end = at + length
        if length < SMALLEST or length % ALIGN or end > size or name_length + HEAD_BYTES > length:
            raise Corrupt(Check.DIRENT_LENGTH, offset=base + at, length=length, name_length=name_length, **where)
        if inode:
            if inode > inodes:
                raise Corrupt(Check.DIRENT_INODE, offset=base + at, inode_named=inode, **where)
            name = data[at + HEAD_BYTES:at + HEAD_BYTES + name_length]
            if not name or (not encrypted and (b"/" in name or b"\0" in name)):
                raise Corrupt(Check.DIRENT_NAME, offset=base + at, name=name, **where)
            if hashed and name not in (b".", b".."):
                pair = (HEAD_BYTES + name_length + ALIGN - 1) // ALIGN * ALIGN
                if pair + _PAIR.size > length:
                    raise Corrupt(Check.DIRENT_LENGTH, offset=base + at, length=length, hashes_at=pair, **where)
                pairs[name] = _PAIR.unpack_from(data, at + pair)
            entries.append(Entry(base + end, inode, D_TYPES[kind] if typed else 0, name))
        at = end
    return DirBlock(entries, pairs)


def starts(data: bytes) -> Iterator[int]:
    """Where the records in use begin, in a block that was decoded before."""
    at = 0
    while at < len(data):
        inode, length, _, _ = _HEAD.unpack_from(data, at)
        if inode:
            yield at
        at += _long_record(length) if len(data) == HUGE_BLOCK else length


def is_one_record(data: bytes) -> bool:
    """Whether the first record takes the whole block, as in an inner node of a hash tree."""
    length: int = _HEAD.unpack_from(data)[1]
    return (_long_record(length) if len(data) == HUGE_BLOCK else length) == len(data)


def _long_record(length: int) -> int:
    """A record length in a 64 KiB block: its two lowest bits are bits 16 and 17; 0 and 65535 mean the whole block."""
    if length in (0, HUGE_BLOCK - 1):
        return HUGE_BLOCK
    return length & 0xFFFC | (length & 3) << 16
