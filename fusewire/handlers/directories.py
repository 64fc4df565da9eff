"""Directories: OPENDIR, READDIR, READDIRPLUS."""

import errno
from typing import TYPE_CHECKING

from fusewire import fileio, uapi, wire
from fusewire.ext4 import dirorder
from fusewire.ext4 import inode as inodes
from fusewire.ext4.errors import Corrupt, Refused
from fusewire.handlers import nodes
from fusewire.session import Session
from fusewire.wire import Pieces, Request

if TYPE_CHECKING:
    from fusewire.ext4.directory import Name
    from fusewire.ext4.inode import Inode

Place = tuple[int, int]     # block of the inode table, byte offset in it

OPENDIR_FLAGS: int = uapi.FOPEN_KEEP_CACHE | uapi.FOPEN_CACHE_DIR
_DOTS = (b".", b"..")


def opendir(session: Session, request: Request) -> bytes:
    """OPENDIR: not needed; ENOSYS means that every directory is opened so, and its listing kept."""
    if session.negotiated is not None and session.negotiated.no_opendir:
        raise Refused(errno.ENOSYS)
    return wire.reply_open(request.unique, 0, OPENDIR_FLAGS)


def readdir(session: Session, request: Request) -> Pieces:
    """READDIR."""
    found = _names(session, _directory(session, request), request, wire.DIRENT_SIZE)
    packed = [wire.dirent(name.inode, name.cookie, name.name, name.d_type) for name in found]
    return wire.reply_data(request.unique, b"".join(packed))


def readdirplus(session: Session, request: Request) -> Pieces:
    """READDIRPLUS: each name with its attributes, as if it had been looked up."""
    fs = session.fs
    found = _names(session, _directory(session, request), request, wire.DIRENTPLUS_SIZE)
    places = _that_fit(inodes.places(fs, [name.inode for name in found]), fs.cache.generation_blocks // 2)
    fs.cache.want({place[0] for place in places if place is not None})
    packed, known = [], []
    for (cookie, number, d_type, name), place in zip(found, places, strict=False):
        entry = wire.NO_ENTRY if name in _DOTS else _entry(session, number, place)
        if entry is not wire.NO_ENTRY:
            known.append(number)
        packed.append(wire.direntplus(entry, number, cookie, name, d_type))
    for number in known:
        session.lookups.add(number)
    return wire.reply_data(request.unique, b"".join(packed))


def _that_fit(places: "list[Place | None]", most_blocks: int) -> "list[Place | None]":
    """The first places, as many as lie in so many blocks, which the cache can hold; the rest comes next time."""
    blocks: set[int] = set()
    for count, place in enumerate(places):
        if place is not None:
            blocks.add(place[0])
            if len(blocks) > most_blocks:
                return places[:count]
    return places


def _entry(session: Session, number: int, place: tuple[int, int] | None) -> bytes:
    """The entry of an inode, or a name without one if the inode is broken: LOOKUP will say so to who asks for it."""
    fs = session.fs
    try:
        if place is not None:
            unread = nodes.unread_entry(session, number, place[0], place[1])
            if unread is not None:
                return unread
        return nodes.entry(fs, inodes.check_in_use(fs, fs.inode(number)))
    except (Corrupt, OSError):
        return wire.NO_ENTRY


def _directory(session: Session, request: Request) -> "Inode":
    found = session.inode(request.nodeid)
    if not found.is_dir:
        raise Refused(errno.ENOTDIR)
    return found


def _names(session: Session, of: "Inode", request: Request, head_bytes: int) -> "list[Name]":
    """The names from the request's offset on whose entries, ``head_bytes`` and the name each, fit in the reply.

    What comes before a broken block is given out; the error goes to who reads on from there.
    """
    _, cookie, size, *_ = request.body
    left = min(size, fileio.READ_MOST_BYTES)
    found: list[Name] = []
    try:
        for name in dirorder.read(session.fs, of, cookie):
            left -= head_bytes + (len(name.name) + 7 & ~7)
            if left < 0:
                break
            found.append(name)
    except Corrupt:
        if not found:
            raise
    return found
