"""Every on-disk record of ext4 as the table its specification prints: offset, type, name, meaning.

``Record`` turns such a table into one ``struct.Struct`` and refuses, at import, a row whose offset is not where the
rows before it end.  ext4 is little-endian, its journal big-endian; the second argument says which.
Source of the tables: kernel documentation, Documentation/filesystems/ext4.
"""

import struct
from collections.abc import Callable
from typing import Any

_CODES = {"u8": ("B", 1), "u16": ("H", 2), "u32": ("I", 4), "u64": ("Q", 8),
          "s8": ("b", 1), "s16": ("h", 2), "s32": ("i", 4), "s64": ("q", 8)}


class Record:
    """One on-disk structure: ``unpack(buffer, offset)`` gives its fields as a tuple, ``offsets`` where each lies."""

    def __init__(self, name: str, order: str, size: int, table: str) -> None:
        self.name, self.size = name, size
        self.offsets: dict[str, int] = {}
        self.types: dict[str, str] = {}
        codes, at = order, 0
        for row in filter(None, (line.strip() for line in table.splitlines())):
            offset, kind, field = row.split()[:3]
            if int(offset, 16) != at:
                raise ValueError(f"{name}.{field}: the table says {offset}, the rows before it end at {at:#x}")
            code, width = (f"{kind[1:]}s", int(kind[1:])) if kind[0] == "b" else _CODES[kind]
            codes += code.replace("s", "x") if field == "_" else code
            if field != "_":
                self.offsets[field], self.types[field] = at, kind
            at += width
        if at != size:
            raise ValueError(f"{name}: the rows end at {at:#x}, the record at {size:#x}")
        self.struct = struct.Struct(codes)
        self.fields = tuple(self.offsets)
        self.order = order
        self.unpack: Callable[..., tuple[Any, ...]] = self.struct.unpack_from

    def decode(self, buffer: bytes | bytearray | memoryview, offset: int = 0) -> dict[str, Any]:
        """The fields by name; for records that are read seldom."""
        return dict(zip(self.fields, self.struct.unpack_from(buffer, offset), strict=True))


EXTENT_HEADER = Record("ExtentHeader", "<", 12, """
    0x00  u16  magic        0xF30A
    0x02  u16  entries      entries that follow the header
    0x04  u16  max          entries that would fit
    0x06  u16  depth        0: leaf, entries are extents; else entries are indexes
    0x08  u32  generation   unused
""")

EXTENT = Record("Extent", "<", 12, """
    0x00  u32  file_block   first file block covered              [blocks]
    0x04  u16  length       above 32768: unwritten, less 32768    [blocks]
    0x06  u16  start_hi     physical block, bits 32–47
    0x08  u32  start_lo     physical block, bits 0–31
""")

EXTENT_INDEX = Record("ExtentIndex", "<", 12, """
    0x00  u32  file_block   first file block of the subtree       [blocks]
    0x04  u32  leaf_lo      block of the next node, bits 0–31
    0x08  u16  leaf_hi      block of the next node, bits 32–47
    0x0A  u16  unused
""")

