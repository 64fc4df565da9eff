"""The figures of statfs(2), computed as the kernel's ext4 does.

With ``bsddf`` (the default) the blocks that hold metadata are not counted as blocks of the file system.
"""

from typing import TYPE_CHECKING, NamedTuple

from . import group, inode
from .blocks import BlockMiss
from .features import Feature
from .namespace import NAME_BYTES

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .superblock import Superblock
    from .units import Geometry

RESERVED_CLUSTERS_MOST = 4096  # kept back by the kernel so that writing back never runs out of blocks
RESERVED_SHARE = 50            # at most one cluster of so many
BITMAPS = 2
MOST_GROUPS_BY_CLUSTER = 1 << 16  # 8 TiB at least; beyond that clusters shared by structures no longer matter
COPIES_IN_META_GROUP = 3       # of its one block of descriptors: in its first, second and last group


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
    kept = fields["r_blocks_count"] + reserved_clusters(fs) * geometry.cluster_blocks
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
        geometry, search = fs.geometry, "free counts"
        number, clusters, inodes = fs.scans.pop(search, (0, 0, 0))
        try:
            while number < geometry.groups:
                desc = _next_desc(fs, number)
                clusters, inodes, number = clusters + desc.free_blocks, inodes + desc.free_inodes, number + 1
        except BlockMiss:
            fs.remember(search, (number, clusters, inodes))
            raise
        fs.free_counts = clusters * geometry.cluster_blocks, inodes
    return fs.free_counts


def _next_desc(fs: "Ext4", number: int) -> group.GroupDesc:
    """A descriptor, those after it being read ahead."""
    step, block = fs.geometry.descs_per_block(), fs.superblock.descriptor_block
    if number % step == 0 and not fs.cache.holds(block(number)[0]):
        last = min(number + step * fs.most_readahead, fs.geometry.groups)
        fs.cache.want(block(ahead)[0] for ahead in range(number, last, step))
    return group.load(fs, number)


def reserved_clusters(fs: "Ext4") -> int:
    """Clusters that nobody gets by asking, as in the kernel: 2 % of the file system, 4096 at most."""
    if Feature.EXTENTS not in fs.superblock.features:
        return 0
    clusters = fs.geometry.blocks // fs.geometry.cluster_blocks
    return min(clusters // RESERVED_SHARE, RESERVED_CLUSTERS_MOST)


def _overhead(fs: "Ext4") -> int:
    """Blocks that hold metadata of the file system itself."""
    superblock, geometry = fs.superblock, fs.geometry
    if Feature.BIGALLOC in superblock.features and geometry.groups <= MOST_GROUPS_BY_CLUSTER:
        stored: int = superblock.fields["overhead_blocks"]
        clusters = stored if 0 < stored <= geometry.blocks else _overhead_clusters(fs)
        return clusters * geometry.cluster_blocks
    tables = geometry.groups * (geometry.inode_table_blocks() + BITMAPS)
    return geometry.first_data_block + tables + _copies(superblock) + _journal_blocks(fs)


def _overhead_clusters(fs: "Ext4") -> int:
    """Clusters with metadata of a bigalloc file system, where several structures share a cluster."""
    geometry, ratio = fs.geometry, fs.geometry.cluster_blocks
    taken: set[int] = set()
    for number in range(geometry.groups):
        desc, first = _next_desc(fs, number), geometry.first_block_of(number)
        table_end = desc.inode_table + geometry.inode_table_blocks()
        taken.update(range(desc.inode_table // ratio, (table_end - 1) // ratio + 1))
        taken.update((desc.block_bitmap // ratio, desc.inode_bitmap // ratio))
        copies = _copies_in(fs.superblock, number)
        taken.update(range(first // ratio, (first + copies - 1) // ratio + 1))
    return len(taken) - (-_journal_blocks(fs) // ratio)


def _copies_in(superblock: "Superblock", number: int) -> int:
    """Blocks at the start of a group for copies of superblock and descriptors; the kernel leaves out the room here."""
    geometry, first = superblock.geometry, superblock.fields["first_meta_bg"]
    holder = superblock.has_copy_in(number)
    meta, within = divmod(number, geometry.descs_per_block())
    if Feature.META_BG in superblock.features and meta >= first:
        return holder + (within in (0, 1, geometry.descs_per_block() - 1))
    plain = first if Feature.META_BG in superblock.features else -(-geometry.groups // geometry.descs_per_block())
    return int(holder * (1 + plain))


def _copies(superblock: "Superblock") -> int:
    """Blocks of superblock copies, of group descriptors, and of the room for more of them."""
    geometry, reserved = superblock.geometry, superblock.fields["reserved_gdt_blocks"]
    step = geometry.descs_per_block()
    table_blocks = -(-geometry.groups // step)
    holders = superblock.copies_below(geometry.groups)
    if Feature.META_BG not in superblock.features:
        return int(holders * (1 + table_blocks + reserved))
    first = superblock.fields["first_meta_bg"]
    plain = superblock.copies_below(min(first * step, geometry.groups)) * first
    in_meta_groups = COPIES_IN_META_GROUP * max(table_blocks - 1 - first, 0) + _in_last_meta_group(geometry, first)
    return int(holders * (1 + reserved) + plain + in_meta_groups)


def _in_last_meta_group(geometry: "Geometry", first: int) -> int:
    """Groups that hold the last block of descriptors: first, second and last of its meta group, if they exist."""
    step = geometry.descs_per_block()
    meta = (geometry.groups - 1) // step
    base = meta * step
    return sum(1 for number in {base, base + 1, base + step - 1} if number < geometry.groups) if meta >= first else 0


def _journal_blocks(fs: "Ext4") -> int:
    number = fs.superblock.fields["journal_inum"]
    if Feature.HAS_JOURNAL not in fs.superblock.features or not number:
        return 0
    return fs.geometry.block_of(inode.load(fs, number).size)
