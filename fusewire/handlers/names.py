"""Names: LOOKUP, what the kernel forgets, and READLINK."""

import errno

from fusewire import uapi, wire
from fusewire.ext4 import inode as inodes
from fusewire.ext4 import namespace
from fusewire.ext4.errors import Corrupt, Refused
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.inode import Inode
from fusewire.handlers import nodes
from fusewire.session import ROOT_INODE, Session, node_of
from fusewire.wire import Pieces, ProtocolError, Request

_ENTRY_REPLY_BYTES: int = uapi.entry_out.size


def lookup(session: Session, request: Request) -> bytes:
    """LOOKUP.  That a name does not exist is remembered by the kernel as well as what it leads to."""
    fs, name = session.fs, request.names[0]
    if name in (b".", b".."):
        return _lookup_by_handle(session, request, name)
    try:
        number = namespace.lookup(fs, session.inode(request.nodeid), name)
    except Refused as refusal:
        if refusal.errno == errno.ENOENT:
            return wire.reply_negative(request.unique, wire.FOREVER)
        raise
    return _entry(session, request, _checked(fs, fs.inode(number)))


def _checked(fs: Ext4, found: Inode) -> Inode:
    """The inode, if a name may lead to it; one view is checked once (2 µs of the 10 that a LOOKUP takes)."""
    known: nodes.Memo | None = found.memo
    if known is None or not known.checked:
        inodes.check_in_use(fs, found)
        nodes.memo(fs, found).checked = True
    return found


def _entry(session: Session, request: Request, found: Inode) -> bytes:
    reply = wire.header(request.unique, _ENTRY_REPLY_BYTES) + nodes.entry(session.fs, found)
    session.lookups.add(found.number)
    return reply


def _lookup_by_handle(session: Session, request: Request, name: bytes) -> bytes:
    """LOOKUP of "." and "..": the kernel has a node id out of a file handle, which anybody may have made up."""
    try:
        found = inodes.check_in_use(session.fs, session.inode(request.nodeid))
    except Corrupt as error:
        raise Refused(errno.ESTALE) from error
    if name == b"..":
        found = namespace.lookup_inode(session.fs, found, name)
    return _entry(session, request, found)


def forget(session: Session, request: Request) -> None:
    """FORGET: the kernel gives back so many of its references to an inode."""
    _forget(session, _number(request.nodeid), request.body[0])


def batch_forget(session: Session, request: Request) -> None:
    """BATCH_FORGET: the same for several inodes.  ProtocolError if there are fewer than it says."""
    assert request.payload is not None  # the opcode's shape has one
    count, size = request.body[0], uapi.forget_one.size
    if count * size > len(request.payload):
        raise ProtocolError(f"{count} forgets in {len(request.payload)} bytes", request.unique, request.opcode)
    for node, times in uapi.forget_one.struct.iter_unpack(request.payload[:count * size]):
        _forget(session, _number(node), times)


def _forget(session: Session, number: int, times: int) -> None:
    """Note an inode that has no name any more when the kernel has forgotten it: nobody can use it then."""
    left = session.lookups.forget(number, times)
    writing = session.fs.writing
    if not left and writing is not None and number in writing.orphans:
        session.unused.append(number)


def _number(node: int) -> int:
    return ROOT_INODE if node == node_of(ROOT_INODE) else node


def readlink(session: Session, request: Request) -> Pieces:
    """READLINK."""
    return wire.reply_data(request.unique, namespace.readlink(session.fs, session.inode(request.nodeid)))
