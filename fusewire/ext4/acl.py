"""POSIX access control lists: from the compact form on disk to the form of the system.posix_acl_* attributes.

On disk (version 1, kernel documentation, ext4, "POSIX ACLs"): entries of tag and permissions, followed by an id only
for named users and groups.  In the attribute (version 2, <linux/posix_acl_xattr.h>): every entry has an id.
"""

import struct

from .errors import Check, Corrupt

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NO_ID = 0xFFFFFFFF
DISK_VERSION = 1
XATTR_VERSION = 2
_SHORT = struct.Struct("<HH")
_LONG = struct.Struct("<HHI")
_VERSION = struct.Struct("<I")
_WITHOUT_ID = frozenset((USER_OBJ, GROUP_OBJ, MASK, OTHER))
_WITH_ID = frozenset((USER, GROUP))


def to_xattr(disk: bytes) -> bytes:
    """The attribute's value for an ACL as ext4 stores it.  Raises ``Corrupt(ACL_FORMAT)``."""
    if len(disk) < _VERSION.size or _VERSION.unpack_from(disk)[0] != DISK_VERSION:
        raise Corrupt(Check.ACL_FORMAT, bytes=len(disk))
    parts, at = [_VERSION.pack(XATTR_VERSION)], _VERSION.size
    while at < len(disk):
        entry, at = _entry_at(disk, at)
        parts.append(_LONG.pack(*entry))
    return b"".join(parts)


def _entry_at(disk: bytes, at: int) -> tuple[tuple[int, int, int], int]:
    """((tag, permissions, id), where the next entry begins)."""
    if at + _SHORT.size > len(disk):
        raise Corrupt(Check.ACL_FORMAT, offset=at)
    tag, permissions = _SHORT.unpack_from(disk, at)
    if tag in _WITHOUT_ID:
        return (tag, permissions, NO_ID), at + _SHORT.size
    if tag not in _WITH_ID or at + _LONG.size > len(disk):
        raise Corrupt(Check.ACL_FORMAT, offset=at, tag=tag)
    return _LONG.unpack_from(disk, at), at + _LONG.size
