"""The records of one directory block as room: where a name fits, entering it, taking it out.

Kernel documentation, ext4, "Linear (Classic) Directories".  Records fill the block without gaps; what a record is
longer than its name needs is room for another.  Pure functions of a block's bytes and of what was decoded from it.

I1  What is returned beside changed bytes equals what decoding these bytes would give.
I2  Records end where ``end`` says: under metadata_csum 12 bytes before the block does, for the checksum.
"""

import stat
import struct
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .dirblock import ALIGN, D_TYPES, HEAD_BYTES, HUGE_BLOCK, SMALLEST, DirBlock, Entry
from .errors import Check, Corrupt

CHECKSUM_BYTES = 12     # the fake record at the end of a block that holds its checksum
LONGEST_RECORD = 264    # of a name of 255 bytes
_HEAD = struct.Struct("<IHBB")
_LENGTH = struct.Struct("<H")
_LENGTH_AT = 4
_MAX_STORED = 0xFFFF
_CHECKSUM_TYPE = 0xDE   # a file type that no entry has
# the file type in an entry, by the S_IFMT bits of the mode
FILE_TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFSOCK: 6,
              stat.S_IFLNK: 7}


class Link(NamedTuple):
    """A name to be entered: the inode that it leads to, and the file type stored with it (0 without that feature)."""

    name: bytes
    inode: int
    file_type: int


class Room:
    """Where the records of a block begin, and those among them with room for another: (start, bytes to spare)."""

    __slots__ = ("spare", "starts")

    def __init__(self, starts: list[int], spare: list[tuple[int, int]]) -> None:
        self.starts, self.spare = starts, spare

    def slot(self, need: int) -> int | None:
        """The first record with ``need`` bytes to spare, as an index into ``spare``."""
        for index, (_, slack) in enumerate(self.spare):
            if slack >= need:
                return index
        return None


def record_bytes(name_bytes: int) -> int:
    """What a name of this length needs."""
    return (HEAD_BYTES + name_bytes + ALIGN - 1) & -ALIGN


def room(data: bytes, end: int, **where: object) -> Room:
    """The room of a block whose records were checked already; ``Corrupt(DIRENT_LENGTH)`` if none ends at ``end``."""
    starts, spare, at, unpack = [], [], 0, _HEAD.unpack_from
    while at < end:
        inode, length, name_bytes, _ = unpack(data, at)
        length = _length(length, len(data))
        starts.append(at)
        slack = length - record_bytes(name_bytes) if inode else length
        if slack >= SMALLEST:
            spare.append((at, slack))
        at += length
    if at != end:
        raise Corrupt(Check.DIRENT_LENGTH, offset=starts[-1], end=end, **where)
    return Room(starts, spare)


def enter(data: bytearray, names: DirBlock, free: Room, slot: int, link: Link) -> tuple[DirBlock, Room]:
    """Enter a name in the record ``free.spare[slot]``, which has room for it; the views as they are then."""
    start, slack = free.spare[slot]
    end = start + _length_at(data, start)
    new = end - slack
    left = slack - record_bytes(len(link.name))
    entries, by_name, starts, spare = names.entries.copy(), names.names.copy(), free.starts, free.spare.copy()
    at = bisect_left(entries, (end,))
    if new != start:
        _put_length(data, start, new - start)
        _move_end(entries, by_name, at, new)
        at += 1
        starts = starts.copy()
        insort(starts, new)
    spare[slot:slot + 1] = [(new, left)] if left >= SMALLEST else []
    _put(data, new, slack, link)
    entry = Entry(end, link.inode, D_TYPES[link.file_type], link.name)
    entries.insert(at, entry)
    by_name[link.name] = entry
    return _views(names, entries, by_name), Room(starts, spare)


def leave(data: bytearray, names: DirBlock, free: Room, name: bytes) -> tuple[DirBlock, Room]:
    """Take a name out: its record joins the one before it, or becomes unused where it is the first."""
    end = names.names[name].end
    entries, by_name, starts = names.entries.copy(), names.names.copy(), free.starts
    slot, at = bisect_left(starts, end) - 1, bisect_left(entries, (end,))
    start = first = starts[slot]
    del entries[at], by_name[name]
    data[start:end] = bytes(end - start)
    used = 0
    if slot:
        first = starts[slot - 1]
        inode, _, name_bytes, _ = _HEAD.unpack_from(data, first)
        used = record_bytes(name_bytes) if inode else 0
        starts = starts.copy()
        del starts[slot]
        if at and entries[at - 1].end == start:
            _move_end(entries, by_name, at - 1, end)
    _put_length(data, first, end - first)
    low, high = bisect_left(free.spare, (first,)), bisect_left(free.spare, (end,))
    spare = [*free.spare[:low], (first, end - first - used), *free.spare[high:]]
    return _views(names, entries, by_name), Room(starts, spare)


