"""Changing an inode's attributes as chmod(2), chown(2), utimensat(2) and FS_IOC_SETFLAGS do.

The kernel's VFS has checked permissions; here is what ext4 itself decides: which bits fall when the owner changes,
what an access control list does to a mode, which flags may be set.
"""

import errno
import stat
from typing import TYPE_CHECKING

from . import acl, aclrules, inodestore, xattr, xattrstore, xattrwrite
from .errors import Refused
from .features import Feature
from .inode import (
    FLAG_APPEND,
    FLAG_CASEFOLD,
    FLAG_DIRSYNC,
    FLAG_EXTENTS,
    FLAG_IMMUTABLE,
    FLAG_NOATIME,
    FLAG_NODUMP,
    FLAG_PROJINHERIT,
    FLAG_SYNC,
    FLAG_TOPDIR,
    Inode,
    Time,
)
from .xattr import INDEX_ACL_ACCESS, INDEX_ACL_DEFAULT

if TYPE_CHECKING:
    from .transaction import Transaction

PERMISSION_BITS = 0o7777
# what FS_IOC_SETFLAGS may change: secure deletion, undelete and compression flags are kept but mean nothing
FLAGS_MODIFIABLE = 0x1 | 0x2 | 0x4 | FLAG_SYNC | FLAG_IMMUTABLE | FLAG_APPEND | FLAG_NODUMP | FLAG_NOATIME | \
    FLAG_DIRSYNC | FLAG_TOPDIR | FLAG_PROJINHERIT | 0x8000
_ONLY_DIRECTORIES = FLAG_DIRSYNC | FLAG_TOPDIR | FLAG_CASEFOLD
_KEPT = 0x4000  # data journalling: a file that has it stays as it is
_CAPABILITY = b"capability"


def chmod(tx: "Transaction", inode: Inode, mode: int) -> Inode:
    """Set the permission bits, in the mode and in the access control list if there is one."""
    new = inode.kind | mode & PERMISSION_BITS
    entry = xattrstore.find(tx, inode, INDEX_ACL_ACCESS, b"")
    if entry is not None:
        changed = aclrules.with_mode(acl.entries(xattr.value_of(tx, inode, entry)), new)
        inode = xattrwrite.put(tx, inode, INDEX_ACL_ACCESS, b"", acl.to_disk(changed))
    return inodestore.change(tx, inode, mode=new, ctime=tx.now)


def chown(tx: "Transaction", inode: Inode, uid: int | None, gid: int | None) -> Inode:
    """Give the inode to another user or group (None: leave it); a program loses what made it privileged."""
    fields = {name: value for name, value in (("uid", uid), ("gid", gid)) if value is not None}
    if not inode.is_dir:
        inode = drop_privileges(tx, inode)
    return inodestore.change(tx, inode, ctime=tx.now, **fields)


def drop_privileges(tx: "Transaction", inode: Inode) -> Inode:
    """Take the set-user-ID bit, the set-group-ID bit of executables and the capabilities of a program."""
    mode = inode.mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    if mode != inode.mode:
        inode = inodestore.change(tx, inode, mode=mode, ctime=tx.now)
    if xattrstore.find(tx, inode, xattr.INDEX_SECURITY, _CAPABILITY) is not None:
        inode = xattrwrite.put(tx, inode, xattr.INDEX_SECURITY, _CAPABILITY, None)
    return inode


def utimens(tx: "Transaction", inode: Inode, atime: Time | None, mtime: Time | None, ctime: Time | None) -> Inode:
    """Set times (None: leave it), as given: seconds and nanoseconds."""
    fields = {name: value for name, value in (("atime", atime), ("mtime", mtime)) if value is not None}
    return inodestore.change(tx, inode, ctime=tx.now if ctime is None else ctime, **fields)


