"""Changing an inode's attributes as chmod(2), chown(2), utimensat(2) and FS_IOC_SETFLAGS do.

The kernel's VFS has checked permissions; here is what ext4 itself decides: which bits fall when the owner changes,
what an access control list does to a mode, which flags may be set.
"""

import errno
import stat
from typing import TYPE_CHECKING, Any

from . import acl, aclrules, control, inodestore, xattr, xattrstore, xattrwrite
from .errors import Refused
from .features import Feature
from .inode import (
    FLAG_APPEND,
    FLAG_CASEFOLD,
    FLAG_DAX,
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
# what FS_IOC_SETFLAGS may change: flags of secure deletion, undelete, compression, tails and of blocks behind the end
# are kept but mean nothing
FLAGS_MODIFIABLE = 0x1 | 0x2 | 0x4 | FLAG_SYNC | FLAG_IMMUTABLE | FLAG_APPEND | FLAG_NODUMP | FLAG_NOATIME | \
    FLAG_DIRSYNC | FLAG_TOPDIR | FLAG_PROJINHERIT | FLAG_DAX | 0x8000 | 0x400000
_JOURNAL_DATA = 0x4000
_FIXED = FLAG_EXTENTS | FLAG_CASEFOLD | _JOURNAL_DATA
_ONLY_DIRECTORIES = FLAG_DIRSYNC | FLAG_TOPDIR | FLAG_CASEFOLD | FLAG_PROJINHERIT
_OTHER_KINDS = FLAG_NODUMP | FLAG_NOATIME
_CAPABILITY = b"capability"


def chmod(tx: "Transaction", inode: Inode, mode: int) -> Inode:
    """Set the permission bits, in the mode and in the access control list if there is one."""
    new = inode.kind | mode & PERMISSION_BITS
    entry = xattrstore.find(tx, inode, INDEX_ACL_ACCESS, b"")
    if entry is not None:
        changed = aclrules.with_mode(acl.entries(xattr.value_of(tx, inode, entry)), new)
        inode = xattrwrite.put(tx, inode, INDEX_ACL_ACCESS, b"", acl.to_disk(changed))
    return _stamped(tx, inode, mode=new)


def _stamped(tx: "Transaction", inode: Inode, **fields: Any) -> Inode:
    """The inode with new fields, its change dated and counted."""
    return inodestore.change(tx, inode, **{"ctime": tx.now, "version": inode.version + 1, **fields})


def chown(tx: "Transaction", inode: Inode, uid: int | None, gid: int | None) -> Inode:
    """Give the inode to another user or group (None: leave it); a program loses what made it privileged."""
    fields = {name: value for name, value in (("uid", uid), ("gid", gid)) if value is not None}
    if not inode.is_dir:
        inode = drop_privileges(tx, inode)
    return _stamped(tx, inode, **fields)


def drop_privileges(tx: "Transaction", inode: Inode) -> Inode:
    """Take the set-user-ID bit, the set-group-ID bit of executables and the capabilities of a program."""
    mode = inode.mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    if mode != inode.mode:
        inode = _stamped(tx, inode, mode=mode)
    if xattrstore.find(tx, inode, xattr.INDEX_SECURITY, _CAPABILITY) is not None:
        inode = _put(tx, inode, xattr.INDEX_SECURITY, _CAPABILITY, None)
    return inode


def utimens(tx: "Transaction", inode: Inode, atime: Time | None, mtime: Time | None, ctime: Time | None) -> Inode:
    """Set times (None: leave it), as given: seconds and nanoseconds."""
    fields = {name: value for name, value in (("atime", atime), ("mtime", mtime)) if value is not None}
    return _stamped(tx, inode, ctime=tx.now if ctime is None else ctime, **fields)


def set_acl(tx: "Transaction", inode: Inode, name: bytes, value: bytes | None, drop_sgid: bool = False) -> Inode:
    """Set or remove (None) an access control list by its attribute's name, and the mode that goes with it.

    Raises ``Refused``: EACCES for a default list of what is no directory, EINVAL for what is no list, EOPNOTSUPP for
    links.
    """
    if inode.is_symlink:
        raise Refused(errno.EOPNOTSUPP)
    default = name == b"system.posix_acl_default"
    entries = acl.from_xattr(value) if value else None
    if not entries:
        return _remove_acl(tx, inode, INDEX_ACL_DEFAULT if default else INDEX_ACL_ACCESS)
    if default and not inode.is_dir:
        raise Refused(errno.EACCES)
    acl.check(entries)
    if default:
        return _put(tx, inode, INDEX_ACL_DEFAULT, b"", acl.to_disk(entries))
    mode = aclrules.mode_with(entries, inode.mode) & ~(stat.S_ISGID if drop_sgid else 0)
    if aclrules.equivalent_mode(entries) is not None:
        inode = _remove_acl(tx, inode, INDEX_ACL_ACCESS)
    else:
        inode = _put(tx, inode, INDEX_ACL_ACCESS, b"", acl.to_disk(entries))
    return _stamped(tx, inode, mode=mode) if mode != inode.mode else inode


def _remove_acl(tx: "Transaction", inode: Inode, namespace: int) -> Inode:
    if xattrstore.find(tx, inode, namespace, b"") is None:
        return inode
    return _put(tx, inode, namespace, b"", None)


def _put(tx: "Transaction", inode: Inode, namespace: int, name: bytes, value: bytes | None, flags: int = 0) -> Inode:
    """An attribute set or removed; the inode's change is stamped unless all was so already."""
    changed = xattrwrite.put(tx, inode, namespace, name, value, flags)
    return changed if changed is inode else _stamped(tx, changed)


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
    """FS_IOC_SETFLAGS: change the flags that people may change; others that are shown are left as they are.

    Raises ``Refused``: EOPNOTSUPP for flags that are never shown, that do not suit the kind of file, or that would
    change how it is stored (extents, journalled data, folded case); EPERM for other flags of what stays immutable.
    """
    if flags & ~control.USER_VISIBLE:
        raise Refused(errno.EOPNOTSUPP)
    wanted = flags & (FLAGS_MODIFIABLE | _FIXED)
    if not inode.is_dir and wanted & ~(~_ONLY_DIRECTORIES if inode.is_regular else _OTHER_KINDS):
        raise Refused(errno.EOPNOTSUPP)
    if wanted & inode.flags & FLAG_IMMUTABLE and wanted != inode.flags:
        raise Refused(errno.EPERM)
    if (wanted ^ inode.flags) & _FIXED:
        raise Refused(errno.EOPNOTSUPP)
    return _stamped(tx, inode, flags=wanted | inode.flags & ~FLAGS_MODIFIABLE)


def set_project(tx: "Transaction", inode: Inode, project: int) -> Inode:
    """Set the project id.  Raises ``Refused``: EOPNOTSUPP without the feature, EOVERFLOW where there is no room."""
    if project == inode.project:
        return inode
    if Feature.PROJECT not in tx.superblock.features:
        raise Refused(errno.EOPNOTSUPP)
    if not inodestore.has_project(inode):
        raise Refused(errno.EOVERFLOW)
    return _stamped(tx, inode, project=project)