def point(data: bytearray, names: DirBlock, free: Room, link: Link) -> DirBlock:
    """Let a name that is here lead to another inode."""
    old = names.names[link.name]
    start = free.starts[bisect_left(free.starts, old.end) - 1]
    _HEAD.pack_into(data, start, link.inode, _LENGTH.unpack_from(data, start + _LENGTH_AT)[0], len(link.name),
                    link.file_type)
    entries, by_name = names.entries.copy(), names.names.copy()
    entry = Entry(old.end, link.inode, D_TYPES[link.file_type], link.name)
    entries[bisect_left(entries, (old.end,))] = by_name[link.name] = entry
    return _views(names, entries, by_name)


def links(data: bytes, end: int) -> Iterator[tuple[Link, int]]:
    """The names of a block whose records were checked already, and the lengths of their records."""
    at = 0
    while at < end:
        inode, stored, name_bytes, file_type = _HEAD.unpack_from(data, at)
        length = _length(stored, len(data))
        if inode:
            yield Link(bytes(data[at + HEAD_BYTES:at + HEAD_BYTES + name_bytes]), inode, file_type), length
        at += length


def take(data: bytearray, records: bytes, last: int, end: int) -> None:
    """Put records of another block to the front of an empty one; the one at ``last`` of them gets all that is left."""
    data[:len(records)] = records
    _put_length(data, last, end - last)


def fill(data: bytearray, end: int, content: Iterable[Link]) -> None:
    """Replace all records of a block: the names close together, the last with all the room behind it.

    What lies behind ``end`` becomes the unused record that holds the checksum, once that is computed.
    """
    data[:] = bytes(len(data))
    if end < len(data):
        _HEAD.pack_into(data, end, 0, CHECKSUM_BYTES, 0, _CHECKSUM_TYPE)
    at, last = 0, 0
    for link in content:
        _put(data, at, record_bytes(len(link.name)), link)
        last, at = at, at + record_bytes(len(link.name))
    _put_length(data, last, end - last)


def _put(data: bytearray, at: int, length: int, link: Link) -> None:
    stored = length if length < HUGE_BLOCK else _MAX_STORED
    _HEAD.pack_into(data, at, link.inode, stored, len(link.name), link.file_type)
    data[at + HEAD_BYTES:at + HEAD_BYTES + len(link.name)] = link.name


def _move_end(entries: list[Entry], by_name: dict[bytes, Entry], at: int, end: int) -> None:
    """Entry ``at`` now ends at ``end``."""
    old = entries[at]
    entry = entries[at] = Entry(end, old.inode, old.d_type, old.name)
    by_name[old.name] = entry


def _views(old: DirBlock, entries: list[Entry], by_name: dict[bytes, Entry]) -> DirBlock:
    """The same block with these entries, whose index by name is at hand (unless a broken disk has a name twice)."""
    if len(by_name) != len(entries):
        block = DirBlock(entries)
    else:
        block = DirBlock([])
        block.entries, block.names = entries, by_name
    block.file_block = old.file_block
    return block


def _length(stored: int, block_bytes: int) -> int:
    """A record's length; in blocks of 64 KiB its two lowest bits are bits 16 and 17, 0 and 65535 the whole block."""
    if block_bytes < HUGE_BLOCK:
        return stored
    return HUGE_BLOCK if stored in (0, _MAX_STORED) else stored & 0xFFFC | (stored & 3) << 16


def _length_at(data: bytearray, start: int) -> int:
    return _length(_LENGTH.unpack_from(data, start + _LENGTH_AT)[0], len(data))


def _put_length(data: bytearray, start: int, length: int) -> None:
    _LENGTH.pack_into(data, start + _LENGTH_AT, length if length < HUGE_BLOCK else _MAX_STORED)