def set_acl(tx: "Transaction", inode: Inode, name: bytes, value: bytes | None, drop_sgid: bool = False) -> Inode:
    """Set or remove (None) an access control list by its attribute's name, and the mode that goes with it.

    Raises ``Refused``: EACCES for a default list of what is no directory, EINVAL for what is no list.
    """
    default = name == b"system.posix_acl_default"
    if value is None:
        return _remove_acl(tx, inode, INDEX_ACL_DEFAULT if default else INDEX_ACL_ACCESS)
    entries = acl.from_xattr(value)
    if default:
        if not inode.is_dir:
            raise Refused(errno.EACCES)
        return _put(tx, inode, INDEX_ACL_DEFAULT, b"", acl.to_disk(entries))
    mode = aclrules.mode_with(entries, inode.mode) & ~(stat.S_ISGID if drop_sgid else 0)
    if aclrules.equivalent_mode(entries) is not None:
        inode = _remove_acl(tx, inode, INDEX_ACL_ACCESS)
    else:
        inode = _put(tx, inode, INDEX_ACL_ACCESS, b"", acl.to_disk(entries))
    return inodestore.change(tx, inode, mode=mode, ctime=tx.now) if mode != inode.mode else inode


def _remove_acl(tx: "Transaction", inode: Inode, namespace: int) -> Inode:
    if xattrstore.find(tx, inode, namespace, b"") is None:
        return inode
    return _put(tx, inode, namespace, b"", None)


def _put(tx: "Transaction", inode: Inode, namespace: int, name: bytes, value: bytes | None, flags: int = 0) -> Inode:
    """An attribute set or removed; the inode's change is stamped unless all was so already."""
    changed = xattrwrite.put(tx, inode, namespace, name, value, flags)
    return changed if changed is inode else inodestore.change(tx, changed, ctime=tx.now)


def set_xattr(tx: "Transaction", inode: Inode, name: bytes, value: bytes | None, flags: int = 0) -> Inode:
    """Set or remove (None) an attribute by its full name.  Raises ``Refused`` as ``xattrwrite.put`` does."""
    if name in xattr.ACLS:
        if not tx.options.acl:
            raise Refused(errno.EOPNOTSUPP)
        return set_acl(tx, inode, name, value)
    namespace, rest = xattr.split(tx, name)
    return _put(tx, inode, namespace, rest, value, flags)


def inherit_acl(tx: "Transaction", parent: Inode, child: Inode, umask: int) -> Inode:
    """Give a new inode what its directory's default list says, or take ``umask`` from its mode where there is none."""
    if child.is_symlink:
        return child
    entry = xattrstore.find(tx, parent, INDEX_ACL_DEFAULT, b"") if tx.options.acl else None
    if entry is None:
        return inodestore.change(tx, child, mode=child.mode & ~umask) if umask & child.mode else child
    default = xattr.value_of(tx, parent, entry)
    access, mode = aclrules.inherited(acl.entries(default), child.mode)
    if child.is_dir:
        child = xattrwrite.put(tx, child, INDEX_ACL_DEFAULT, b"", default)
    if aclrules.equivalent_mode(access) is None:
        child = xattrwrite.put(tx, child, INDEX_ACL_ACCESS, b"", acl.to_disk(access))
    return inodestore.change(tx, child, mode=mode) if mode != child.mode else child


def set_flags(tx: "Transaction", inode: Inode, flags: int) -> Inode:
    """FS_IOC_SETFLAGS: change what people may change.  Raises ``Refused(EOPNOTSUPP)`` for the rest."""
    wanted = flags & FLAGS_MODIFIABLE | inode.flags & ~FLAGS_MODIFIABLE
    visible = FLAGS_MODIFIABLE | FLAG_EXTENTS | _KEPT
    if (flags ^ inode.flags) & (FLAG_EXTENTS | _KEPT) and flags & visible:
        raise Refused(errno.EOPNOTSUPP)
    if not inode.is_dir:
        wanted &= ~_ONLY_DIRECTORIES | inode.flags
    return inodestore.change(tx, inode, flags=wanted, ctime=tx.now)


def set_project(tx: "Transaction", inode: Inode, project: int) -> Inode:
    """Set the project id.  Raises ``Refused(EOPNOTSUPP)`` without the feature, EOVERFLOW where there is no room."""
    if project == inode.project:
        return inode
    if Feature.PROJECT not in tx.superblock.features:
        raise Refused(errno.EOPNOTSUPP)
    return inodestore.change(tx, inode, project=project, ctime=tx.now)
