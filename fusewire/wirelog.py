"""The wire log: every message between kernel and server as a line of JSON, which is also the tests' transcript format.

Each record has `time` [s since the epoch], `direction` ("request", "reply", "notification"), `opcode` (its name, or its
number if it has none), `unique`, and `raw`, the whole message in hex: what a replay needs. The rest is for readers:
`nodeid`, `uid`, `gid`, `pid`, `body`, `names` and `payload` (its size) of a request; `error`, `body`, `entries`,
`payload` and `duration` [µs] of a reply. A message that cannot be decoded has `problem` in place of these.

A log on the very file system that is being served would wait for itself: choose a file elsewhere.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any, Final, TextIO

from fusewire import uapi, wire
from fusewire.uapi import Codec

Record = dict[str, Any]

PENDING_MAX: Final = 65536
"""Requests remembered for the sake of their replies. The kernel's own queues are shorter unless a server hangs."""

_OPCODES: Final = uapi.enumerators("fuse_opcode")
_NOTIFICATIONS: Final = uapi.enumerators("fuse_notify_code")
_OUT: Final = uapi.out_header
_UNANSWERED: Final = frozenset({uapi.FUSE_FORGET, uapi.FUSE_BATCH_FORGET, uapi.FUSE_NOTIFY_REPLY})
_SIZE_OR_DATA: Final = frozenset({uapi.FUSE_GETXATTR, uapi.FUSE_LISTXATTR})

_ENTRY: Final = (uapi.entry_out,)
_ATTR: Final = (uapi.attr_out,)
_OPENED: Final = (uapi.open_out,)
_CREATED: Final = (uapi.entry_out, uapi.open_out)

REPLY_BODIES: Final[dict[int, tuple[Codec, ...]]] = {
    uapi.FUSE_LOOKUP: _ENTRY,
    uapi.FUSE_MKNOD: _ENTRY,
    uapi.FUSE_MKDIR: _ENTRY,
    uapi.FUSE_SYMLINK: _ENTRY,
    uapi.FUSE_LINK: _ENTRY,
    uapi.FUSE_GETATTR: _ATTR,
    uapi.FUSE_SETATTR: _ATTR,
    uapi.FUSE_CREATE: _CREATED,
    uapi.FUSE_TMPFILE: _CREATED,
    uapi.FUSE_OPEN: _OPENED,
    uapi.FUSE_OPENDIR: _OPENED,
    uapi.FUSE_WRITE: (uapi.write_out,),
    uapi.FUSE_COPY_FILE_RANGE: (uapi.write_out,),
    uapi.FUSE_COPY_FILE_RANGE_64: (uapi.copy_file_range_out,),
    uapi.FUSE_STATFS: (uapi.statfs_out,),
    uapi.FUSE_INIT: (uapi.init_out,),
    uapi.FUSE_GETLK: (uapi.lk_out,),
    uapi.FUSE_BMAP: (uapi.bmap_out,),
    uapi.FUSE_IOCTL: (uapi.ioctl_out,),
    uapi.FUSE_POLL: (uapi.poll_out,),
    uapi.FUSE_LSEEK: (uapi.lseek_out,),
    uapi.FUSE_STATX: (uapi.statx_out,),
}
"""Opcode → records at the start of a successful reply; what follows is data."""

NOTIFICATION_BODIES: Final[dict[int, Codec]] = {
    uapi.FUSE_NOTIFY_POLL: uapi.notify_poll_wakeup_out,
    uapi.FUSE_NOTIFY_INVAL_INODE: uapi.notify_inval_inode_out,
    uapi.FUSE_NOTIFY_INVAL_ENTRY: uapi.notify_inval_entry_out,
    uapi.FUSE_NOTIFY_STORE: uapi.notify_store_out,
    uapi.FUSE_NOTIFY_RETRIEVE: uapi.notify_retrieve_out,
    uapi.FUSE_NOTIFY_DELETE: uapi.notify_delete_out,
    uapi.FUSE_NOTIFY_PRUNE: uapi.notify_prune_out,
}
"""Notification code → record at its start; what follows is a name or data."""


def text_of(name: bytes) -> str:
    """A file name for readers: what is not UTF-8 as \\xNN. The true bytes are in `raw`."""
    return name.decode("utf-8", "backslashreplace")


def describe_request(raw: wire.Buffer, shapes: Any = wire.SHAPES) -> Record:
    """The record of a request without its time."""
    record: Record = {"direction": "request", "opcode": None, "unique": 0}
    try:
        request = wire.decode(memoryview(raw), len(raw), shapes)
    except wire.ProtocolError as error:
        record |= {"opcode": _name(_OPCODES, error.opcode), "unique": error.unique, "problem": str(error)}
        return record | {"raw": bytes(raw).hex()}
    record |= {"opcode": _name(_OPCODES, request.opcode), "unique": request.unique, "nodeid": request.nodeid}
    record |= {"uid": request.uid, "gid": request.gid, "pid": request.pid}
    shape = shapes.get(request.opcode)
    if shape is not None and shape.codec is not None:
        record["body"] = dict(zip(shape.codec.fields, request.body, strict=False))
    if request.names:
        record["names"] = [text_of(name) for name in request.names]
    if request.payload is not None:
        record["payload"] = len(request.payload)
    return record | {"raw": bytes(raw).hex()}


