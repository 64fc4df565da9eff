"""File data that change: WRITE, FALLOCATE.

Each is ``iomapwrite.begin`` for all that is to be written, the data themselves, and ``iomapwrite.ioend``: what a kernel
with fuse iomap calls, too.  Here all three are one transaction, which applies when the data are written: nobody sees a
block, or a longer file, without them, whichever way it maps its blocks.
"""

import errno
import stat

from fusewire import filewrite, uapi, wire
from fusewire.ext4 import iomap, iomapwrite, setattr, truncate
from fusewire.ext4.errors import Refused
from fusewire.ext4.inode import FLAG_APPEND, FLAG_IMMUTABLE, Inode
from fusewire.ext4.transaction import Transaction
from fusewire.filewrite import WritePlan
from fusewire.handlers import callers, nodes
from fusewire.session import Session
from fusewire.wire import Request

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x1, 0x2, 0x10     # fallocate(2)
WRITE_KILL_SUIDGID: int = uapi.FUSE_WRITE_KILL_SUIDGID
FROM_CACHE: int = uapi.FUSE_WRITE_CACHE     # a page that may hold old bytes as well as new ones


def write(session: Session, request: Request) -> WritePlan:
    """WRITE: the payload to where ``begin`` says, then ``ioend``."""
    offset, size, flags = request.body[1], request.body[2], request.body[3]
    data = request.payload
    assert data is not None
    data = data[:size]
    number = session.number_of(request.nodeid)
    if not flags & WRITE_KILL_SUIDGID:
        plan = _overwrite(session, request, session.fs.inode(number), offset, data)
        if plan is not None:
            return plan
    tx = Transaction(session.fs)
    found = writable(tx, number)
    if found.flags & FLAG_APPEND and offset < found.size and not flags & FROM_CACHE:
        raise Refused(errno.EPERM)
    tx.privileged = callers.writer_may_use_reserve(session, request, found, flags)
    if flags & WRITE_KILL_SUIDGID:
        found = setattr.drop_privileges(tx, found)
    end = min(offset + len(data), tx.max_file_bytes(found))
    if offset >= end:
        raise Refused(errno.EFBIG)
    data = data[:end - offset]
    writes = filewrite.plan_write(tx, found, offset, data)
    if flags & FROM_CACHE and tx.inode(number).sectors != found.sectors:
        tx.after_commit(lambda: session.outdated.add(number))   # st_blocks: it asks after writes of its own only
    return WritePlan(writes, lambda: _written(tx, request, number, offset, len(data)))


def _overwrite(session: Session, request: Request, found: Inode, offset: int, data: memoryview) -> WritePlan | None:
    """The plan of a WRITE that changes nothing but data, which are there already; None for every other."""
    end = offset + len(data)
    if not found.is_regular or found.flags & (FLAG_APPEND | FLAG_IMMUTABLE) or not offset < end <= found.size:
        return None
    mapping = nodes.mapping(session.fs, found, offset, end)
    if mapping.type != iomap.MAPPED or end > mapping.offset + mapping.length:
        return None
    place = mapping.addr + offset - mapping.offset
    return WritePlan([(place, [data])], lambda: _overwritten(session, request, len(data)))


def _overwritten(session: Session, request: Request, length: int) -> bytes:
    writing = session.fs.writing
    assert writing is not None
    writing.batch.wrote_data = True
    return wire.reply_write(request.unique, length)


def _written(tx: Transaction, request: Request, number: int, offset: int, length: int) -> bytes:
    with tx:
        iomapwrite.ioend(tx, tx.inode(number), offset, length)
    return wire.reply_write(request.unique, length)


def writable(tx: Transaction, number: int) -> Inode:
    """The inode of a regular file that may be written.  ``Refused``: EISDIR, EINVAL, EPERM."""
    found = tx.inode(number)
    if not found.is_regular:
        raise Refused(errno.EISDIR if stat.S_ISDIR(found.mode) else errno.EINVAL)
    iomapwrite.check_writable(found)
    return found


def fallocate(session: Session, request: Request) -> bytes | WritePlan:
    """FALLOCATE: reserve room, punch holes, make ranges read as zeroes."""
    _, offset, length, mode = request.body[:4]
    number = session.number_of(request.nodeid)
    if mode & ~(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE) or (mode & PUNCH_HOLE and not mode & KEEP_SIZE):
        raise Refused(errno.EOPNOTSUPP)
    if not length or offset + length >= 1 << 63:
        raise Refused(errno.EINVAL)
    with Transaction(session.fs) as tx:
        found = callers.dropped(tx, request, writable(tx, number))
        if found.flags & FLAG_APPEND and mode & ~KEEP_SIZE:
            raise Refused(errno.EPERM)
        if not mode & PUNCH_HOLE:   # before a byte is written: nothing remains of what is refused
            truncate.check_reservable(tx, found, offset, length)
    if mode & (PUNCH_HOLE | ZERO_RANGE):
        edges = filewrite.plan_zero_edges(session.fs, found, offset, length)
        return WritePlan(edges, lambda: _fallocated(session, request, number, wrote=bool(edges)))
    return _fallocated(session, request, number, wrote=False)


def _fallocated(session: Session, request: Request, number: int, *, wrote: bool) -> WritePlan:
    """The mapping changed, a transaction at a time, and at last the size; all of it may be run again."""
    _, offset, length, mode = request.body[:4]
    if mode & PUNCH_HOLE:
        punch(session, number, offset, min(length, session.fs.inode(number).size - offset))
    else:
        if mode & ZERO_RANGE:
            _make_unwritten(session, number, offset, length)
        _reserve(session, request, number, offset, length)
    tx = Transaction(session.fs)
    found = tx.inode(number)
    size = found.size if mode & KEEP_SIZE else max(found.size, offset + length)
    clear = filewrite.plan_clear(tx, found) if size > found.size else []

    def finish() -> bytes:
        with tx:
            truncate.set_size(tx, found, size)
            tx.wrote_data = wrote or bool(clear)
        return wire.reply_empty(request.unique)

    return WritePlan(clear, finish)


def punch(session: Session, number: int, offset: int, length: int) -> None:
    """Free the whole blocks in a range of a file, a transaction at a time; may be run again."""
    done = length <= 0
    while not done:
        with Transaction(session.fs) as tx:
            found = tx.inode(number)
            # what is punched at the end of the file reaches to the end of its last block
            reach = tx.geometry.byte_of(tx.geometry.blocks_for(found.size)) if offset + length >= found.size else 0
            _, done = truncate.punch(tx, found, offset, max(length, reach - offset))


def _make_unwritten(session: Session, number: int, offset: int, length: int) -> None:
    done, end = offset, offset + length
    while done < end:
        with Transaction(session.fs) as tx:
            _, done = truncate.make_unwritten(tx, tx.inode(number), done, end - done)


def _reserve(session: Session, request: Request, number: int, offset: int, length: int) -> None:
    reached, end = offset, offset + length
    while reached < end:
        with callers.transaction(session, request) as tx:
            _, reached = truncate.reserve(tx, tx.inode(number), reached, end - reached)