SUPERBLOCK = Record("Superblock", "<", 1024, """
    0x000  u32   inodes_count
    0x004  u32   blocks_count_lo
    0x008  u32   r_blocks_count_lo     reserved for root
    0x00C  u32   free_blocks_count_lo
    0x010  u32   free_inodes_count
    0x014  u32   first_data_block
    0x018  u32   log_block_size        block size is 2^(10 + this)
    0x01C  u32   log_cluster_size      cluster size is 2^(10 + this)
    0x020  u32   blocks_per_group
    0x024  u32   clusters_per_group
    0x028  u32   inodes_per_group
    0x02C  u32   mtime                 last mount
    0x030  u32   wtime                 last write
    0x034  u16   mnt_count
    0x036  s16   max_mnt_count
    0x038  u16   magic                 0xEF53
    0x03A  u16   state                 1 cleanly unmounted, 2 errors detected, 4 orphans being recovered
    0x03C  u16   errors                1 continue, 2 remount read-only, 3 panic
    0x03E  u16   minor_rev_level
    0x040  u32   lastcheck
    0x044  u32   checkinterval
    0x048  u32   creator_os
    0x04C  u32   rev_level             0: fixed inode size 128, first inode 11, no features
    0x050  u16   def_resuid
    0x052  u16   def_resgid
    0x054  u32   first_ino
    0x058  u16   inode_size
    0x05A  u16   block_group_nr        of this copy
    0x05C  u32   feature_compat
    0x060  u32   feature_incompat
    0x064  u32   feature_ro_compat
    0x068  b16   uuid
    0x078  b16   volume_name
    0x088  b64   last_mounted
    0x0C8  u32   algorithm_usage_bitmap
    0x0CC  u8    prealloc_blocks
    0x0CD  u8    prealloc_dir_blocks
    0x0CE  u16   reserved_gdt_blocks
    0x0D0  b16   journal_uuid
    0x0E0  u32   journal_inum
    0x0E4  u32   journal_dev
    0x0E8  u32   last_orphan
    0x0EC  b16   hash_seed
    0x0FC  u8    def_hash_version
    0x0FD  u8    jnl_backup_type
    0x0FE  u16   desc_size
    0x100  u32   default_mount_opts
    0x104  u32   first_meta_bg
    0x108  u32   mkfs_time
    0x10C  b68   jnl_blocks            copy of the journal inode's block array and size
    0x150  u32   blocks_count_hi
    0x154  u32   r_blocks_count_hi
    0x158  u32   free_blocks_count_hi
    0x15C  u16   min_extra_isize
    0x15E  u16   want_extra_isize
    0x160  u32   flags                 1 signed directory hash, 2 unsigned, 4 test file system
    0x164  u16   raid_stride
    0x166  u16   mmp_interval
    0x168  u64   mmp_block
    0x170  u32   raid_stripe_width
    0x174  u8    log_groups_per_flex
    0x175  u8    checksum_type         1 is crc32c
    0x176  u16   reserved_pad
    0x178  u64   kbytes_written
    0x180  u32   snapshot_inum
    0x184  u32   snapshot_id
    0x188  u64   snapshot_r_blocks_count
    0x190  u32   snapshot_list
    0x194  u32   error_count
    0x198  u32   first_error_time
    0x19C  u32   first_error_ino
    0x1A0  u64   first_error_block
    0x1A8  b32   first_error_func
    0x1C8  u32   first_error_line
    0x1CC  u32   last_error_time
    0x1D0  u32   last_error_ino
    0x1D4  u32   last_error_line
    0x1D8  u64   last_error_block
    0x1E0  b32   last_error_func
    0x200  b64   mount_opts
    0x240  u32   usr_quota_inum
    0x244  u32   grp_quota_inum
    0x248  u32   overhead_blocks
    0x24C  u32   backup_bg_0           sparse_super2: the two groups that hold copies
    0x250  u32   backup_bg_1
    0x254  b4    encrypt_algos
    0x258  b16   encrypt_pw_salt
    0x268  u32   lpf_ino
    0x26C  u32   prj_quota_inum
    0x270  u32   checksum_seed
    0x274  u8    wtime_hi
    0x275  u8    mtime_hi
    0x276  u8    mkfs_time_hi
    0x277  u8    lastcheck_hi
    0x278  u8    first_error_time_hi
    0x279  u8    last_error_time_hi
    0x27A  u8    first_error_errcode
    0x27B  u8    last_error_errcode
    0x27C  u16   encoding              1 is UTF-8 12.1
    0x27E  u16   encoding_flags        1 strict
    0x280  u32   orphan_file_inum
    0x284  u16   def_resuid_hi
    0x286  u16   def_resgid_hi
    0x288  b372  reserved
    0x3FC  u32   checksum              crc32c of everything before
""")

