"""The numbers of ext4 by kind, and the only place that multiplies or divides by a block, group or inode size."""

from dataclasses import dataclass
from typing import NewType

InodeNumber = NewType("InodeNumber", int)  # 2 is the root directory, 0 is none
FsBlock = NewType("FsBlock", int)          # counted from the start of the file system, in blocks
FileBlock = NewType("FileBlock", int)      # counted from the start of a file, in blocks
GroupNumber = NewType("GroupNumber", int)

ROOT_INODE = InodeNumber(2)
NO_BLOCK = FsBlock(0)
SUPERBLOCK_OFFSET_BYTES = 1024
SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes fixed at mkfs time.  Kernel documentation, ext4, "The Super Block"."""

    block_bytes: int
    block_bits: int
    blocks: int                 # of the whole file system
    first_data_block: int       # 1 with 1 KiB blocks (the superblock's own block 0 is outside every group), else 0
    blocks_per_group: int
    cluster_blocks: int         # 1 without bigalloc
    inodes: int
    inodes_per_group: int
    inode_bytes: int
    group_desc_bytes: int
    groups: int

    def byte_of(self, block: int) -> int:
        """Offset in bytes from the start of the file system (or file) of a block."""
        return block << self.block_bits

    def block_of(self, offset_bytes: int) -> int:
        """The block that holds a byte offset."""
        return offset_bytes >> self.block_bits

    def blocks_for(self, size_bytes: int) -> int:
        """Blocks needed for so many bytes, rounded up."""
        return (size_bytes + self.block_bytes - 1) >> self.block_bits

    def within_block(self, offset_bytes: int) -> int:
        """The offset relative to the start of its block."""
        return offset_bytes & (self.block_bytes - 1)

    def group_of_inode(self, number: int) -> tuple[GroupNumber, int]:
        """(group, index in its inode table) of an inode number ≥ 1."""
        group, index = divmod(number - 1, self.inodes_per_group)
        return GroupNumber(group), index

    def group_of_block(self, block: int) -> GroupNumber:
        """The group that a block belongs to."""
        return GroupNumber((block - self.first_data_block) // self.blocks_per_group)

    def first_block_of(self, group: int) -> FsBlock:
        """The first block of a group."""
        return FsBlock(self.first_data_block + group * self.blocks_per_group)

    def inode_table_blocks(self) -> int:
        """Length of one group's inode table in blocks."""
        return self.blocks_for(self.inodes_per_group * self.inode_bytes)

    def inode_place(self, index: int) -> tuple[int, int]:
        """(block within the group's inode table, byte offset in that block) of an inode table index."""
        offset = index * self.inode_bytes
        return offset >> self.block_bits, offset & (self.block_bytes - 1)

    def cluster_sectors(self) -> int:
        """Length of one cluster in 512-byte sectors."""
        return self.cluster_blocks * self.block_bytes // SECTOR_BYTES

    def descs_per_block(self) -> int:
        """Group descriptors in one block."""
        return self.block_bytes // self.group_desc_bytes
