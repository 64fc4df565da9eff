"""Extended attributes by the names that people use: ``user.x``, ``trusted.x``, ``security.x``, ``system.posix_acl_*``.

Kernel documentation, ext4, "Extended Attributes".  An attribute's name on disk is a namespace number and the rest.
"""

import errno
from typing import TYPE_CHECKING

from . import acl, checksum, inode, iomap, xattrstore
from .errors import Check, Corrupt, Refused
from .inode import FLAG_EA_INODE, Inode
from .xattrstore import Entry

if TYPE_CHECKING:
    from .filesystem import Ext4

INDEX_USER, INDEX_ACL_ACCESS, INDEX_ACL_DEFAULT, INDEX_TRUSTED, INDEX_SECURITY, INDEX_ENCRYPTION = 1, 2, 3, 4, 6, 9
PREFIXES = {b"user.": INDEX_USER, b"trusted.": INDEX_TRUSTED, b"security.": INDEX_SECURITY}
ACLS = {b"system.posix_acl_access": INDEX_ACL_ACCESS, b"system.posix_acl_default": INDEX_ACL_DEFAULT}
_PREFIX_OF = {index: prefix for prefix, index in PREFIXES.items()}
_ACL_OF = {index: name for name, index in ACLS.items()}
MAX_VALUE_BYTES = 65536  # what the system call can carry


def get(fs: "Ext4", of: Inode, name: bytes) -> bytes:
    """The value of an attribute, ACLs in the form of the system call.

    Raises ``Refused``: ENODATA, EOPNOTSUPP for a namespace that is not served, EINVAL for a bare prefix.
    """
    index, rest = split(fs, name)
    entry = xattrstore.find(fs, of, index, rest)
    if entry is None:
        raise Refused(errno.ENODATA)
    value = value_of(fs, of, entry)
    return acl.to_xattr(value) if index in _ACL_OF else value


def names(fs: "Ext4", of: Inode, trusted: bool) -> list[bytes]:
    """The full names of all attributes that a caller may see; ``trusted`` ones only if asked for."""
    found = []
    for entry in (*xattrstore.in_inode(fs, of), *xattrstore.in_block(fs, of)):
        name = _name_of(fs, entry)
        if name is not None and (trusted or entry.namespace != INDEX_TRUSTED):
            found.append(name)
    return found


def has_none(of: Inode) -> bool:
    """Whether the inode certainly has no attributes: known from the inode alone."""
    return of.file_acl == 0 and not xattrstore.has_area(of)


def encryption_context(fs: "Ext4", of: Inode) -> bytes | None:
    """The raw encryption context of an encrypted inode, None if it has none."""
    entry = xattrstore.find(fs, of, INDEX_ENCRYPTION, b"c")
    return None if entry is None else value_of(fs, of, entry)


def value_of(fs: "Ext4", of: Inode, entry: Entry) -> bytes:
    """The value of an entry, read from its own inode if it has one."""
    return _value_in_inode(fs, of, entry) if entry.value_inode else entry.value


def split(fs: "Ext4", name: bytes) -> tuple[int, bytes]:
    """(namespace, name in it) of a full name.  Raises ``Refused``: EOPNOTSUPP, or EINVAL for a bare prefix."""
    if name in ACLS and fs.options.acl:
        return ACLS[name], b""
    prefix, dot, rest = name.partition(b".")
    index = PREFIXES.get(prefix + dot)
    if index is None or (index == INDEX_USER and not fs.options.user_xattr):
        raise Refused(errno.EOPNOTSUPP)
    if not rest:
        raise Refused(errno.EINVAL)
    return index, rest


def _name_of(fs: "Ext4", entry: Entry) -> bytes | None:
    """The full name of an entry, None for what is not shown to anybody."""
    if entry.namespace in _ACL_OF:
        return _ACL_OF[entry.namespace] if fs.options.acl and not entry.name else None
    if entry.namespace == INDEX_USER and not fs.options.user_xattr:
        return None
    prefix = _PREFIX_OF.get(entry.namespace)
    return None if prefix is None else prefix + entry.name


def _value_in_inode(fs: "Ext4", of: Inode, entry: Entry) -> bytes:
    """A large value: the content of an inode that only attributes refer to, checked against its hash."""
    holder = inode.load(fs, entry.value_inode)
    size = entry.value_bytes
    if not (holder.flags & FLAG_EA_INODE and holder.is_regular and holder.size == size and size <= MAX_VALUE_BYTES):
        raise Corrupt(Check.XATTR_INODE, inode=of.number, value_inode=holder.number, size=size)
    value = _read_blocks(fs, holder, fs.geometry.blocks_for(size))[:size]
    stored = holder.atime[0] & 0xFFFFFFFF
    if checksum.crc32c(fs.superblock.seed, value) != stored and not _is_lustre_style(of, holder):
        raise Corrupt(Check.XATTR_HASH, inode=of.number, value_inode=holder.number)
    return value


def _is_lustre_style(of: Inode, holder: Inode) -> bool:
    """Old value inodes carry no hash; they name their owner in mtime and generation instead."""
    return holder.mtime[0] & 0xFFFFFFFF == of.number and holder.generation == of.generation


def _read_blocks(fs: "Ext4", holder: Inode, count: int) -> bytes:
    blocks = []
    for file_block in range(count):
        run = iomap.find(fs, holder, file_block)
        if run.start is None or run.unwritten:
            raise Corrupt(Check.XATTR_INODE, value_inode=holder.number, file_block=file_block)
        blocks.append(run.start + file_block - run.file_block)
    fs.cache.want(blocks)
    return b"".join(fs.cache.read(block) for block in blocks)
