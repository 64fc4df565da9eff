"""IOCTL: the flags, version and project of an inode, the label and UUID of the file system.

The kernel transfers as many bytes as the request's number says, so an answer is cut or padded to that (``out_size``).
Who may change flags and projects the kernel has checked; the other changes are checked here.
"""

import errno
from collections.abc import Callable
from struct import Struct

from fusewire import ioctl as numbers
from fusewire import wire
from fusewire.ext4 import control, inodestore, setattr, superstore
from fusewire.ext4.errors import Refused
from fusewire.ext4.inode import Inode
from fusewire.ext4.transaction import Transaction
from fusewire.filewrite import DiscardPlan
from fusewire.handlers import administration, callers
from fusewire.handlers.callers import ROOT_USER
from fusewire.session import Session, Shutdown
from fusewire.wire import Pieces, Request

LARGEST_ANSWER_BYTES = numbers.FSLABEL_BYTES
LABEL_BYTES = 16
_LABEL = "volume_name"
_U32 = Struct("=I")


# --- Questions --------------------------------------------------------------------------------------------------------

def _flags(_session: Session, of: Inode) -> bytes:
    return _U32.pack(control.getflags(of))


def _version(_session: Session, of: Inode) -> bytes:
    return _U32.pack(of.generation)


def _fsxattr(_session: Session, of: Inode) -> bytes:
    return numbers.FSXATTR.pack(*control.fsxattr(of))


def _label(session: Session, _of: Inode) -> bytes:
    return superstore.get_bytes(session.fs, _LABEL)


def _uuid(session: Session, _of: Inode) -> bytes:
    uuid = session.fs.superblock.uuid
    return numbers.FSUUID2.pack(len(uuid), uuid)


_QUESTIONS: dict[int, Callable[[Session, Inode], bytes]] = {
    numbers.FS_IOC_GETFLAGS: _flags,
    numbers.FS_IOC32_GETFLAGS: _flags,
    numbers.FS_IOC_GETVERSION: _version,
    numbers.FS_IOC32_GETVERSION: _version,
    numbers.EXT4_IOC_GETVERSION: _version,
    numbers.FS_IOC_FSGETXATTR: _fsxattr,
    numbers.FS_IOC_GETFSLABEL: _label,
    numbers.FS_IOC_GETFSUUID: _uuid,
}


# --- Changes ----------------------------------------------------------------------------------------------------------

def _set_flags(tx: Transaction, _request: Request, of: Inode, value: bytes) -> None:
    setattr.set_flags(tx, of, _number(value))


def _set_fsxattr(tx: Transaction, _request: Request, of: Inode, value: bytes) -> None:
    if len(value) < numbers.FSXATTR.size:
        raise Refused(errno.EINVAL)
    xflags, _, _, project, _ = numbers.FSXATTR.unpack_from(value)
    of = setattr.set_flags(tx, of, control.flags_of(of, xflags))
    setattr.set_project(tx, of, project)


def _set_version(tx: Transaction, request: Request, of: Inode, value: bytes) -> None:
    """The version is part of what checksums are computed with: where there are any, it stays."""
    if request.uid not in (ROOT_USER, of.uid):
        raise Refused(errno.EPERM)
    if tx.has_checksums:
        raise Refused(errno.ENOTTY)
    inodestore.change(tx, of, generation=_number(value), ctime=tx.now)


def _set_label(tx: Transaction, request: Request, _of: Inode, value: bytes) -> None:
    """In the superblock; its copies have the label that the file system was made with, as e2fsck leaves them, too."""
    if request.uid != ROOT_USER:
        raise Refused(errno.EPERM)
    label = value[:LABEL_BYTES + 1].split(b"\0", 1)[0]
    if len(label) > LABEL_BYTES:
        raise Refused(errno.EINVAL)
    superstore.change(tx, **{_LABEL: label})


def _refuse(_tx: Transaction, _request: Request, _of: Inode, _value: bytes) -> None:
    raise Refused(errno.EOPNOTSUPP)


def _number(value: bytes) -> int:
    if len(value) < _U32.size:
        raise Refused(errno.EINVAL)
    number: int = _U32.unpack_from(value)[0]
    return number


_CHANGES: dict[int, Callable[[Transaction, Request, Inode, bytes], None]] = {
    numbers.FS_IOC_SETFLAGS: _set_flags,
    numbers.FS_IOC32_SETFLAGS: _set_flags,
    numbers.FS_IOC_SETVERSION: _set_version,
    numbers.FS_IOC32_SETVERSION: _set_version,
    numbers.EXT4_IOC_SETVERSION: _set_version,
    numbers.FS_IOC_FSSETXATTR: _set_fsxattr,
    numbers.FS_IOC_SETFSLABEL: _set_label,
    numbers.EXT4_IOC_SETFSUUID: _refuse,
}


_OF_ADMINISTRATORS: dict[int, Callable[[Session, Request], Pieces | DiscardPlan | Shutdown]] = {
    numbers.FITRIM: administration.fitrim,
    numbers.EXT4_IOC_SHUTDOWN: administration.shut_down,
}


def ioctl(session: Session, request: Request) -> Pieces | DiscardPlan | Shutdown:
    """IOCTL.  ENOTTY for what is not known, EROFS for changes on a read-only mount."""
    _, _, command, _, _, room = request.body
    administrate = _OF_ADMINISTRATORS.get(command)
    if administrate is not None:
        return administrate(session, request)
    if room > LARGEST_ANSWER_BYTES:
        raise Refused(errno.EINVAL)
    change, answer = _CHANGES.get(command), _QUESTIONS.get(command)
    data = b""
    if change is not None:
        _change(session, request, change)
    elif answer is not None:
        data = answer(session, session.inode(request.nodeid))
    else:
        raise Refused(errno.ENOTTY)
    return wire.reply_ioctl(request.unique, 0, data.ljust(room, b"\0")[:room])


def _change(session: Session, request: Request, change: Callable[[Transaction, Request, Inode, bytes], None]) -> None:
    if session.read_only or session.mounted.read_only:
        raise Refused(errno.EROFS)
    value = bytes(request.payload or b"")
    with callers.transaction(session, request) as tx:
        change(tx, request, tx.inode(session.number_of(request.nodeid)), value)
