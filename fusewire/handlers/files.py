"""Files: OPEN and RELEASE, READ, LSEEK, BMAP, FLUSH and FSYNC."""

import errno
import os

from fusewire import fileio, uapi, wire
from fusewire.ext4 import iomap, verityfile
from fusewire.ext4.errors import Refused
from fusewire.ext4.inode import Inode
from fusewire.fileio import Plan
from fusewire.handlers import nodes
from fusewire.session import Durable, Session, WrittenBack
from fusewire.wire import Pieces, Request

SECTOR_BYTES = 512
_ONLY_DATA: int = uapi.FUSE_FSYNC_FDATASYNC


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


def fsync(session: Session, request: Request) -> bytes | Durable:
    """FSYNC, FSYNCDIR: everything that was done is durable; the journal keeps the order, so all of it is."""
    reply = wire.reply_empty(request.unique)
    return reply if session.fs.writing is None else Durable(reply, bool(request.body[1] & _ONLY_DATA))


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
    if found.is_verity and not found.is_encrypted:
        return _verified(session, found, offset, end)
    return _plan(session, found, offset, end)


def _verified(session: Session, of: Inode, offset: int, end: int) -> Plan:
    """The plan of a READ of a verity file: whole blocks of its Merkle tree, checked before the reply is sent."""
    fs, known = session.fs, nodes.memo(session.fs, of)
    tree = known.tree
    if tree is None:
        tree = known.tree = verityfile.tree_of(fs, of)
    first, last = (place >> tree.descriptor.block_bits for place in (offset, end - 1))
    start = first << tree.descriptor.block_bits
    stop = min((last + 1) << tree.descriptor.block_bits, of.size)
    blocks = verityfile.tree_blocks(fs, of, tree, first, last)
    found = _plan(session, of, start, stop)
    found.reply = slice(offset - start, end - start)
    found.verify = verityfile.verifier(tree, first, blocks)
    return found


def _plan(session: Session, of: Inode, offset: int, end: int) -> Plan:
    return fileio.plan(session.fs, of, offset, end, nodes.mapping(session.fs, of, offset, end))


def lseek(session: Session, request: Request) -> bytes | WrittenBack:
    """LSEEK with SEEK_DATA or SEEK_HOLE; the kernel does the other kinds itself.

    It does not write back first what its cache holds: who copies a file that another writes would take that for holes.
    """
    _, offset, whence = request.body
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise Refused(errno.EINVAL)
    _file(session, request)

    def seek() -> bytes:
        found = session.inode(request.nodeid)
        return wire.reply_lseek(request.unique, iomap.seek(session.fs, found, offset, whence == os.SEEK_DATA))

    return seek() if session.fs.writing is None else WrittenBack(request.nodeid, offset, seek)


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
