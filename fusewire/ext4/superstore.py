"""The superblock as it changes: fields read from its block, and patched there in transactions.

``Superblock`` holds what is fixed while a file system is mounted; counters, states and lists are read here.
"""

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import checksum, layout
from .units import SUPERBLOCK_OFFSET_BYTES

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .transaction import Transaction

_CODES = {"u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q", "s16": "<h"}
_SIZE = layout.SUPERBLOCK.size


def place(fs: "Ext4") -> tuple[int, int]:
    """(block, byte offset in it) of the superblock."""
    return fs.geometry.block_of(SUPERBLOCK_OFFSET_BYTES), fs.geometry.within_block(SUPERBLOCK_OFFSET_BYTES)


def get(fs: "Ext4", name: str) -> int:
    """A number of the superblock as it is now, by its name in ``layout.SUPERBLOCK``."""
    block, offset = place(fs)
    value: int = struct.unpack_from(_CODES[layout.SUPERBLOCK.types[name]], fs.cache.entry(block).data,
                                    offset + layout.SUPERBLOCK.offsets[name])[0]
    return value


def get_bytes(fs: "Ext4", name: str) -> bytes:
    """A field of bytes of the superblock as it is now."""
    block, offset = place(fs)
    at = offset + layout.SUPERBLOCK.offsets[name]
    return bytes(fs.cache.entry(block).data[at:at + int(layout.SUPERBLOCK.types[name][1:])])


def change(tx: "Transaction", **fields: int | bytes) -> None:
    """Store fields of the superblock; its checksum is sealed when the batch closes."""
    block, offset = place(tx)
    patch(tx.edit(block), offset, fields)
    checked = tx.has_checksums

    def seal(raw: bytearray, _read: object) -> None:
        if checked:
            record = raw[offset:offset + _SIZE]
            checksum.seal_superblock(record)
            raw[offset:offset + _SIZE] = record

    tx.seal(block, "superblock", seal)


def patch(data: bytearray, offset: int, fields: Mapping[str, int | bytes]) -> None:
    """Store fields in the superblock that stands at ``offset`` in a block's bytes."""
    for name, value in fields.items():
        at = offset + layout.SUPERBLOCK.offsets[name]
        kind = layout.SUPERBLOCK.types[name]
        if isinstance(value, bytes):
            data[at:at + int(kind[1:])] = value.ljust(int(kind[1:]), b"\0")
        else:
            struct.pack_into(_CODES[kind], data, at, value)
