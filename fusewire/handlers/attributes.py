"""Attributes: GETATTR, STATX, STATFS."""

from struct import Struct

from fusewire import uapi, wire
from fusewire.ext4 import statfs as figures
from fusewire.handlers import nodes
from fusewire.session import Session
from fusewire.wire import Request

# Header and the head of fuse_attr_out in one pack: 120 bytes, no error, unique, valid for ever.
_ATTR_HEAD = Struct("=IiQQI4x").pack
_ATTR_REPLY_BYTES: int = uapi.out_header.size + uapi.attr_out.size
_AT = nodes.ATTR_AT


def getattr(session: Session, request: Request) -> bytes:
    """GETATTR."""
    entry = nodes.entry(session.fs, session.inode(request.nodeid))
    return _ATTR_HEAD(_ATTR_REPLY_BYTES, 0, request.unique, wire.FOREVER, 0) + entry[_AT:]


def statx(session: Session, request: Request) -> bytes:
    """STATX: what GETATTR tells, and the time of creation."""
    packed = nodes.statx(session.fs, session.inode(request.nodeid))
    return wire.reply_statx(request.unique, wire.FOREVER, 0, packed)


def statfs(session: Session, request: Request) -> bytes:
    """STATFS."""
    found = figures.statfs(session.fs)
    return wire.reply_statfs(request.unique, found.blocks, found.free, found.available, found.files, found.files_free,
                             found.block_bytes, found.name_length, found.block_bytes)
