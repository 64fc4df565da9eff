"""A tiny server over raw /dev/fuse whose every answer is fixed: what `wire` packs, for the kernel itself to judge.

It keeps nothing but a tree that never changes; what would change something is answered as if it had. With a `WireLog`
it also records the transcripts that the other tests replay.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fusewire import uapi, wire
from fusewire.wirelog import WireLog

LIBC = ctypes.CDLL(None, use_errno=True)
MNT_FORCE, MNT_DETACH = 1, 2
CONTENT = bytes(range(256)) * 64
XATTR = b"value of an attribute"
TARGET = b"where the link points"

ROOT, FILE, FOLDER, LINK, GONE = 1, 2, 3, 4, 5
MODES = {
    ROOT: stat.S_IFDIR | 0o755,
    FILE: stat.S_IFREG | 0o640,
    FOLDER: stat.S_IFDIR | 0o711,
    LINK: stat.S_IFLNK | 0o777,
    GONE: stat.S_IFREG | 0o600,
}
NAMES = {b"file": FILE, b"folder": FOLDER, b"link": LINK, b"gone": GONE}
DTYPES = {FILE: 8, FOLDER: 4, LINK: 10, GONE: 8}

STATFS = (1_000_001, 500_002, 400_003, 300_004, 200_005, 4096, 255, 1024)
STATX_BTIME = (-77, 123_456_789)

WANTS = wire.Wants(
    flags=uapi.FUSE_ASYNC_READ
    | uapi.FUSE_BIG_WRITES
    | uapi.FUSE_MAX_PAGES
    | uapi.FUSE_DO_READDIRPLUS
    | uapi.FUSE_CACHE_SYMLINKS
    | uapi.FUSE_POSIX_LOCKS
    | uapi.FUSE_FLOCK_LOCKS
    | uapi.FUSE_SETXATTR_EXT
    | uapi.FUSE_DONT_MASK
    | uapi.FUSE_CREATE_SUPP_GROUP
    | uapi.FUSE_EXPLICIT_INVAL_DATA
    | uapi.FUSE_HAS_IOCTL_DIR
    | uapi.FUSE_HAS_IO_URING_BUFPOOL,
    default_permissions=True,
    max_background=31,
    congestion_threshold=17,
    time_gran=1,
)


def attributes_of(node: int) -> dict[str, int]:
    """Every attribute of a node, no two alike."""
    link = len(TARGET) if node == LINK else 0
    return {
        "ino": 1000 + node, "size": len(CONTENT) if node in (FILE, GONE) else link, "blocks": 2000 + node,
        "atime": -3000 - node, "mtime": 4000 + node, "ctime": (1 << 33) + node, "atimensec": 6000 + node,
        "mtimensec": 7000 + node, "ctimensec": 8000 + node, "mode": MODES[node], "nlink": 9 + node,
        "uid": 10_000 + node, "gid": 11_000 + node, "rdev": 0, "blksize": 4096, "flags": 0,
    }  # fmt: skip


def attr(node: int) -> bytes:
    return wire.pack_attr(*attributes_of(node).values())


def statx(node: int) -> bytes:
    """The same as statx, with a time of birth."""
    a = attributes_of(node)
    times = {f"{t}.tv_sec": a[t] for t in ("atime", "mtime", "ctime")}
    times |= {f"{t}.tv_nsec": a[f"{t}nsec"] for t in ("atime", "mtime", "ctime")}
    same = {name: a[name] for name in ("blksize", "nlink", "uid", "gid", "mode", "ino", "size", "blocks")}
    birth = {"btime.tv_sec": STATX_BTIME[0], "btime.tv_nsec": STATX_BTIME[1]}
    packed: bytes = uapi.statx.encode(mask=0xFFF, **same, **times, **birth)
    return packed


def entry(node: int) -> bytes:
    return wire.pack_entry(node, 70 + node, 3600, 0, 3600, 0, attr(node))


class FixedServer:
    """One mount and the thread that answers it."""

    def __init__(self, target: Path, log: WireLog | None = None, wants: wire.Wants = WANTS) -> None:
        self.target, self.log, self.wants = target, log, wants
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.negotiated: wire.Negotiated | None = None
        self.initialized = threading.Event()
        self.seen: list[wire.Request] = []
        self.arrived = threading.Condition()
        self.buffer = bytearray(1 << 21)
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, name="fixedserver", daemon=True)

    def mount(self) -> None:
        options = f"fd={self.fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        if LIBC.mount(b"fusewire-test", bytes(self.target), b"fuse", 6, options.encode()):  # NOSUID | NODEV
            raise OSError(ctypes.get_errno(), "mount")
        self.thread.start()

    def _serve(self) -> None:
        try:
            while (length := self._read()) is not None:
                self._answer(memoryview(self.buffer), length)
        except BaseException as error:  # reported by the fixture; closing the device frees whoever waits
            self.failure = error
        finally:
            os.close(self.fd)
            with self.arrived:
                self.arrived.notify_all()

    def _read(self) -> int | None:
        try:
            return os.readv(self.fd, [self.buffer])
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                return None
            if error.errno in (errno.EINTR, errno.ENOENT):
                return 0
            raise

    def _answer(self, view: memoryview, length: int) -> None:
        if not length:
            return
        if self.log:
            self.log.request(view[:length])
        request = wire.decode(view, length)
        reply = self._reply(request)
        with self.arrived:
            self.seen.append(request.detach())
            self.arrived.notify_all()
        if reply is not None:
            with suppress(FileNotFoundError):  # unmounting drops what is still under way, such as RELEASE
                self.send(*((reply,) if isinstance(reply, bytes) else reply))

    def send(self, *pieces: wire.Buffer) -> None:
        """One reply or notification. Raises OSError with the kernel's verdict on it."""
        if self.log:
            self.log.reply(*pieces)
        sent = os.writev(self.fd, pieces)
        assert sent == sum(map(len, pieces))
        if self.negotiated:
            self.initialized.set()

    def wait_for(self, opcode: int) -> wire.Request:
        """The first request with this opcode; it may be still to come."""
        with self.arrived:
            self.arrived.wait_for(lambda: self.failure or any(r.opcode == opcode for r in self.seen), timeout=60)
            return next(r for r in self.seen if r.opcode == opcode)

    def count(self, opcode: int) -> int:
        with self.arrived:
            return sum(request.opcode == opcode for request in self.seen)

    def _reply(self, request: wire.Request) -> bytes | wire.Pieces | None:
        answer = ANSWERS.get(request.opcode)
        if request.opcode == uapi.FUSE_INIT:
            self.negotiated, reply = wire.negotiate(request, self.wants)
            return reply
        if answer is None:
            return wire.reply_error(request.unique, errno.ENOSYS)
        return answer(request)