def describe_reply(raw: wire.Buffer, opcode: int | None = None, size_only: bool = False) -> Record:
    """The record of a reply or notification without its time.

    `opcode` is that of the request, if known; `size_only` says that it was an xattr call that asked for the size.
    """
    raw = bytes(raw)
    if len(raw) < _OUT.size:
        return {"direction": "reply", "opcode": None, "unique": 0, "problem": "no header", "raw": raw.hex()}
    length, error, unique = _OUT.unpack(raw)
    body = raw[_OUT.size :]
    if unique == 0:
        record: Record = {"direction": "notification", "opcode": _name(_NOTIFICATIONS, error), "unique": 0}
        codecs: tuple[Codec, ...] = (NOTIFICATION_BODIES[error],) if error in NOTIFICATION_BODIES else ()
    else:
        name = None if opcode is None else _name(_OPCODES, opcode)
        record = {"direction": "reply", "opcode": name, "unique": unique, "error": error}
        codecs = (uapi.getxattr_out,) if size_only else REPLY_BODIES.get(opcode or 0, ())
    if length != len(raw):
        record["problem"] = f"message of {len(raw)} bytes says {length}"
    elif error <= 0 or unique == 0:
        record |= _describe_body(body, codecs, opcode)
    return record | {"raw": raw.hex()}


def _describe_body(body: bytes, codecs: tuple[Codec, ...], opcode: int | None) -> Record:
    """The fields of the records, the directory entries, and how much data there is besides."""
    fields: Record = {}
    position = 0
    for codec in codecs:
        if position + codec.size <= len(body):
            fields |= codec.decode(body, position)
            position += codec.size
    described: Record = {"body": fields} if fields else {}
    if opcode in (uapi.FUSE_READDIR, uapi.FUSE_READDIRPLUS):
        described["entries"] = list(_entries(body, opcode == uapi.FUSE_READDIRPLUS))
    elif position < len(body):
        described["payload"] = len(body) - position
    return described


def _entries(body: bytes, plus: bool) -> Iterator[Record]:
    """The directory entries of a READDIR or READDIRPLUS reply, as far as they are whole."""
    codec = uapi.direntplus if plus else uapi.dirent
    prefix = "dirent." if plus else ""
    position = 0
    while position + codec.size <= len(body):
        fields = codec.decode(body, position)
        length = int(fields[f"{prefix}namelen"])
        name = body[position + codec.size : position + codec.size + length]
        entry: Record = {"name": text_of(name), "ino": fields[f"{prefix}ino"], "next": fields[f"{prefix}off"]}
        entry["type"] = fields[f"{prefix}type"]
        if plus:
            entry["nodeid"] = fields["entry_out.nodeid"]
        yield entry
        position += codec.size + length + -length % 8


def _name(names: dict[int, str], number: int) -> str | int:
    """FUSE_LOOKUP as LOOKUP, FUSE_NOTIFY_STORE as NOTIFY_STORE, an unknown number as itself."""
    return names[number].removeprefix("FUSE_") if number in names else number


def raw_of(record: Record) -> bytes:
    """The message that a record describes. Raises ValueError if it is not such a record."""
    try:
        return bytes.fromhex(record["raw"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a wire log record: {error!r}") from None


def read(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a wire log. Raises ValueError, with the line's number, for anything else."""
    with open(path, encoding="ascii") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}:{number}: {error}") from None
            if not isinstance(record, dict) or record.get("direction") not in ("request", "reply", "notification"):
                raise ValueError(f"{os.fspath(path)}:{number}: not a wire log record")
            yield record


class WireLog:
    """Appends messages to a file. A file that cannot be written ends the log, not the server: see `failure`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError if the file cannot be opened."""
        self.failure: OSError | None = None
        self._file: TextIO = open(path, "a", encoding="ascii", buffering=1)  # noqa: SIM115 - closed by close()
        self._pending: dict[int, tuple[int, bool, float]] = {}
        self._shapes = wire.SHAPES

    def negotiated(self, flags: int) -> None:
        """From now on requests have the shapes that these INIT flags imply."""
        self._shapes = wire.shapes_for(flags)

    def request(self, raw: wire.Buffer) -> None:
        """Record what was read from the device."""
        now = time.time()
        record = describe_request(raw, self._shapes)
        if len(raw) >= wire.HEADER_SIZE:
            self._remember(bytes(raw[: wire.HEADER_SIZE]), record, now)
        self._write({"time": now} | record)

    def reply(self, *pieces: wire.Buffer) -> None:
        """Record what was written to the device, a reply or a notification, in one buffer or several."""
        now = time.time()
        raw = b"".join(pieces)
        opcode, size_only, asked = None, False, None
        if len(raw) >= _OUT.size:
            opcode, size_only, asked = self._pending.pop(_OUT.unpack(raw)[2], (None, False, None))
        record = describe_reply(raw, opcode, size_only)
        if asked is not None:
            record["duration"] = round((now - asked) * 1e6)
        self._write({"time": now} | record)

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:
            self.failure = self.failure or error

    def _remember(self, header: bytes, record: Record, now: float) -> None:
        """Keep what the reply's description needs. The oldest go if the server never answers."""
        _, opcode, unique, *_ = uapi.in_header.unpack(header)
        if opcode in _UNANSWERED:
            return
        size_only = opcode in _SIZE_OR_DATA and record.get("body", {}).get("size") == 0
        self._pending[unique] = (opcode, size_only, now)
        if len(self._pending) > PENDING_MAX:
            del self._pending[next(iter(self._pending))]

    def _write(self, record: Record) -> None:
        if self.failure is not None:
            return
        try:
            self._file.write(json.dumps(record, default=bytes.hex) + "\n")
        except OSError as error:
            self.failure = error
