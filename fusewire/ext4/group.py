"""Block group descriptors.  Kernel documentation, ext4, "Block Group Descriptors"."""

from typing import TYPE_CHECKING

from . import checksum, layout
from .errors import Check, Corrupt
from .features import Feature
from .units import FsBlock

if TYPE_CHECKING:
    from .filesystem import Ext4

INODE_UNINIT = 1
BLOCK_UNINIT = 2


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


def load(fs: "Ext4", group: int) -> GroupDesc:
    """The descriptor of a group.  Raises ``Corrupt`` (GROUP_CHECKSUM, GROUP_LOCATION) or ``BlockMiss``."""
    block, offset = fs.superblock.descriptor_block(group)
    entry = fs.cache.entry(block)
    found: GroupDesc | None = entry.views.get(("group", group))
    if found is None:
        raw = bytes(entry.data[offset:offset + fs.geometry.group_desc_bytes])
        if not entry.trusted:
            _verify(fs, group, raw)
        found = entry.views["group", group] = _decode(fs, group, raw)
    return found


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