GROUP_DESC = Record("GroupDesc", "<", 32, """
    0x00  u32  block_bitmap_lo
    0x04  u32  inode_bitmap_lo
    0x08  u32  inode_table_lo
    0x0C  u16  free_blocks_count_lo
    0x0E  u16  free_inodes_count_lo
    0x10  u16  used_dirs_count_lo
    0x12  u16  flags                   1 inode table uninitialised, 2 block bitmap uninitialised, 4 inode table zeroed
    0x14  u32  exclude_bitmap_lo
    0x18  u16  block_bitmap_csum_lo
    0x1A  u16  inode_bitmap_csum_lo
    0x1C  u16  itable_unused_lo
    0x1E  u16  checksum
""")

GROUP_DESC_HI = Record("GroupDescHi", "<", 32, """
    0x00  u32  block_bitmap_hi
    0x04  u32  inode_bitmap_hi
    0x08  u32  inode_table_hi
    0x0C  u16  free_blocks_count_hi
    0x0E  u16  free_inodes_count_hi
    0x10  u16  used_dirs_count_hi
    0x12  u16  itable_unused_hi
    0x14  u32  exclude_bitmap_hi
    0x18  u16  block_bitmap_csum_hi
    0x1A  u16  inode_bitmap_csum_hi
    0x1C  u32  reserved
""")

INODE = Record("Inode", "<", 128, """
    0x00  u16  mode
    0x02  u16  uid_lo
    0x04  u32  size_lo                 [bytes]
    0x08  u32  atime
    0x0C  u32  ctime
    0x10  u32  mtime
    0x14  u32  dtime                   time of deletion, or next inode of the orphan list
    0x18  u16  gid_lo
    0x1A  u16  links_count
    0x1C  u32  blocks_lo               [512-byte sectors, or blocks with the HUGE_FILE flag]
    0x20  u32  flags
    0x24  u32  version_lo
    0x28  b60  block                   extent root, block map, symlink target or inline data
    0x64  u32  generation
    0x68  u32  file_acl_lo             block of extended attributes
    0x6C  u32  size_hi
    0x70  u32  faddr                   obsolete
    0x74  u16  blocks_hi
    0x76  u16  file_acl_hi
    0x78  u16  uid_hi
    0x7A  u16  gid_hi
    0x7C  u16  checksum_lo
    0x7E  u16  reserved
""")

INODE_EXTRA = Record("InodeExtra", "<", 32, """
    0x00  u16  extra_isize             bytes used after the first 128; covers the fields below only as far as it reaches
    0x02  u16  checksum_hi
    0x04  u32  ctime_extra             bits 0–1: epoch, bits 2–31: nanoseconds
    0x08  u32  mtime_extra
    0x0C  u32  atime_extra
    0x10  u32  crtime
    0x14  u32  crtime_extra
    0x18  u32  version_hi
    0x1C  u32  projid
""")

XATTR_HEADER = Record("XattrHeader", "<", 32, """
    0x00  u32  magic        0xEA020000
    0x04  u32  refcount     inodes that share the block
    0x08  u32  blocks       always 1
    0x0C  u32  hash         of all entries
    0x10  u32  checksum
    0x14  b12  reserved
""")

XATTR_ENTRY = Record("XattrEntry", "<", 16, """
    0x00  u8   name_len
    0x01  u8   name_index   the namespace
    0x02  u16  value_offs   from the first entry (in an inode) or the start of the block
    0x04  u32  value_inum   inode that holds the value, or 0
    0x08  u32  value_size
    0x0C  u32  hash
""")

DX_ROOT_INFO = Record("DxRootInfo", "<", 8, """
    0x00  u32  zero
    0x04  u8   hash_version
    0x05  u8   info_length  8
    0x06  u8   indirect_levels
    0x07  u8   unused_flags
""")
