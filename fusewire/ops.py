"""The opcode table: one row is everything about one opcode, except its layout, which stands in ``wire.SHAPES``.

Tracing, error handling and the refusal of changes read the row.  An opcode without a handler is answered ENOSYS by
``not_served``; rows marked ``changes`` are answered EROFS on a read-only mount by ``refuse_change``, and with the
option ``sync`` only when they are durable; with ``dirsync`` those marked ``names`` are.
"""

import errno
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from fusewire import uapi
from fusewire.ext4.errors import Refused
from fusewire.fileio import Plan
from fusewire.filewrite import DiscardPlan, ReadPlan, WritePlan
from fusewire.handlers import (
    attributes,
    changing,
    connection,
    control,
    copying,
    creating,
    directories,
    files,
    names,
    writing,
    xattrs,
)
from fusewire.remount import AS_USUAL, MountFlags
from fusewire.session import Durable, Final, Session, Shutdown, WrittenBack
from fusewire.wire import Pieces, Request

Reply = (bytes | Pieces | Plan | ReadPlan | WritePlan | DiscardPlan | WrittenBack | Durable | Shutdown | Final
         | None)
Handler = Callable[[Session, Request], Reply]


class NotServed(Refused):
    """There is no handler for this opcode; ENOSYS, and the kernel does not ask again."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSYS)


def not_served(_session: Session, _request: Request) -> NoReturn:
    """The handler of opcodes that have none."""
    raise NotServed


class Op(NamedTuple):
    """One opcode.

    Attributes:
        handler: makes the reply, from a session and a request.
        replies: whether the kernel waits for a reply.
        changes: whether the operation changes the file system.
        names: whether it changes names.
    """

    opcode: int
    handler: Handler = not_served
    replies: bool = True
    changes: bool = False
    names: bool = False


UNKNOWN = Op(0)     # the row of every opcode that has none

_NAMES = {number: name.removeprefix("FUSE_") for number, name in uapi.enumerators("fuse_opcode").items()}


def name_of(opcode: int) -> str:
    """An opcode's name as in the header, without FUSE_."""
    return _NAMES.get(opcode, f"opcode {opcode}")


ROWS = (
    Op(uapi.FUSE_LOOKUP, names.lookup),
    Op(uapi.FUSE_FORGET, names.forget, replies=False),
    Op(uapi.FUSE_GETATTR, attributes.getattr),
    Op(uapi.FUSE_SETATTR, changing.setattr_, changes=True),
    Op(uapi.FUSE_READLINK, names.readlink),
    Op(uapi.FUSE_SYMLINK, creating.symlink, changes=True, names=True),
    Op(uapi.FUSE_MKNOD, creating.mknod, changes=True, names=True),
    Op(uapi.FUSE_MKDIR, creating.mkdir, changes=True, names=True),
    Op(uapi.FUSE_UNLINK, creating.unlink, changes=True, names=True),
    Op(uapi.FUSE_RMDIR, creating.rmdir, changes=True, names=True),
    Op(uapi.FUSE_RENAME, creating.rename, changes=True, names=True),
    Op(uapi.FUSE_LINK, creating.link, changes=True, names=True),
    Op(uapi.FUSE_OPEN, files.open),
    Op(uapi.FUSE_READ, files.read),
    Op(uapi.FUSE_WRITE, writing.write, changes=True),
    Op(uapi.FUSE_STATFS, attributes.statfs),
    Op(uapi.FUSE_RELEASE, files.release),
    Op(uapi.FUSE_FSYNC, files.fsync),
    Op(uapi.FUSE_SETXATTR, changing.setxattr, changes=True),
    Op(uapi.FUSE_GETXATTR, xattrs.getxattr),
    Op(uapi.FUSE_LISTXATTR, xattrs.listxattr),
    Op(uapi.FUSE_REMOVEXATTR, changing.removexattr, changes=True),
    Op(uapi.FUSE_FLUSH, files.flush),
    Op(uapi.FUSE_INIT, connection.init),
    Op(uapi.FUSE_OPENDIR, directories.opendir),
    Op(uapi.FUSE_READDIR, directories.readdir),
    Op(uapi.FUSE_RELEASEDIR, files.release),
    Op(uapi.FUSE_FSYNCDIR, files.fsync),
    Op(uapi.FUSE_GETLK),
    Op(uapi.FUSE_SETLK),
    Op(uapi.FUSE_SETLKW),
    Op(uapi.FUSE_ACCESS, connection.never_again),
    Op(uapi.FUSE_CREATE, creating.create, changes=True, names=True),
    Op(uapi.FUSE_INTERRUPT, connection.never_again),
    Op(uapi.FUSE_BMAP, files.bmap),
    Op(uapi.FUSE_DESTROY, connection.destroy),
    Op(uapi.FUSE_IOCTL, control.ioctl),
    Op(uapi.FUSE_POLL, connection.never_again),
    Op(uapi.FUSE_NOTIFY_REPLY, connection.ignore, replies=False),
    Op(uapi.FUSE_BATCH_FORGET, names.batch_forget, replies=False),
    Op(uapi.FUSE_FALLOCATE, writing.fallocate, changes=True),
    Op(uapi.FUSE_READDIRPLUS, directories.readdirplus),
    Op(uapi.FUSE_RENAME2, creating.rename2, changes=True, names=True),
    Op(uapi.FUSE_LSEEK, files.lseek),
    Op(uapi.FUSE_COPY_FILE_RANGE, copying.copy_file_range, changes=True),
    Op(uapi.FUSE_SETUPMAPPING),
    Op(uapi.FUSE_REMOVEMAPPING),
    Op(uapi.FUSE_SYNCFS, connection.syncfs),
    Op(uapi.FUSE_TMPFILE, creating.tmpfile, changes=True, names=True),
    Op(uapi.FUSE_STATX, attributes.statx),
    Op(uapi.FUSE_COPY_FILE_RANGE_64, copying.copy_file_range, changes=True),
)


