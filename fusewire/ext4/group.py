"""Block group descriptors.  Kernel documentation, ext4, "Block Group Descriptors"."""

import struct
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

from . import checksum, layout
from .errors import Check, Corrupt
from .features import Feature
from .units import FsBlock, Geometry

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .superblock import Superblock
    from .transaction import Transaction

INODE_UNINIT = 1
BLOCK_UNINIT = 2
WIDE_BYTES = 64
_U16 = struct.Struct("<H")
# where a field's low and high halves stand in the descriptor
_PLACES: dict[str, tuple[int, int | None]] = {
    "free_blocks": (0x0C, 0x2C), "free_inodes": (0x0E, 0x2E), "used_dirs": (0x10, 0x30), "flags": (0x12, None),
    "itable_unused": (0x1C, 0x32)}


class GroupDesc:
    """One group's descriptor, halves joined: where its bitmaps and inode table are, and its counters."""

    __slots__ = ("block_bitmap", "flags", "free_blocks", "free_inodes", "inode_bitmap", "inode_table", "itable_unused",
                 "used_dirs")

    def __init__(self, raw: bytes, wide: bool) -> None:
        low = layout.GROUP_DESC.unpack(raw)
        high = layout.GROUP_DESC_HI.unpack(raw, 32) if wide else (0,) * len(layout.GROUP_DESC_HI.fields)
        self.block_bitmap = FsBlock(low[0] | high[0] << 32)
        self.inode_bitmap = FsBlock(low[1] | high[1] << 32)
        self.inode_table = FsBlock(low[2] | high[2] << 32)
        self.free_blocks: int = low[3] | high[3] << 16
        self.free_inodes: int = low[4] | high[4] << 16
        self.used_dirs: int = low[5] | high[5] << 16
        self.flags: int = low[6]
        self.itable_unused: int = low[10] | high[6] << 16

    def clone(self) -> "GroupDesc":
        """A copy to be changed."""
        new = GroupDesc.__new__(GroupDesc)
        (new.block_bitmap, new.flags, new.free_blocks, new.free_inodes, new.inode_bitmap, new.inode_table,
         new.itable_unused, new.used_dirs) = _COPIED(self)
        return new


_COPIED = attrgetter(*GroupDesc.__slots__)


def load(fs: "Ext4", group: int) -> GroupDesc:
    """The descriptor of a group.  Raises ``Corrupt`` (GROUP_CHECKSUM, GROUP_LOCATION) or ``BlockMiss``."""
    block, offset = fs.superblock.descriptor_block(group)
    entry = fs.cache.entry(block)
    found: GroupDesc | None = entry.views.get(("group", group))
    if found is None:
        raw = bytes(entry.data[offset:offset + fs.geometry.group_desc_bytes])
        if ("group", group) not in entry.seals:
            _verify(fs, group, raw)
        found = entry.views["group", group] = _decode(fs, group, raw)
    return found


def raw(fs: "Ext4", group: int) -> bytes:
    """The descriptor's bytes as they are."""
    block, offset = fs.superblock.descriptor_block(group)
    return bytes(fs.cache.entry(block).data[offset:offset + fs.geometry.group_desc_bytes])


def change(tx: "Transaction", group: int, **fields: int) -> None:
    """Store fields of a descriptor (names of ``GroupDesc``); its checksums are sealed when the batch closes."""
    block, offset = tx.superblock.descriptor_block(group)
    new = load(tx, group).clone()
    entry = tx.edit_keeping(block)
    wide = tx.geometry.group_desc_bytes >= WIDE_BYTES
    for name, value in fields.items():
        low, high = _PLACES[name]
        _U16.pack_into(entry.data, offset + low, value & 0xFFFF)
        if high is not None and wide:
            _U16.pack_into(entry.data, offset + high, value >> 16)
        setattr(new, name, value)
    entry.views["group", group] = new
    if ("group", group) not in entry.seals:
        entry.seals["group", group] = partial(_seal, tx.superblock, group, offset)


def _seal(superblock: "Superblock", group: int, offset: int, data: bytearray,
          read: Callable[[int], bytes | None]) -> None:
    """Compute the checksums of a descriptor and of its bitmaps in the same batch."""
    geometry = superblock.geometry
    desc = bytearray(data[offset:offset + geometry.group_desc_bytes])
    if superblock.has_checksums:
        _seal_bitmaps(desc, geometry, superblock.seed, read, wide=len(desc) >= WIDE_BYTES)
        checksum.seal_group_desc(desc, group, superblock.seed)
    elif Feature.GDT_CSUM in superblock.features:
        checksum.seal_group_desc_crc16(desc, group, superblock.uuid)
    data[offset:offset + len(desc)] = desc


def _seal_bitmaps(desc: bytearray, geometry: Geometry, seed: int, read: Callable[[int], bytes | None],
                  wide: bool) -> None:
    view = GroupDesc(bytes(desc), wide)
    blocks, inodes = read(view.block_bitmap), read(view.inode_bitmap)
    if blocks is not None:
        checksum.seal_block_bitmap(blocks, geometry.blocks_per_group // geometry.cluster_blocks, desc, seed)
    if inodes is not None:
        checksum.seal_inode_bitmap(inodes, geometry.inodes_per_group, desc, seed)


def _verify(fs: "Ext4", group: int, raw: bytes) -> None:
    superblock = fs.superblock
    if superblock.has_checksums:
        verified = checksum.group_desc_ok(raw, group, superblock.seed)
    else:
        verified = Feature.GDT_CSUM not in superblock.features or checksum.group_desc_crc16_ok(
            raw, group, superblock.uuid)
    if not verified:
        raise Corrupt(Check.GROUP_CHECKSUM, group=group)


def _decode(fs: "Ext4", group: int, raw: bytes) -> GroupDesc:
    geometry = fs.geometry
    desc = GroupDesc(raw, fs.is_64bit)
    last_table_block = desc.inode_table + geometry.inode_table_blocks() - 1
    for name, at in (("block_bitmap", desc.block_bitmap), ("inode_bitmap", desc.inode_bitmap),
                     ("inode_table", desc.inode_table), ("inode_table_end", FsBlock(last_table_block))):
        if not geometry.first_data_block <= at < geometry.blocks:
            raise Corrupt(Check.GROUP_LOCATION, group=group, **{name: at})
    return desc
