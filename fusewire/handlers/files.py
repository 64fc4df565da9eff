"""Files: OPEN and RELEASE, READ, LSEEK, BMAP, FLUSH and FSYNC."""

import errno
import os

from fusewire import fileio, uapi, wire
from fusewire.ext4 import iomap
from fusewire.ext4.errors import Refused
from fusewire.ext4.inode import Inode
from fusewire.fileio import Plan
from fusewire.session import Session
from fusewire.wire import Pieces, Request

SECTOR_BYTES = 512


def open(session: Session, request: Request) -> bytes:
    """OPEN: ENOSYS, after which the kernel opens without asking, unless a file may need a key that is not there."""
    if not session.asks_open and session.negotiated is not None and session.negotiated.no_open:
        raise Refused(errno.ENOSYS)
    found = session.inode(request.nodeid)
    if found.is_encrypted and found.is_regular:
        raise Refused(errno.ENOKEY)
    return wire.reply_open(request.unique, 0, uapi.FOPEN_KEEP_CACHE)


def release(_session: Session, request: Request) -> bytes:
    """RELEASE, RELEASEDIR: handles hold nothing."""
    return wire.reply_empty(request.unique)


def flush(_session: Session, _request: Request) -> bytes:
    """FLUSH: closing a file has nothing to write; ENOSYS, and the kernel does not ask again."""
    raise Refused(errno.ENOSYS)


def fsync(_session: Session, request: Request) -> bytes:
    """FSYNC, FSYNCDIR: nothing is written yet, so all of it is on the device."""
    return wire.reply_empty(request.unique)


def read(session: Session, request: Request) -> Plan | Pieces:
    """READ: a plan for ``fileio``, or the data themselves where the inode holds them."""
    offset, size = request.body[1], request.body[2]
    found = _file(session, request)
    end = min(offset + min(size, fileio.READ_MOST_BYTES), found.size)
    if offset >= end:
        return wire.reply_data(request.unique, b"")
    if found.is_inline and not found.is_encrypted:
        data = iomap.inline_data(session.fs, found)[offset:end]
        return wire.reply_data(request.unique, data.ljust(end - offset, b"\0"))
    return fileio.plan(session.fs, found, offset, end)


def lseek(session: Session, request: Request) -> bytes:
    """LSEEK with SEEK_DATA or SEEK_HOLE; the kernel does the other kinds itself."""
    _, offset, whence = request.body
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise Refused(errno.EINVAL)
    found = _file(session, request)
    return wire.reply_lseek(request.unique, iomap.seek(session.fs, found, offset, whence == os.SEEK_DATA))


def bmap(session: Session, request: Request) -> bytes:
    """BMAP: where a block of the file stands on the device, both counted in the request's block size; 0 for a hole."""
    block, block_bytes = request.body
    found = _file(session, request)
    if block_bytes < SECTOR_BYTES or block_bytes & (block_bytes - 1) or found.is_inline:
        raise Refused(errno.EINVAL)
    offset = block * block_bytes
    if offset >= found.size:
        return wire.reply_block(request.unique, 0)
    mapping = iomap.begin(session.fs, found, offset, block_bytes, iomap.OP_REPORT)
    if mapping.type != iomap.MAPPED:
        return wire.reply_block(request.unique, 0)
    return wire.reply_block(request.unique, (mapping.addr + offset - mapping.offset) // block_bytes)


def _file(session: Session, request: Request) -> Inode:
    found = session.inode(request.nodeid)
    if not found.is_regular:
        raise Refused(errno.EISDIR if found.is_dir else errno.EINVAL)
    return found
