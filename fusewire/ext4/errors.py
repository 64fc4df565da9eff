"""Everything that can go wrong below the server, and the one mapping to errno.

A ``Refused`` is an answer (the POSIX result is an error), ``Unsupported`` names features of a valid disk, ``Corrupt``
says which rule the disk breaks and where.  Anything else that is raised is a bug of ours or a failing device.
"""

import errno
from enum import Enum


class Ext4Error(Exception):
    """Base of the errors that ext4 itself raises."""


class Refused(Ext4Error):
    """The POSIX answer to this operation is the error ``errno``; nothing is wrong."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.errno = number


class Unsupported(Ext4Error):
    """A valid file system that uses something we cannot serve; ``args[0]`` is a sentence for people."""


class Check(Enum):
    """The rules that a disk can break; the value is the sentence shown to people.

    Tests assert on the member, operators search logs for its name.
    """

    # Superblock and groups
    SUPER_MAGIC = "not an ext2, ext3 or ext4 file system (bad magic number)"
    SUPER_CHECKSUM = "superblock checksum does not match"
    SUPER_GEOMETRY = "superblock holds an impossible geometry"
    SUPER_SIZE = "the file system is larger than its device"
    SUPER_TRUNCATED = "the device ends inside the superblock"
    GROUP_CHECKSUM = "group descriptor checksum does not match"
    GROUP_LOCATION = "group descriptor points outside the device"
    BITMAP_CHECKSUM = "bitmap checksum does not match"
    BITMAP_MISMATCH = "bitmap disagrees with what uses the blocks or inodes"
    # Blocks
    BLOCK_RANGE = "block number outside the file system"
    # Inodes
    INODE_NUMBER = "inode number out of range"
    INODE_CHECKSUM = "inode checksum does not match"
    INODE_EXTRA_SIZE = "inode extra size out of range"
    INODE_MODE = "inode has an unknown file type"
    INODE_FREE = "directory entry names a free inode"
    INODE_SIZE = "inode size out of range"
    INODE_FLAGS = "inode flags contradict each other"
    SYMLINK_SIZE = "symbolic link of impossible length"
    # Extent trees and block maps
    EXTENT_MAGIC = "extent node has a bad magic number"
    EXTENT_DEPTH = "extent node has the wrong depth"
    EXTENT_ENTRIES = "extent node entry count out of range"
    EXTENT_ORDER = "extents out of order or overlapping"
    EXTENT_LENGTH = "extent of impossible length"
    EXTENT_CHECKSUM = "extent block checksum does not match"
    EXTENT_RANGE = "extent points outside the file system"
    BLOCKMAP_RANGE = "block map points outside the file system"
    # Orphans
    ORPHAN_LIST = "list of orphans leads astray"
    ORPHAN_FILE = "orphan file is malformed"
    ORPHAN_CHECKSUM = "checksum of a block of the orphan file does not match"
    # Directories
    DIRENT_LENGTH = "directory entry has a bad record length"
    DIRENT_NAME = "directory entry has a bad name"
    DIRENT_INODE = "directory entry has an inode number out of range"
    DIRECTORY_CHECKSUM = "directory block checksum does not match"
    DIRECTORY_HOLE = "directory has a hole"
    DIRECTORY_SIZE = "directory size is not a whole number of blocks"
    DIRECTORY_REPEATS = "directory uses one block twice"
    HTREE_ROOT = "hash tree root is malformed"
    HTREE_NODE = "hash tree node is malformed"
    HTREE_DEPTH = "hash tree is too deep or loops"
    HTREE_CHECKSUM = "hash tree node checksum does not match"
    # Extended attributes
    XATTR_MAGIC = "extended attribute block has a bad magic number"
    XATTR_CHECKSUM = "extended attribute block checksum does not match"
    XATTR_ENTRY = "extended attribute entry out of bounds"
    XATTR_HASH = "extended attribute value hash does not match"
    XATTR_INODE = "extended attribute value inode is malformed"
    ACL_FORMAT = "access control list is malformed"
    # Inline data, verity, encryption
    INLINE_DATA = "inline data is malformed"
    VERITY_DESCRIPTOR = "verity descriptor is malformed"
    VERITY_HASH = "verity hash does not match"
    ENCRYPTION_CONTEXT = "encryption context is malformed"
    # Journal
    JOURNAL_INODE = "journal inode is malformed"
    JOURNAL_SUPER = "journal superblock is malformed"
    JOURNAL_SUPER_CHECKSUM = "journal superblock checksum does not match"
    JOURNAL_CHECKSUM = "checksum of a finished transaction in the journal does not match"
    JOURNAL_DATA_CHECKSUM = "checksum of a block in the journal does not match"
    JOURNAL_REVOKE = "journal revocation block is malformed"
    JOURNAL_TARGET = "the journal holds a block for a place that cannot be journaled"
    FASTCOMMIT_RECORD = "fast commit record is malformed"


_BAD_CHECKSUM = frozenset(check for check in Check if check.name.endswith("_CHECKSUM"))


class Corrupt(Ext4Error):
    """The disk breaks the rule ``check``; ``where`` says in which inode, block, group … and with which values."""

    def __init__(self, check: Check, **where: object) -> None:
        super().__init__(check, where)
        self.check = check
        self.where = where

    def __str__(self) -> str:
        place = ", ".join(f"{name} {value}" for name, value in self.where.items())
        return f"{self.check.value} ({place})" if place else self.check.value

    @property
    def errno(self) -> int:
        """EBADMSG for a wrong checksum, EIO for data that fails its hash, EUCLEAN for the rest."""
        if self.check in _BAD_CHECKSUM:
            return errno.EBADMSG
        return errno.EIO if self.check is Check.VERITY_HASH else errno.EUCLEAN


def errno_of(error: BaseException) -> int:
    """The errno that a caller gets for any exception; EIO for what is no answer (device failures, our bugs)."""
    if isinstance(error, Refused | Corrupt):
        return error.errno
    return errno.EOPNOTSUPP if isinstance(error, Unsupported) else errno.EIO