def refuse_change(_session: Session, _request: Request) -> NoReturn:
    """The handler of every change on a read-only mount."""
    raise Refused(errno.EROFS)


def refuse_all(_session: Session, _request: Request) -> NoReturn:
    """The handler of everything after EXT4_IOC_SHUTDOWN."""
    raise OSError(errno.EIO, "the file system was shut down")


def shut_table(rows: tuple[Op, ...]) -> dict[int, Op]:
    """The rows by opcode of a file system that was shut down: only forgetting and unmounting succeed."""
    kept = (uapi.FUSE_DESTROY, uapi.FUSE_RELEASE, uapi.FUSE_RELEASEDIR)
    return {row.opcode: row if row.opcode in kept or not row.replies else row._replace(handler=refuse_all)
            for row in rows}


def durably(step: Callable[..., Reply]) -> Callable[..., Reply]:
    """The same step, but what it replies at last is sent when it is durable."""
    def run(*arguments: Any) -> Reply:
        reply = step(*arguments)
        if isinstance(reply, bytes | tuple):
            return Durable(reply if isinstance(reply, bytes) else b"".join(reply))
        if isinstance(reply, ReadPlan | WritePlan | DiscardPlan | WrittenBack):
            reply.then = durably(reply.then)
        if isinstance(reply, WritePlan) and reply.again is not None:
            reply.again = durably(reply.again)
        return reply
    return run


def _is_durable(row: Op, mounted: MountFlags) -> bool:
    """Whether mount options have a row's reply wait.  Not that of WRITE: the kernel sends FSYNC after write(2) then."""
    if row.opcode == uapi.FUSE_WRITE:
        return False
    return (mounted.sync and (row.changes or row.opcode == uapi.FUSE_IOCTL)) or (mounted.dirsync and row.names)


def table(rows: tuple[Op, ...], read_only: bool, mounted: MountFlags = AS_USUAL) -> dict[int, Op]:
    """The rows by opcode, as one mount uses them.  ValueError for an opcode with two rows."""
    found: dict[int, Op] = {}
    for row in rows:
        if row.opcode in found:
            raise ValueError(f"two rows for {name_of(row.opcode)}")
        if read_only:
            found[row.opcode] = row._replace(handler=refuse_change) if row.changes else row
        else:
            found[row.opcode] = row._replace(handler=durably(row.handler)) if _is_durable(row, mounted) else row
    return found
