"""Names that change: CREATE and its kin, LINK, UNLINK, RMDIR, RENAME.

Each is one transaction.  What a reply tells the kernel is counted only after the transaction has applied.
"""

import errno

from fusewire import uapi, wire
from fusewire.ext4 import namestore
from fusewire.ext4 import rename as renaming
from fusewire.ext4.errors import Refused
from fusewire.ext4.inode import Inode
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import Transaction
from fusewire.handlers import callers, nodes
from fusewire.session import Session
from fusewire.wire import Request

_ENTRY_REPLY_BYTES: int = uapi.entry_out.size


def _parent(session: Session, request: Request, tx: Transaction) -> Inode:
    return tx.inode(session.number_of(request.nodeid))


def _caller(session: Session, request: Request, umask: int) -> Caller:
    """Who creates; the kernel has taken the umask already unless it was asked not to."""
    agreed = session.negotiated
    ours = agreed is not None and agreed.flags & uapi.FUSE_DONT_MASK
    return Caller(request.uid, request.gid, umask & 0o777 if ours else 0)


def _entry(session: Session, request: Request, number: int) -> bytes:
    reply = wire.header(request.unique, _ENTRY_REPLY_BYTES) + nodes.entry(session.fs, session.fs.inode(number))
    session.lookups.add(number)
    return reply


def create(session: Session, request: Request) -> bytes:
    """CREATE: ENOSYS where opening needs no message, and the kernel uses MKNOD; else the file and a handle."""
    if not session.asks_open and session.negotiated is not None and session.negotiated.no_open:
        raise Refused(errno.ENOSYS)
    _, mode, umask, _ = request.body
    with callers.transaction(session, request) as tx:
        made = namestore.create(tx, _parent(session, request, tx), request.names[0], mode,
                                _caller(session, request, umask))
    entry = nodes.entry(session.fs, session.fs.inode(made.number))
    session.lookups.add(made.number)
    return wire.reply_create(request.unique, entry, 0, uapi.FOPEN_KEEP_CACHE)


def tmpfile(session: Session, request: Request) -> bytes:
    """TMPFILE: a file without a name."""
    _, mode, umask, _ = request.body
    with callers.transaction(session, request) as tx:
        made = namestore.tmpfile(tx, _parent(session, request, tx), mode, _caller(session, request, umask))
    entry = nodes.entry(session.fs, session.fs.inode(made.number))
    session.lookups.add(made.number)
    return wire.reply_create(request.unique, entry, 0, uapi.FOPEN_KEEP_CACHE)


def mknod(session: Session, request: Request) -> bytes:
    """MKNOD: a file of any type but directory and symbolic link."""
    mode, rdev, umask = request.body[:3]
    with callers.transaction(session, request) as tx:
        made = namestore.create(tx, _parent(session, request, tx), request.names[0], mode,
                                _caller(session, request, umask), _device(rdev))
    return _entry(session, request, made.number)


def _device(rdev: int) -> tuple[int, int]:
    """(major, minor) of a device number as the kernel's new_encode_dev writes it."""
    return rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00


def mkdir(session: Session, request: Request) -> bytes:
    """MKDIR."""
    mode, umask = request.body
    with callers.transaction(session, request) as tx:
        made = namestore.mkdir(tx, _parent(session, request, tx), request.names[0], mode,
                               _caller(session, request, umask))
    return _entry(session, request, made.number)


def symlink(session: Session, request: Request) -> bytes:
    """SYMLINK: the name, then the target."""
    name, target = request.names
    with callers.transaction(session, request) as tx:
        made = namestore.symlink(tx, _parent(session, request, tx), name, target, _caller(session, request, 0))
    return _entry(session, request, made.number)


def link(session: Session, request: Request) -> bytes:
    """LINK."""
    number = session.number_of(request.body[0])
    with callers.transaction(session, request) as tx:
        namestore.link(tx, tx.inode(number), _parent(session, request, tx), request.names[0])
    return _entry(session, request, number)


def unlink(session: Session, request: Request) -> bytes:
    """UNLINK: the inode lives on until the kernel forgets it."""
    with callers.transaction(session, request) as tx:
        gone = namestore.unlink(tx, _parent(session, request, tx), request.names[0])
    return _removed(session, request, gone)


def rmdir(session: Session, request: Request) -> bytes:
    """RMDIR."""
    with callers.transaction(session, request) as tx:
        gone = namestore.rmdir(tx, _parent(session, request, tx), request.names[0])
    return _removed(session, request, gone)


def _removed(session: Session, request: Request, gone: Inode) -> bytes:
    if not gone.links and not session.lookups.count(gone.number):
        session.unused.append(gone.number)
    return wire.reply_empty(request.unique)


def rename(session: Session, request: Request) -> bytes:
    """RENAME."""
    return _rename(session, request, 0)


def rename2(session: Session, request: Request) -> bytes:
    """RENAME2: with RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT."""
    return _rename(session, request, request.body[1])


def _rename(session: Session, request: Request, flags: int) -> bytes:
    old_name, new_name = request.names
    with callers.transaction(session, request) as tx:
        target = tx.inode(session.number_of(request.body[0]))
        done = renaming.rename(tx, _parent(session, request, tx), old_name, target, new_name, flags,
                               _caller(session, request, 0))
    if done.other is not None and not flags & renaming.EXCHANGE:
        return _removed(session, request, done.other)
    return wire.reply_empty(request.unique)
