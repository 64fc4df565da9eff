"""The connection itself: INIT, DESTROY, SYNCFS, and what the kernel is asked not to send."""

import errno
from typing import NoReturn

from fusewire import fileio, uapi, wire
from fusewire.ext4.errors import Refused
from fusewire.ext4.inode import BASE_BYTES
from fusewire.session import Durable, Final, Session
from fusewire.wire import Request

PAGE_BYTES = 4096
MAX_BACKGROUND = 64
SECOND_NANOSECONDS = 10**9      # what inodes of 128 bytes count time in

# READDIRPLUS without READDIRPLUS_AUTO: with AUTO, a program that lists a large directory first and asks for attributes
# afterwards pays a LOOKUP for every name behind the first reply (20 µs each; an entry of READDIRPLUS costs 3 to 10).
_ALWAYS = (
    uapi.FUSE_ASYNC_READ | uapi.FUSE_PARALLEL_DIROPS | uapi.FUSE_BIG_WRITES | uapi.FUSE_DO_READDIRPLUS
    | uapi.FUSE_CACHE_SYMLINKS | uapi.FUSE_MAX_PAGES | uapi.FUSE_EXPLICIT_INVAL_DATA | uapi.FUSE_ASYNC_DIO
    | uapi.FUSE_HAS_IOCTL_DIR | uapi.FUSE_HANDLE_KILLPRIV_V2 | uapi.FUSE_EXPORT_SUPPORT | uapi.FUSE_SETXATTR_EXT
)
# Not ALLOW_IDMAP: requests would no longer say who asks, and LISTXATTR shows trusted.* to root only.


def wants(session: Session) -> wire.Wants:
    """What we would like of the connection."""
    flags = _ALWAYS | (uapi.FUSE_POSIX_ACL if session.fs.options.acl else 0)
    if not session.read_only:
        flags |= uapi.FUSE_WRITEBACK_CACHE | uapi.FUSE_DONT_MASK
    return wire.Wants(
        flags=flags,
        default_permissions=True,
        no_open=not session.asks_open,
        max_write=fileio.READ_MOST_BYTES,
        max_pages=fileio.READ_MOST_BYTES // PAGE_BYTES,
        max_readahead=fileio.READ_MOST_BYTES,
        max_background=MAX_BACKGROUND,
        congestion_threshold=MAX_BACKGROUND * 3 // 4,
        time_gran=1 if session.fs.geometry.inode_bytes > BASE_BYTES else SECOND_NANOSECONDS,
    )


def init(session: Session, request: Request) -> bytes:
    """INIT.  A kernel that cannot be served raises ``wire.Refused``, which holds the reply."""
    session.negotiated, reply = wire.negotiate(request, wants(session))
    return reply


def destroy(session: Session, request: Request) -> bytes | Final:
    """DESTROY: the last request of a fuseblk mount; unmount waits for the reply."""
    session.lookups.clear()
    reply = wire.reply_empty(request.unique)
    return reply if session.fs.writing is None else Final(reply)


def syncfs(session: Session, request: Request) -> bytes | Durable:
    """SYNCFS: everything that was done is durable, or the caller hears why not."""
    reply = wire.reply_empty(request.unique)
    return reply if session.fs.writing is None else Durable(reply, settled=True)


def never_again(_session: Session, _request: Request) -> NoReturn:
    """ENOSYS, upon which the kernel decides by itself from then on.

    ACCESS: the mount has default_permissions.  POLL: regular files are always ready.  INTERRUPT: an operation on a
    disk is not interruptible on the kernel's ext4 either, and an EINTR from stat(2) would surprise programs.
    """
    raise Refused(errno.ENOSYS)


def ignore(_session: Session, _request: Request) -> None:
    """A message without a reply that nothing here has asked for."""
