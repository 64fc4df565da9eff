"""Extended attributes: GETXATTR, LISTXATTR."""

import errno

from fusewire import wire
from fusewire.ext4 import xattr
from fusewire.ext4.errors import Refused
from fusewire.handlers.callers import ROOT_USER
from fusewire.session import Session
from fusewire.wire import Pieces, Request


def getxattr(session: Session, request: Request) -> bytes | Pieces:
    """GETXATTR: the value of an attribute, or its size if the request has room for none."""
    found, name = session.inode(request.nodeid), request.names[0]
    if xattr.has_none(found):   # the usual answer, and the kernel asks for capabilities before it writes
        xattr.split(session.fs, name)
        return wire.reply_error(request.unique, errno.ENODATA)
    value = xattr.get(session.fs, found, name)
    return _sized(request, value)


def listxattr(session: Session, request: Request) -> bytes | Pieces:
    """LISTXATTR: the names, each with a NUL behind it; trusted ones for root only."""
    found = xattr.names(session.fs, session.inode(request.nodeid), trusted=request.uid == ROOT_USER)
    return _sized(request, b"".join(name + b"\0" for name in found))


def _sized(request: Request, value: bytes) -> bytes | Pieces:
    room = request.body[0]
    if room == 0:
        return wire.reply_xattr_size(request.unique, len(value))
    if room < len(value):
        raise Refused(errno.ERANGE)
    return wire.reply_data(request.unique, value)