Answer = Callable[[wire.Request], "bytes | wire.Pieces | None"]


def _lookup(r: wire.Request) -> bytes:
    if r.names[0].startswith(b"errno-"):
        return wire.reply_error(r.unique, int(r.names[0][6:]))
    node = NAMES.get(r.names[0])
    if node is None:
        return wire.reply_negative(r.unique, 0)
    return _entry_reply(r, node)


def _entry_reply(r: wire.Request, node: int) -> bytes:
    return wire.reply_entry(r.unique, node, 70 + node, 3600, 0, 3600, 0, attr(node))


def _made(r: wire.Request) -> bytes:
    """A made object is the one that its kind of request would make."""
    node = {uapi.FUSE_MKDIR: FOLDER, uapi.FUSE_SYMLINK: LINK}.get(r.opcode, GONE)
    return wire.reply_entry(r.unique, node, 70 + node, 0, 0, 0, 0, attr(node))


def _read(r: wire.Request) -> wire.Pieces:
    _, offset, size = r.body[:3]
    return wire.reply_data(r.unique, CONTENT[offset : offset + size])


def _listing(r: wire.Request) -> wire.Pieces:
    offset, size, plus = r.body[1], r.body[2], r.opcode == uapi.FUSE_READDIRPLUS
    rows = [(b".", ROOT, 4), (b"..", ROOT, 4), *((n, i, DTYPES[i]) for n, i in NAMES.items())]
    listing = b""
    for position, (name, node, kind) in enumerate(rows[offset:], offset + 1):
        head = wire.NO_ENTRY if name in (b".", b"..") else entry(node)
        ino = 1000 + node
        one = wire.direntplus(head, ino, position, name, kind) if plus else wire.dirent(ino, position, name, kind)
        assert len(one) == (wire.direntplus_size if plus else wire.dirent_size)(len(name))
        if len(listing) + len(one) > size:
            break
        listing += one
    return wire.reply_data(r.unique, listing)


def _xattr(r: wire.Request) -> bytes | wire.Pieces:
    value = b"user.one\0user.two\0" if r.opcode == uapi.FUSE_LISTXATTR else XATTR
    if r.names and r.names[0] != b"user.one":
        return wire.reply_error(r.unique, errno.ENODATA)
    return wire.reply_xattr_size(r.unique, len(value)) if r.body[0] == 0 else wire.reply_data(r.unique, value)


