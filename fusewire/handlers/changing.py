"""Attributes that change: SETATTR, SETXATTR, REMOVEXATTR.

The kernel has the writeback cache: size and times of regular files are its own, and what it sends is stored as it is.
"""

import errno

from fusewire import filewrite, uapi, wire
from fusewire.ext4 import inode as inodes
from fusewire.ext4 import inodestore, setattr, truncate
from fusewire.ext4.errors import Refused
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.inode import FLAG_APPEND, FLAG_IMMUTABLE, Inode
from fusewire.ext4.transaction import Transaction
from fusewire.filewrite import WritePlan
from fusewire.handlers import callers, nodes
from fusewire.session import Session
from fusewire.wire import Request

_MODE: int = uapi.FATTR_MODE
_UID: int = uapi.FATTR_UID
_GID: int = uapi.FATTR_GID
_SIZE: int = uapi.FATTR_SIZE
_ATIME: int = uapi.FATTR_ATIME
_MTIME: int = uapi.FATTR_MTIME
_CTIME: int = uapi.FATTR_CTIME
_ATIME_NOW: int = uapi.FATTR_ATIME_NOW
_MTIME_NOW: int = uapi.FATTR_MTIME_NOW
_KILL: int = uapi.FATTR_KILL_SUIDGID
_FIELDS = uapi.setattr_in.fields
_HANDLE: int = uapi.FATTR_FH | uapi.FATTR_LOCKOWNER
_TIMES_WRITTEN_BACK = _MTIME | _CTIME   # what the kernel sends when it writes back the times that it keeps


def setattr_(session: Session, request: Request) -> bytes | WritePlan:
    """SETATTR: mode, owner, times, size, in any combination, applied together."""
    wanted = dict(zip(_FIELDS, request.body, strict=True))
    valid = wanted["valid"]
    if valid & _SIZE:
        return _truncate(session, request, wanted)
    if valid == _TIMES_WRITTEN_BACK:
        found = session.inode(request.nodeid)
        if _has_times(found, wanted):
            return _attributes(session.fs, request, found)
    with callers.transaction(session, request) as tx:
        found = tx.inode(session.number_of(request.nodeid))
        _check_changeable(found, valid)
        tx.only_times = valid & ~_HANDLE == _TIMES_WRITTEN_BACK
        _apply(tx, found, wanted)
    return _attributes(session.fs, request, session.inode(request.nodeid))


def _has_times(found: Inode, wanted: dict[str, int]) -> bool:
    """Whether the times that the kernel writes back are those that we stamped: so after each RENAME and UNLINK."""
    return (found.mtime == (wanted["mtime"], wanted["mtimensec"])
            and found.ctime == (wanted["ctime"], wanted["ctimensec"]))


def _truncate(session: Session, request: Request, wanted: dict[str, int]) -> bytes | WritePlan:
    """A file that grows must not show what stands behind its end (FW2); it keeps what is reserved there."""
    found = session.inode(request.nodeid)
    _check_changeable(found, wanted["valid"])
    if found.is_regular and wanted["size"] > found.size:
        return _grow(session, request, wanted)
    return _cut(session, request, wanted)


def _grow(session: Session, request: Request, wanted: dict[str, int]) -> WritePlan:
    """All at once, with the reply: run again after the size has grown, this would cut."""
    tx = Transaction(session.fs)
    found = tx.inode(session.number_of(request.nodeid))
    zeroes = filewrite.plan_clear(tx, found)

    def finish() -> bytes:
        with tx:
            grown = _apply(tx, truncate.set_size(tx, found, wanted["size"]), wanted)
            tx.wrote_data = bool(zeroes)
            return _attributes(tx, request, grown)

    return WritePlan(zeroes, finish)


