"""Attribute entries where they are stored: behind the inode's fields, and in the inode's attribute block.

Kernel documentation, ext4, "Extended Attributes".  Everything is checked once, when a store is decoded.
"""

from typing import TYPE_CHECKING, NamedTuple

from . import checksum, layout
from .errors import Check, Corrupt
from .inode import BASE_BYTES, Inode

if TYPE_CHECKING:
    from .filesystem import Ext4

MAGIC = 0xEA020000
INDEX_SYSTEM = 7
INLINE_DATA_NAME = b"data"
MAX_VALUE_BYTES = 1 << 24
_MAGIC_BYTES = MAGIC.to_bytes(4, "little")
_PAD = 4


class Entry(NamedTuple):
    """One attribute: its value's bytes, or the inode that holds them."""

    namespace: int
    name: bytes
    value: bytes
    value_inode: int
    value_bytes: int
    hash: int


def in_inode(fs: "Ext4", inode: Inode) -> tuple[Entry, ...]:
    """The entries stored in the inode itself."""
    if inode.attributes is None:
        inode.attributes = _decode_inode(inode)
    entries: tuple[Entry, ...] = inode.attributes
    return entries


def in_block(fs: "Ext4", inode: Inode) -> tuple[Entry, ...]:
    """The entries of the inode's attribute block, none if it has no block."""
    block = inode.file_acl
    if not block:
        return ()
    return fs.cache.view(block, "xattrs", lambda data: _decode_block(inode, data),
                         lambda data: _verify(fs, inode, data))


def find(fs: "Ext4", inode: Inode, namespace: int, name: bytes) -> Entry | None:
    """The entry of a name as it is on disk, None if there is none."""
    for entry in in_inode(fs, inode):
        if entry.namespace == namespace and entry.name == name:
            return entry
    for entry in in_block(fs, inode):
        if entry.namespace == namespace and entry.name == name:
            return entry
    return None


def has_area(inode: Inode) -> bool:
    """Whether the inode holds an attribute area at all; tells nothing about what is in it."""
    start = BASE_BYTES + inode.extra_isize
    return inode.extra_isize != 0 and inode.raw[start:start + 4] == _MAGIC_BYTES


def inline_rest(fs: "Ext4", inode: Inode) -> bytes:
    """The value of ``system.data``: what of an inline inode's content did not fit into its block array."""
    for entry in in_inode(fs, inode):
        if entry.namespace == INDEX_SYSTEM and entry.name == INLINE_DATA_NAME:
            return entry.value
    return b""


def _decode_inode(inode: Inode) -> tuple[Entry, ...]:
    start = BASE_BYTES + inode.extra_isize
    if not has_area(inode):
        return ()
    return _decode_entries(inode.raw[start + 4:], 0, inode=inode.number)


def _decode_block(inode: Inode, data: bytes) -> tuple[Entry, ...]:
    magic, _, blocks, *_ = layout.XATTR_HEADER.unpack(data)
    if magic != MAGIC or blocks != 1:
        raise Corrupt(Check.XATTR_MAGIC, inode=inode.number, block=inode.file_acl, magic=f"{magic:#010x}")
    return _decode_entries(data, layout.XATTR_HEADER.size, inode=inode.number, block=inode.file_acl)


def _verify(fs: "Ext4", inode: Inode, data: bytes) -> None:
    if fs.has_checksums and not checksum.xattr_block_ok(data, inode.file_acl, fs.superblock.seed):
        raise Corrupt(Check.XATTR_CHECKSUM, inode=inode.number, block=inode.file_acl)


def _decode_entries(area: bytes, start: int, **where: object) -> tuple[Entry, ...]:
    """The entries from ``start`` up to four zero bytes; value offsets count from the start of ``area``.

    Values that overlap would be kept once per entry: a block of 64 KiB could then ask for 100 MiB.
    """
    rows, at = [], start
    while at + _PAD <= len(area) and area[at:at + _PAD] != bytes(_PAD):
        if at + layout.XATTR_ENTRY.size > len(area):
            raise Corrupt(Check.XATTR_ENTRY, offset=at, **where)
        row = layout.XATTR_ENTRY.unpack(area, at)
        name_end = at + layout.XATTR_ENTRY.size + row[0]
        name = area[at + layout.XATTR_ENTRY.size:name_end]
        if name_end > len(area) or b"\0" in name:
            raise Corrupt(Check.XATTR_ENTRY, offset=at, **where)
        rows.append((row, name))
        at = (name_end + _PAD - 1) & -_PAD
    if at + _PAD > len(area):
        raise Corrupt(Check.XATTR_ENTRY, offset=at, **where)
    if sum(row[4] for row, _ in rows if not row[3]) > len(area):
        raise Corrupt(Check.XATTR_ENTRY, values="overlap", **where)
    return tuple(_entry(area, at + _PAD, row, name, where) for row, name in rows)


def _entry(area: bytes, names_end: int, row: tuple[int, ...], name: bytes, where: dict[str, object]) -> Entry:
    _, index, offset, inode, size, name_hash = row
    if size > MAX_VALUE_BYTES:
        raise Corrupt(Check.XATTR_ENTRY, size=size, **where)
    if inode:
        return Entry(index, name, b"", inode, size, name_hash)
    if size and (offset < names_end or offset + size > len(area)):
        raise Corrupt(Check.XATTR_ENTRY, value_offset=offset, size=size, **where)
    return Entry(index, name, area[offset:offset + size], 0, size, name_hash)
