"""POSIX access control lists: from the compact form on disk to the form of the system.posix_acl_* attributes.

On disk (version 1, kernel documentation, ext4, "POSIX ACLs"): entries of tag and permissions, followed by an id only
for named users and groups.  In the attribute (version 2, <linux/posix_acl_xattr.h>): every entry has an id.
"""

import errno
import struct

from .errors import Check, Corrupt, Refused

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NO_ID = 0xFFFFFFFF
DISK_VERSION = 1
XATTR_VERSION = 2
_SHORT = struct.Struct("<HH")
_LONG = struct.Struct("<HHI")
_VERSION = struct.Struct("<I")
_WITHOUT_ID = frozenset((USER_OBJ, GROUP_OBJ, MASK, OTHER))
_WITH_ID = frozenset((USER, GROUP))

Entries = list[tuple[int, int, int]]  # (tag, permissions, id or NO_ID)


def entries(disk: bytes) -> Entries:
    """The entries of an ACL as ext4 stores it.  Raises ``Corrupt(ACL_FORMAT)``."""
    if len(disk) < _VERSION.size or _VERSION.unpack_from(disk)[0] != DISK_VERSION:
        raise Corrupt(Check.ACL_FORMAT, bytes=len(disk))
    found, at = [], _VERSION.size
    while at < len(disk):
        entry, at = _entry_at(disk, at)
        found.append(entry)
    return found


def to_xattr(disk: bytes) -> bytes:
    """The attribute's value for an ACL as ext4 stores it.  Raises ``Corrupt(ACL_FORMAT)``."""
    return _VERSION.pack(XATTR_VERSION) + b"".join(_LONG.pack(*entry) for entry in entries(disk))


def to_disk(acl: Entries) -> bytes:
    """An ACL as ext4 stores it: ids only where they mean something."""
    return _VERSION.pack(DISK_VERSION) + b"".join(
        _LONG.pack(*entry) if entry[0] in _WITH_ID else _SHORT.pack(entry[0], entry[1]) for entry in acl)


def from_xattr(value: bytes) -> Entries:
    """The entries of the attribute's value; none at all stands for no ACL.  They are not checked against each other.

    Raises ``Refused``: EINVAL for what holds no entries, unknown tags or users and groups without an id, EOPNOTSUPP
    for another version.
    """
    if len(value) < _VERSION.size:
        raise Refused(errno.EINVAL)
    if _VERSION.unpack_from(value)[0] != XATTR_VERSION:
        raise Refused(errno.EOPNOTSUPP)
    if (len(value) - _VERSION.size) % _LONG.size:
        raise Refused(errno.EINVAL)
    found = []
    for tag, permissions, owner in _LONG.iter_unpack(value[_VERSION.size:]):
        if tag not in _WITHOUT_ID | _WITH_ID or (tag in _WITH_ID and owner == NO_ID):
            raise Refused(errno.EINVAL)
        found.append((tag, permissions, owner if tag in _WITH_ID else NO_ID))
    return found


def check(found: Entries) -> None:
    """Raise ``Refused(EINVAL)`` for what is no valid ACL.

    Valid (acl(5)): exactly one entry for owner, owning group and others, a mask wherever users or groups are named,
    in the order of tags, permissions of three bits.
    """
    tags = [tag for tag, _, _ in found]
    needed = [USER_OBJ, GROUP_OBJ, OTHER, *([MASK] if _WITH_ID & set(tags) else [])]
    if not (all(tags.count(tag) == 1 for tag in needed) and tags.count(MASK) <= 1 and tags == sorted(tags)
            and all(permissions <= 7 for _, permissions, _ in found)):
        raise Refused(errno.EINVAL)


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
