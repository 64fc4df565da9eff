"""Bytes from /dev/fuse → `Request`. Source: <linux/fuse.h>; Documentation/filesystems/fuse.

A message is the 40-byte header, then what its opcode says: a fixed record, names that end in NUL, a payload. At the
very end may stand extensions, counted by the header in units of 8 bytes. `SHAPES` says which opcode has which parts.

W1  `decode` gives a Request or raises ProtocolError, whatever the bytes.
W2  Bytes behind the parts that the shape names are ignored: a newer kernel may append to any message.
W3  Body and names of a Request own their memory; only the payload is a view of the receive buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from fusewire import uapi
from fusewire.uapi import Codec

HEADER_SIZE: Final[int] = uapi.in_header.size

RESEND_BIT: Final[int] = uapi.FUSE_UNIQUE_RESEND

_unpack_header = uapi.in_header.unpack


class ProtocolError(Exception):
    """A message that cannot be what the kernel meant. `unique` names it, or is 0 if not even that could be read."""

    def __init__(self, message: str, unique: int = 0, opcode: int = 0) -> None:
        super().__init__(message)
        self.unique = unique
        self.opcode = opcode


class RequestShape(NamedTuple):
    """What follows the header in a request of one opcode.

    Attributes:
        codec: the fixed record, or None.
        names: how many NUL-terminated names come next.
        payload: whether the rest is data.
        shortest: a record of at least so many bytes is accepted, its missing fields are 0; None: it must be whole.
    """

    codec: Codec | None = None
    names: int = 0
    payload: bool = False
    shortest: int | None = None


class Request:
    """One decoded request.

    Attributes:
        body: the fields of its record as the codec's `fields` lists them, () if it has none.
        names: its names as bytes, without NUL, not checked further.
        payload: its data; dies with the receive buffer, see `detach`. None if the opcode has none.
        unique: the id to answer with, RESEND_BIT included.
    """

    __slots__ = ("body", "gid", "names", "nodeid", "opcode", "payload", "pid", "uid", "unique")

    def __init__(
        self,
        opcode: int,
        unique: int,
        nodeid: int,
        uid: int,
        gid: int,
        pid: int,
        body: tuple[int, ...] = (),
        names: tuple[bytes, ...] = (),
        payload: memoryview | None = None,
    ) -> None:
        self.opcode = opcode
        self.unique = unique
        self.nodeid = nodeid
        self.uid = uid
        self.gid = gid
        self.pid = pid
        self.body = body
        self.names = names
        self.payload = payload

    def __repr__(self) -> str:
        payload = "" if self.payload is None else f" + {len(self.payload)} bytes"
        return f"<Request {self.unique:#x} opcode {self.opcode} node {self.nodeid} {self.body} {self.names}{payload}>"

    @property
    def resent(self) -> bool:
        """Whether the kernel sends it again after NOTIFY_RESEND: it may have been carried out before."""
        return self.unique >= RESEND_BIT

    def detach(self) -> Request:
        """A request that outlives the receive buffer: itself if there is no payload, else a copy with its own."""
        if self.payload is None:
            return self
        owned = memoryview(bytes(self.payload))
        return Request(
            self.opcode, self.unique, self.nodeid, self.uid, self.gid, self.pid, self.body, self.names, owned
        )


class Cursor:
    """Reads a payload part by part. Each verb raises ProtocolError at the end of the bytes."""

    __slots__ = ("_end", "_position", "_view")

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0
        self._end = len(view)

    def __len__(self) -> int:
        """The bytes not yet read."""
        return self._end - self._position

    def record(self, codec: Codec) -> tuple[int, ...]:
        """The fields of the next record."""
        start = self._position
        if codec.size > self._end - start:
            raise ProtocolError(f"{codec.name} has {self._end - start} of {codec.size} bytes")
        self._position = start + codec.size
        return codec.unpack(self._view, start)

    def name(self) -> bytes:
        """The bytes up to the next NUL, which is skipped."""
        raw = self._view[self._position : self._end].tobytes()
        length = raw.find(0)
        if length < 0:
            raise ProtocolError("name without NUL")
        self._position += length + 1
        return raw[:length]

    def rest(self) -> memoryview:
        """Everything that is left."""
        rest = self._view[self._position : self._end]
        self._position = self._end
        return rest


_NAME: Final = RequestShape(names=1)
_TWO_NAMES: Final = RequestShape(names=2)
_NOTHING: Final = RequestShape()

_OPEN: Final = RequestShape(uapi.open_in)
_READ: Final = RequestShape(uapi.read_in)
_RELEASE: Final = RequestShape(uapi.release_in)
_FSYNC: Final = RequestShape(uapi.fsync_in)
_LOCK: Final = RequestShape(uapi.lk_in)
_COPY: Final = RequestShape(uapi.copy_file_range_in)

INIT_SHORTEST: Final = 16
"""INIT up to 7.35 ends after `flags`; 7.36 added `flags2`."""

SHAPES: Final[Mapping[int, RequestShape]] = {
    uapi.FUSE_LOOKUP: _NAME,
    uapi.FUSE_FORGET: RequestShape(uapi.forget_in),
    uapi.FUSE_GETATTR: RequestShape(uapi.getattr_in),
    uapi.FUSE_SETATTR: RequestShape(uapi.setattr_in),
    uapi.FUSE_READLINK: _NOTHING,
    uapi.FUSE_SYMLINK: _TWO_NAMES,
    uapi.FUSE_MKNOD: RequestShape(uapi.mknod_in, names=1),
    uapi.FUSE_MKDIR: RequestShape(uapi.mkdir_in, names=1),
    uapi.FUSE_UNLINK: _NAME,
    uapi.FUSE_RMDIR: _NAME,
    uapi.FUSE_RENAME: RequestShape(uapi.rename_in, names=2),
    uapi.FUSE_LINK: RequestShape(uapi.link_in, names=1),
    uapi.FUSE_OPEN: _OPEN,
    uapi.FUSE_READ: _READ,
    uapi.FUSE_WRITE: RequestShape(uapi.write_in, payload=True),
    uapi.FUSE_STATFS: _NOTHING,
    uapi.FUSE_RELEASE: _RELEASE,
    uapi.FUSE_FSYNC: _FSYNC,
    uapi.FUSE_SETXATTR: RequestShape(uapi.setxattr_in, names=1, payload=True),
    uapi.FUSE_GETXATTR: RequestShape(uapi.getxattr_in, names=1),
    uapi.FUSE_LISTXATTR: RequestShape(uapi.getxattr_in),
    uapi.FUSE_REMOVEXATTR: _NAME,
    uapi.FUSE_FLUSH: RequestShape(uapi.flush_in),
    uapi.FUSE_INIT: RequestShape(uapi.init_in, shortest=INIT_SHORTEST),
    uapi.FUSE_OPENDIR: _OPEN,
    uapi.FUSE_READDIR: _READ,
    uapi.FUSE_RELEASEDIR: _RELEASE,
    uapi.FUSE_FSYNCDIR: _FSYNC,
    uapi.FUSE_GETLK: _LOCK,
    uapi.FUSE_SETLK: _LOCK,
    uapi.FUSE_SETLKW: _LOCK,
    uapi.FUSE_ACCESS: RequestShape(uapi.access_in),
    uapi.FUSE_CREATE: RequestShape(uapi.create_in, names=1),
    uapi.FUSE_INTERRUPT: RequestShape(uapi.interrupt_in),
    uapi.FUSE_BMAP: RequestShape(uapi.bmap_in),
    uapi.FUSE_DESTROY: _NOTHING,
    uapi.FUSE_IOCTL: RequestShape(uapi.ioctl_in, payload=True),
    uapi.FUSE_POLL: RequestShape(uapi.poll_in),
    uapi.FUSE_NOTIFY_REPLY: RequestShape(uapi.notify_retrieve_in, payload=True),
    uapi.FUSE_BATCH_FORGET: RequestShape(uapi.batch_forget_in, payload=True),
    uapi.FUSE_FALLOCATE: RequestShape(uapi.fallocate_in),
    uapi.FUSE_READDIRPLUS: _READ,
    uapi.FUSE_RENAME2: RequestShape(uapi.rename2_in, names=2),
    uapi.FUSE_LSEEK: RequestShape(uapi.lseek_in),
    uapi.FUSE_COPY_FILE_RANGE: _COPY,
    uapi.FUSE_SETUPMAPPING: RequestShape(uapi.setupmapping_in),
    uapi.FUSE_REMOVEMAPPING: RequestShape(uapi.removemapping_in, payload=True),
    uapi.FUSE_SYNCFS: RequestShape(uapi.syncfs_in),
    uapi.FUSE_TMPFILE: RequestShape(uapi.create_in, names=1),
    uapi.FUSE_STATX: RequestShape(uapi.statx_in),
    uapi.FUSE_COPY_FILE_RANGE_64: _COPY,
    uapi.CUSE_INIT: RequestShape(uapi.cuse_init_in),
}
"""Opcode → shape, for a connection that negotiated SETXATTR_EXT whenever it was offered (every kernel since 5.13)."""

_UNKNOWN: Final = RequestShape(payload=True)


def _setxattr_before_ext() -> Codec:
    """setxattr_in as its first 8 bytes, for connections without SETXATTR_EXT; `setxattr_flags` is then 0."""
    codec = Codec(uapi.setxattr_in.name, uapi.FUSE_COMPAT_SETXATTR_IN_SIZE, [("size", 0, "I"), ("flags", 4, "I")])
    unpack = codec.struct.unpack_from
    codec.unpack = lambda view, offset=0: (*unpack(view, offset), 0)
    return codec


def shapes_for(flags: int) -> Mapping[int, RequestShape]:
    """The shapes on a connection with these INIT flags granted."""
    if flags & uapi.FUSE_SETXATTR_EXT:
        return SHAPES
    return {**SHAPES, uapi.FUSE_SETXATTR: RequestShape(_setxattr_before_ext(), names=1, payload=True)}


def decode(view: memoryview, length: int, shapes: Mapping[int, RequestShape] = SHAPES) -> Request:
    """The request in the first `length` bytes of the receive buffer. An opcode without shape gives payload only."""
    if length < HEADER_SIZE or length > len(view):
        raise ProtocolError(f"message of {length} bytes")
    size, opcode, unique, nodeid, uid, gid, pid, extensions = _unpack_header(view)
    if size != length:
        raise ProtocolError(f"message of {length} bytes says {size}", unique, opcode)
    codec, names, payload, shortest = shapes.get(opcode, _UNKNOWN)
    end = length - 8 * extensions
    position = HEADER_SIZE
    body: tuple[int, ...] = ()
    if codec is not None:
        position += codec.size
        if position <= end:
            body = codec.unpack(view, HEADER_SIZE)
        elif shortest is not None:
            body = _unpack_short(codec, view[HEADER_SIZE:end], shortest, unique, opcode)
            position = end
        else:
            raise ProtocolError(f"{codec.name} has {end - HEADER_SIZE} of {codec.size} bytes", unique, opcode)
    elif position > end:
        raise ProtocolError(f"extensions of {8 * extensions} in {length} bytes", unique, opcode)
    if not names:
        data = view[position:end] if payload else None
        return Request(opcode, unique, nodeid, uid, gid, pid, body, (), data)
    found, position = _split_names(view, position, end, names, unique, opcode)
    data = view[position:end] if payload else None
    return Request(opcode, unique, nodeid, uid, gid, pid, body, found, data)


def _unpack_short(codec: Codec, view: memoryview, shortest: int, unique: int, opcode: int) -> tuple[int, ...]:
    """The fields of a record whose end may be missing."""
    if len(view) < shortest:
        raise ProtocolError(f"{codec.name} has {len(view)} of at least {shortest} bytes", unique, opcode)
    return codec.unpack(bytes(view).ljust(codec.size, b"\0"))


def _split_names(
    view: memoryview, position: int, end: int, count: int, unique: int, opcode: int
) -> tuple[tuple[bytes, ...], int]:
    """So many names from `position` on, and where they end."""
    # SETXATTR alone has data behind its name, at most 64 KiB of it: not worth a search that stops at the NUL.
    parts = view[position:end].tobytes().split(b"\0", count)
    if len(parts) <= count:
        raise ProtocolError(f"{len(parts) - 1} of {count} names", unique, opcode)
    return tuple(parts[:count]), end - len(parts[count])
