"""The records of the journal as tables: jbd2's are big-endian, those of fast commits little-endian.

Sources: kernel documentation, ext4, "Journal (jbd2)" and its section "Fast commits"; fields that it lacks
(``num_fc_blocks``, ``head``) from include/linux/jbd2.h, structures of fast commits from fs/ext4/fast_commit.h.
"""

from .layout import Record

HEADER = Record("JournalHeader", ">", 12, """
    0x00  u32  magic        0xC03B3998
    0x04  u32  kind         1 descriptor, 2 commit, 3 superblock version 1, 4 superblock version 2, 5 revocations
    0x08  u32  sequence     of the transaction
""")

SUPERBLOCK = Record("JournalSuperblock", ">", 1024, """
    0x000  u32   magic
    0x004  u32   kind             3 or 4
    0x008  u32   header_sequence
    0x00C  u32   block_bytes
    0x010  u32   maxlen           length of the journal           [blocks]
    0x014  u32   first            first block of the log
    0x018  u32   sequence         first transaction expected in the log
    0x01C  u32   start            block where the log begins, 0: nothing to replay
    0x020  u32   errno            why the journal was aborted, 0: it was not
    0x024  u32   feature_compat   from here on: version 2 only
    0x028  u32   feature_incompat
    0x02C  u32   feature_ro_compat
    0x030  b16   uuid
    0x040  u32   nr_users
    0x044  u32   dynsuper
    0x048  u32   max_transaction
    0x04C  u32   max_trans_data
    0x050  u8    checksum_type    4 is crc32c
    0x051  b3    padding
    0x054  u32   num_fc_blocks    blocks of the fast commit area, 0 stands for 256
    0x058  u32   head             where the next transaction goes, kept while the log is empty
    0x05C  b160  reserved
    0x0FC  u32   checksum         crc32c of these 1024 bytes
    0x100  b768  users
""")

TAG = Record("JournalTag", ">", 8, """
    0x00  u32  block_lo     home of the logged block
    0x04  u16  checksum     version 2: low half of the checksum
    0x06  u16  flags        1 escaped, 2 same UUID as the tag before, 4 deleted, 8 last of this descriptor
""")

TAG_WIDE = Record("JournalTagWide", ">", 12, """
    0x00  u32  block_lo
    0x04  u16  checksum
    0x06  u16  flags
    0x08  u32  block_hi     with the feature 64bit
""")

TAG3 = Record("JournalTag3", ">", 16, """
    0x00  u32  block_lo
    0x04  u32  flags
    0x08  u32  block_hi     zero without the feature 64bit
    0x0C  u32  checksum
""")

REVOKE = Record("JournalRevoke", ">", 16, """
    0x00  u32  magic
    0x04  u32  kind         5
    0x08  u32  sequence
    0x0C  u32  count        bytes in use, this record included
""")

COMMIT = Record("JournalCommit", ">", 60, """
    0x00  u32  magic
    0x04  u32  kind           2
    0x08  u32  sequence
    0x0C  u8   checksum_type  version 1: 1 is crc32
    0x0D  u8   checksum_size  version 1: 4
    0x0E  u16  padding
    0x10  u32  checksum       version 1: of the transaction; versions 2 and 3: of this block
    0x14  b28  more_checksum
    0x30  u64  seconds        since 1970
    0x38  u32  nanoseconds
""")

FC_TAG = Record("FastCommitTag", "<", 4, """
    0x00  u16  tag          1 add range, 2 delete range, 3 create, 4 link, 5 unlink, 6 inode, 7 pad, 8 tail, 9 head
    0x02  u16  length       of the value that follows             [bytes]
""")

FC_HEAD = Record("FastCommitHead", "<", 8, """
    0x00  u32  features
    0x04  u32  sequence     of the transaction that these changes would have become part of
""")

FC_TAIL = Record("FastCommitTail", "<", 8, """
    0x00  u32  sequence
    0x04  u32  checksum     crc32c of the tags since the last tail, up to this field
""")

FC_ADD_RANGE = Record("FastCommitAddRange", "<", 16, """
    0x00  u32  inode
    0x04  u32  file_block   the rest is an extent
    0x08  u16  length       above 32768: unwritten
    0x0A  u16  start_hi
    0x0C  u32  start_lo
""")

FC_DEL_RANGE = Record("FastCommitDelRange", "<", 12, """
    0x00  u32  inode
    0x04  u32  file_block
    0x08  u32  length       [blocks]
""")

FC_NAME = Record("FastCommitName", "<", 8, """
    0x00  u32  parent       the name follows
    0x04  u32  inode
""")

FC_INODE = Record("FastCommitInode", "<", 4, """
    0x00  u32  inode        the inode as on disk follows
""")