def _nothing(r: wire.Request) -> bytes:
    return wire.reply_empty(r.unique)


ANSWERS: dict[int, Answer] = {
    uapi.FUSE_LOOKUP: _lookup,
    uapi.FUSE_FORGET: lambda r: None,
    uapi.FUSE_BATCH_FORGET: lambda r: None,
    uapi.FUSE_NOTIFY_REPLY: lambda r: None,
    uapi.FUSE_GETATTR: lambda r: wire.reply_attr(r.unique, 3600, 0, attr(r.nodeid)),
    uapi.FUSE_SETATTR: lambda r: wire.reply_attr(r.unique, 3600, 0, attr(r.nodeid)),
    uapi.FUSE_STATX: lambda r: wire.reply_statx(r.unique, 3600, 0, statx(r.nodeid)),
    uapi.FUSE_READLINK: lambda r: wire.reply_data(r.unique, TARGET),
    uapi.FUSE_SYMLINK: _made,
    uapi.FUSE_MKNOD: _made,
    uapi.FUSE_MKDIR: _made,
    uapi.FUSE_LINK: lambda r: _entry_reply(r, r.body[0]),
    uapi.FUSE_UNLINK: _nothing,
    uapi.FUSE_RMDIR: _nothing,
    uapi.FUSE_RENAME: _nothing,
    uapi.FUSE_RENAME2: _nothing,
    uapi.FUSE_OPEN: lambda r: wire.reply_open(r.unique, 0x11223344, uapi.FOPEN_KEEP_CACHE),
    uapi.FUSE_OPENDIR: lambda r: wire.reply_open(r.unique, 0x55667788, 0),
    uapi.FUSE_CREATE: lambda r: wire.reply_create(r.unique, entry(GONE), 0x99AA, 0),
    uapi.FUSE_TMPFILE: lambda r: wire.reply_create(r.unique, entry(GONE), 0xBBCC, 0),
    uapi.FUSE_READ: _read,
    uapi.FUSE_WRITE: lambda r: wire.reply_write(r.unique, r.body[2]),
    uapi.FUSE_STATFS: lambda r: wire.reply_statfs(r.unique, *STATFS),
    uapi.FUSE_RELEASE: _nothing,
    uapi.FUSE_RELEASEDIR: _nothing,
    uapi.FUSE_FSYNC: _nothing,
    uapi.FUSE_FSYNCDIR: _nothing,
    uapi.FUSE_FLUSH: _nothing,
    uapi.FUSE_SETXATTR: _nothing,
    uapi.FUSE_REMOVEXATTR: _nothing,
    uapi.FUSE_GETXATTR: _xattr,
    uapi.FUSE_LISTXATTR: _xattr,
    uapi.FUSE_READDIR: _listing,
    uapi.FUSE_READDIRPLUS: _listing,
    uapi.FUSE_GETLK: lambda r: wire.reply_lock(r.unique, 10, 19, 1, os.getpid()),
    uapi.FUSE_SETLK: _nothing,
    uapi.FUSE_SETLKW: _nothing,
    uapi.FUSE_IOCTL: lambda r: wire.reply_ioctl(r.unique, 5, (0x12345678).to_bytes(8, "little")[: r.body[5]]),
    uapi.FUSE_POLL: lambda r: wire.reply_poll(r.unique, 1),
    uapi.FUSE_FALLOCATE: _nothing,
    uapi.FUSE_LSEEK: lambda r: wire.reply_lseek(r.unique, r.body[1] + 3),
    uapi.FUSE_COPY_FILE_RANGE: lambda r: wire.reply_write(r.unique, 100),
    uapi.FUSE_COPY_FILE_RANGE_64: lambda r: wire.reply_copied(r.unique, 100),
    uapi.FUSE_DESTROY: _nothing,
}


@contextmanager
def fixed_mount(target: Path, log: WireLog | None = None, wants: wire.Wants = WANTS) -> Iterator[FixedServer]:
    """A served mount at `target`, gone at the end. Fails if the server met something that it did not understand."""
    server = FixedServer(target, log, wants)
    server.mount()
    try:
        yield server
    finally:
        if LIBC.umount2(bytes(target), 0):
            # A failed test still has files open. The last close would wait for this very process: abort instead.
            LIBC.umount2(bytes(target), MNT_FORCE | MNT_DETACH)
        server.thread.join(60)
    assert server.failure is None, repr(server.failure)