def _cut(session: Session, request: Request, wanted: dict[str, int]) -> bytes:
    """Store the size at once, then free what lies behind it, a transaction at a time.

    Running this again does nothing new: the size is what it shall be, and what was freed is free.
    """
    number = session.number_of(request.nodeid)
    with Transaction(session.fs) as tx:
        _apply(tx, truncate.set_size(tx, tx.inode(number), wanted["size"]), wanted)
    done = False
    while not done:
        with Transaction(session.fs) as tx:
            _, done = truncate.shrink(tx, tx.inode(number))
    return _attributes(session.fs, request, session.fs.inode(number))


def _check_changeable(found: Inode, valid: int) -> None:
    """Raise ``Refused(EPERM)``: an immutable or append-only file keeps its attributes, but the latter may be touched.

    Times that were stamped before the flag was set are still to be stored.
    """
    touched = valid & (_ATIME_NOW | _MTIME_NOW) and not valid & (_MODE | _UID | _GID | _SIZE)
    if valid & ~_HANDLE == _TIMES_WRITTEN_BACK or (touched and not found.flags & FLAG_IMMUTABLE):
        return
    if found.flags & (FLAG_IMMUTABLE | FLAG_APPEND):
        raise Refused(errno.EPERM)


def _apply(tx: Transaction, found: Inode, wanted: dict[str, int]) -> Inode:
    valid = wanted["valid"]
    if valid & (_UID | _GID) or not valid & ~_CTIME:   # chown(2) that leaves both takes privileges all the same
        found = setattr.chown(tx, found, wanted["uid"] if valid & _UID else None,
                              wanted["gid"] if valid & _GID else None)
    if valid & _MODE:
        found = setattr.chmod(tx, found, wanted["mode"])
    if valid & _KILL:
        found = setattr.drop_privileges(tx, found)
    times = (_time(tx, wanted, "atime", valid & _ATIME, valid & _ATIME_NOW),
             _time(tx, wanted, "mtime", valid & _MTIME, valid & _MTIME_NOW),
             _time(tx, wanted, "ctime", valid & _CTIME, 0))
    if any(time is not None for time in times):
        return setattr.utimens(tx, found, *times)
    if valid & _SIZE:
        return inodestore.change(tx, found, mtime=tx.now, ctime=tx.now)
    return found


def _time(tx: Transaction, wanted: dict[str, int], name: str, given: int, now: int) -> inodes.Time | None:
    if now:
        return tx.now
    if not given:
        return None
    return wanted[name], wanted[f"{name}nsec"]      # seconds before 1970 are negative: the record says so


def _attributes(fs: Ext4, request: Request, found: Inode) -> bytes:
    return wire.reply_attr(request.unique, wire.FOREVER, 0, nodes.entry(fs, found)[nodes.ATTR_AT:])


def setxattr(session: Session, request: Request) -> bytes:
    """SETXATTR: the value is the payload, as long as the record says."""
    size, flags = request.body[0], request.body[1]
    extra = request.body[2] if len(request.body) > 2 else 0
    assert request.payload is not None
    value = bytes(request.payload[:size])
    name = request.names[0]
    with callers.transaction(session, request) as tx:
        found = _with_changing_attributes(session, request, tx)
        if extra & uapi.FUSE_SETXATTR_ACL_KILL_SGID:
            setattr.set_acl(tx, found, name, value, drop_sgid=True)
        else:
            setattr.set_xattr(tx, found, name, value, flags)
    return wire.reply_empty(request.unique)


def removexattr(session: Session, request: Request) -> bytes:
    """REMOVEXATTR."""
    with Transaction(session.fs) as tx:
        setattr.set_xattr(tx, _with_changing_attributes(session, request, tx), request.names[0], None)
    return wire.reply_empty(request.unique)


def _with_changing_attributes(session: Session, request: Request, tx: Transaction) -> Inode:
    found = tx.inode(session.number_of(request.nodeid))
    if found.flags & (FLAG_IMMUTABLE | FLAG_APPEND):
        raise Refused(errno.EPERM)
    return found
