"""IOCTL: the flags, version and project of an inode, the label and UUID of the file system.

The kernel transfers as many bytes as the request's number says, so an answer is cut or padded to that (``out_size``).
"""

import errno
from collections.abc import Callable
from struct import Struct

from fusewire import ioctl as numbers
from fusewire import wire
from fusewire.ext4 import control
from fusewire.ext4.errors import Refused
from fusewire.ext4.inode import Inode
from fusewire.session import Session
from fusewire.wire import Pieces, Request

LARGEST_ANSWER_BYTES = numbers.FSLABEL_BYTES
_U32 = Struct("=I").pack


def _flags(_session: Session, of: Inode) -> bytes:
    return _U32(control.getflags(of))


def _version(_session: Session, of: Inode) -> bytes:
    return _U32(of.generation)


def _fsxattr(_session: Session, of: Inode) -> bytes:
    return numbers.FSXATTR.pack(*control.fsxattr(of))


def _label(session: Session, _of: Inode) -> bytes:
    return session.fs.superblock.label


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

_CHANGES = frozenset((
    numbers.FS_IOC_SETFLAGS, numbers.FS_IOC32_SETFLAGS, numbers.FS_IOC_SETVERSION, numbers.FS_IOC32_SETVERSION,
    numbers.EXT4_IOC_SETVERSION, numbers.FS_IOC_FSSETXATTR, numbers.FS_IOC_SETFSLABEL, numbers.EXT4_IOC_SETFSUUID,
))


def ioctl(session: Session, request: Request) -> Pieces:
    """IOCTL.  ENOTTY for what is not known, EROFS for changes."""
    _, _, command, _, _, room = request.body
    answer = _QUESTIONS.get(command)
    if answer is None:
        raise Refused(errno.EROFS if command in _CHANGES else errno.ENOTTY)
    if room > LARGEST_ANSWER_BYTES:
        raise Refused(errno.EINVAL)
    data = answer(session, session.inode(request.nodeid))
    return wire.reply_ioctl(request.unique, 0, data.ljust(room, b"\0")[:room])
