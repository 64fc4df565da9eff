"""A peer that plays the kernel: it sends requests over a SOCK_SEQPACKET pair to the real server and reads its replies.

One message is one request or one reply, as on /dev/fuse.  The server runs in a thread with a loop of its own.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from fusewire import uapi
from fusewire.blockdev import BlockDevice
from fusewire.options import MountOptions
from fusewire.server import Server
from fusewire.session import Session
from fusewire.source import open_file_system, open_source
from fusewire.wirelog import WireLog

PATIENCE_SECONDS = 60  # a reply that has not come by then is missing; nothing waits so long otherwise
MESSAGE_BYTES = 1 << 20
NEVER_SECONDS = 1 << 30
OFFERED = 0x5FD73FFFFFB  # what Linux 6.18 offers
FILES = {b"a": b"alpha\n", b"empty": b"", b"big": bytes(range(256)) * 1024}


class Reply:
    """One reply, taken apart."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.length, self.error, self.unique = uapi.out_header.unpack(raw)
        self.body = raw[uapi.out_header.size :]
        assert self.length == len(raw), "the length in the header is not that of the message"
        assert self.error == 0 or (-512 < self.error < 0 and not self.body), "no kernel takes such an error"

    @property
    def errno(self) -> int:
        return -self.error


class Peer:
    """The kernel's end: ``call`` sends a request and waits for its reply, ``send`` and ``receive`` do half of it."""

    def __init__(self, connection: socket.socket, server: Server, session: Session, device: BlockDevice) -> None:
        self.connection, self.server, self.session, self.device = connection, server, session, device
        self._unique = 0
        self._early: dict[int, Reply] = {}

    def unique(self) -> int:
        self._unique += 2
        return self._unique

    def message(self, opcode: int, node: int, tail: bytes = b"", uid: int = 0, unique: int | None = None) -> bytes:
        if unique is None:
            unique = self.unique()
        head = uapi.in_header.encode(
            len=uapi.in_header.size + len(tail), opcode=opcode, unique=unique, nodeid=node, uid=uid, gid=0, pid=1
        )
        return head + tail

    def send(self, opcode: int, node: int = 1, tail: bytes = b"", uid: int = 0) -> int:
        unique = self.unique()
        self.connection.send(self.message(opcode, node, tail, uid, unique))
        return unique

    def receive(self, unique: int | None = None) -> Reply:
        """The reply to a request, or the next one; those to others are kept."""
        if unique is None and self._early:
            return self._early.pop(next(iter(self._early)))
        while unique is None or unique not in self._early:
            reply = self._next()
            if unique is None:
                return reply
            assert reply.unique not in self._early, "two replies to one request"
            self._early[reply.unique] = reply
        return self._early.pop(unique)

    def _next(self) -> Reply:
        ready, _, _ = select.select([self.connection], [], [], PATIENCE_SECONDS)
        assert ready, "no reply"
        raw = self.connection.recv(MESSAGE_BYTES)
        assert raw, "the server closed the connection"
        return Reply(raw)

    def nothing_came(self) -> bool:
        """Whether no reply is there that was not asked for."""
        return not self._early and not select.select([self.connection], [], [], 0)[0]

    def call(self, opcode: int, node: int = 1, tail: bytes = b"", uid: int = 0) -> Reply:
        return self.receive(self.send(opcode, node, tail, uid))

    def init(self, flags: int = OFFERED, minor: int = 45) -> Reply:
        tail = uapi.init_in.encode(
            major=7, minor=minor, max_readahead=1 << 17, flags=flags & 0xFFFFFFFF, flags2=flags >> 32
        )
        return self.call(uapi.FUSE_INIT, 0, tail)

    def lookup(self, name: bytes, parent: int = 1) -> int:
        """The node of a name, which must exist."""
        reply = self.call(uapi.FUSE_LOOKUP, parent, name + b"\0")
        assert reply.error == 0, os.strerror(reply.errno)
        return int(uapi.entry_out.decode(reply.body)["nodeid"])

    def read(self, node: int, offset: int, size: int) -> Reply:
        return self.call(uapi.FUSE_READ, node, uapi.read_in.encode(offset=offset, size=size))

    def create(self, name: bytes = b"file") -> int:
        """The node of a new file in the root directory."""
        made = self.call(uapi.FUSE_MKNOD, 1, uapi.mknod_in.encode(mode=0o100644) + name + b"\0")
        assert made.error == 0
        return int(uapi.entry_out.decode(made.body[:uapi.entry_out.size])["nodeid"])

    def write(self, node: int, offset: int, data: bytes) -> int:
        """WRITE: 0 or the errno."""
        reply = self.call(uapi.FUSE_WRITE, node, uapi.write_in.encode(offset=offset, size=len(data)) + data)
        return reply.errno if reply.error else 0

    def is_alive(self) -> bool:
        return self.call(uapi.FUSE_GETATTR, 1, uapi.getattr_in.encode()).error == 0


def make_image(folder: Path, *options: str, size: str = "16M") -> Path:
    """An image with the files of ``FILES``, a directory ``d`` of 300 names and a symbolic link ``link``."""
    tree, image = folder / "tree", folder / "image"
    (tree / "d").mkdir(parents=True)
    for name, content in FILES.items():
        (tree / os.fsdecode(name)).write_bytes(content)
    for number in range(300):
        (tree / "d" / f"name{number:03}").write_bytes(b"%d\n" % number)
    (tree / "link").symlink_to("a")
    command = ["mke2fs", "-q", "-F", "-t", "ext4", *options, "-d", str(tree), str(image), size]
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return image


@contextmanager
def served(image: Path, device_type: type[BlockDevice] = BlockDevice, wirelog: Path | None = None,
           access: str = "ro") -> Iterator[Peer]:
    """The real server on an image, and the peer that talks to it.  It must have ended well when the block ends.

    What is changed (``access`` "rw") becomes durable when the peer asks for it, or the server needs it, or at the end.
    """
    options = MountOptions(access=access)
    source = open_source(str(image), options)
    fs, journal, _ = open_file_system(source, options)
    device = device_type(source.device.fd)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    session = Session(fs, read_only=fs.writing is None)
    log = WireLog(wirelog) if wirelog else None
    server = Server(theirs.fileno(), session, device, log, journal, NEVER_SECONDS)
    ended: list[str] = []

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve())
        ended.append("well")

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        yield Peer(ours, server, session, device)
    finally:
        ours.close()
        thread.join(PATIENCE_SECONDS)
        theirs.close()
        source.close()
        if log is not None:
            log.close()
    assert ended == ["well"], "the server did not end by itself"
