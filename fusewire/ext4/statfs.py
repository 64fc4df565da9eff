"""The figures of statfs(2), computed as the kernel's ext4 does.

With ``bsddf`` (the default) the blocks that hold metadata are not counted as blocks of the file system.
"""

from typing import TYPE_CHECKING, NamedTuple

from . import group, inode
from .features import Feature
from .namespace import NAME_BYTES

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .superblock import Superblock

RESERVED_CLUSTERS_MOST = 4096  # kept back by the kernel so that writing back never runs out of blocks
RESERVED_SHARE = 50            # at most one cluster of so many
BITMAPS = 2


class StatFs(NamedTuple):
    """What statfs(2) tells; blocks of ``block_bytes``."""

    blocks: int
    free: int
    available: int  # to users other than root
    files: int
    files_free: int
    name_length: int
    block_bytes: int
    fsid: int


def statfs(fs: "Ext4") -> StatFs:
    """The figures now.  The first call reads every group descriptor, and may raise ``BlockMiss`` or ``Corrupt``."""
    geometry, fields = fs.geometry, fs.superblock.fields
    free_blocks, free_inodes = _free_now(fs)
    blocks = geometry.blocks - (0 if fs.options.minixdf else _overhead(fs))
    kept = fields["r_blocks_count"] + _reserved_clusters(fs) * geometry.cluster_blocks
    uuid = fs.superblock.uuid
    fsid = int.from_bytes(uuid[:8], "little") ^ int.from_bytes(uuid[8:], "little")
    return StatFs(blocks, free_blocks, max(free_blocks - kept, 0), geometry.inodes, free_inodes, NAME_BYTES,
                  geometry.block_bytes, fsid)


def _free_now(fs: "Ext4") -> tuple[int, int]:
    if fs.writing is None:
        return count_free(fs)
    return fs.writing.free_clusters * fs.geometry.cluster_blocks, fs.writing.free_inodes


def count_free(fs: "Ext4") -> tuple[int, int]:
    """(free blocks, free inodes) as the sum over all groups, which the superblock's own counters may lag behind."""
    if fs.free_counts is None:
        _want_descriptors(fs)
        descs = [group.load(fs, number) for number in range(fs.geometry.groups)]
        clusters = sum(desc.free_blocks for desc in descs)
        fs.free_counts = clusters * fs.geometry.cluster_blocks, sum(desc.free_inodes for desc in descs)
    return fs.free_counts


def _want_descriptors(fs: "Ext4") -> None:
    step = fs.geometry.descs_per_block()
    fs.cache.want(fs.superblock.descriptor_block(number)[0] for number in range(0, fs.geometry.groups, step))


def _reserved_clusters(fs: "Ext4") -> int:
    if Feature.EXTENTS not in fs.superblock.features:
        return 0
    clusters = fs.geometry.blocks // fs.geometry.cluster_blocks
    return min(clusters // RESERVED_SHARE, RESERVED_CLUSTERS_MOST)


def _overhead(fs: "Ext4") -> int:
    """Blocks that hold metadata of the file system itself."""
    superblock, geometry = fs.superblock, fs.geometry
    if Feature.BIGALLOC in superblock.features and 0 < superblock.fields["overhead_blocks"] <= geometry.blocks:
        return int(superblock.fields["overhead_blocks"]) * geometry.cluster_blocks
    tables = geometry.groups * (geometry.inode_table_blocks() + BITMAPS)
    return geometry.first_data_block + tables + _copies(superblock) + _journal_blocks(fs)


def _copies(superblock: "Superblock") -> int:
    """Blocks of superblock copies and of group descriptors."""
    geometry = superblock.geometry
    table_blocks = -(-geometry.groups // geometry.descs_per_block())
    holders = sum(1 for number in range(geometry.groups) if superblock.has_copy_in(number))
    if Feature.META_BG not in superblock.features:
        return holders * (1 + table_blocks)
    first = superblock.fields["first_meta_bg"]
    plain = min(first, table_blocks)
    in_meta_groups = 0
    for meta in range(plain, table_blocks):
        base = meta * geometry.descs_per_block()
        last = base + geometry.descs_per_block() - 1
        in_meta_groups += sum(1 for number in {base, base + 1, last} if number < geometry.groups)
    limit = first * geometry.descs_per_block()
    with_plain = sum(1 for number in range(min(limit, geometry.groups)) if superblock.has_copy_in(number))
    return holders + with_plain * first + in_meta_groups


def _journal_blocks(fs: "Ext4") -> int:
    number = fs.superblock.fields["journal_inum"]
    if Feature.HAS_JOURNAL not in fs.superblock.features or not number:
        return 0
    size: int = inode.load(fs, number).size
    return fs.geometry.block_of(size)
