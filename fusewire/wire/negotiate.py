"""INIT: what kernel and server agree on. Sources: <linux/fuse.h>; fs/fuse/inode.c, process_init_reply.

Kernels from 5.15 (7.34) to 7.3 (7.46) are spoken to; all of them take 64 bytes of reply.

N1  A flag that was not offered is never set: the kernel does not mask the reply.
N2  Bit 43 means buffer pools to 7.46 and iomap to 7.99. It is set for `iomap` only, and only in answer to minor 99.
N3  Bits above 31 are set together with INIT_EXT only, without which the kernel does not look at them.
N4  ATOMIC_O_TRUNC and an OPEN that is answered ENOSYS exclude each other: the truncation would reach nobody.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Final

from fusewire import uapi
from fusewire.wire.reply import header, reply_error
from fusewire.wire.request import ProtocolError, Request

LOWEST_MINOR: Final = 34
HIGHEST_MINOR: Final[int] = uapi.FUSE_KERNEL_MINOR_VERSION
IOMAP_MINOR: Final = 99
_IOMAP_BIT: Final[int] = uapi.iomap("G7").FUSE_IOMAP

_MAJOR: Final[int] = uapi.FUSE_KERNEL_VERSION
_EPROTO: Final = 71

_PAGES_WITHOUT_MAX_PAGES: Final = 32
_LEAST_MAX_WRITE: Final = 4096
_LEAST_BUFFER: Final[int] = uapi.FUSE_MIN_READ_BUFFER
_ROOM_FOR_HEADERS: Final = 4096
_U16: Final = 0xFFFF

_NEVER_ECHOED: Final[int] = (
    uapi.FUSE_NO_OPEN_SUPPORT  # say what the kernel can; there is nothing to switch on
    | uapi.FUSE_NO_OPENDIR_SUPPORT
    | uapi.FUSE_HAS_EXPIRE_ONLY
    | uapi.FUSE_HAS_RESEND
    | uapi.FUSE_INIT_RESERVED
    | uapi.FUSE_INIT_EXT  # N3
    | _IOMAP_BIT  # N2
)


class Refused(ProtocolError):
    """The kernel's INIT cannot be accepted. `reply` is what to write before giving up."""

    def __init__(self, message: str, request: Request, reply: bytes) -> None:
        super().__init__(message, request.unique, request.opcode)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Wants:
    """What the server would like of a connection.

    Attributes:
        flags: FUSE_* INIT flags, bits above 31 included. What the kernel does not offer is left out silently.
        default_permissions: whether the mount has that option.
        no_open: whether OPEN will be answered ENOSYS.
        iomap: whether iomap may be used; the caller has asked the device (FUSE_DEV_IOC_IOMAP_SUPPORT).
        max_write: most bytes of a WRITE.
        max_pages: most pages of a request.
        max_readahead: bytes; the device's read_ahead_kb limits it too.
        max_background: most background requests under way; congestion_threshold: from when on the kernel holds back.
        time_gran: granularity of time stamps [ns].
        request_timeout: after so many seconds without an answer the kernel aborts the connection; 0: never.
        max_stack_depth: for PASSTHROUGH, 1 or 2.
    """

    flags: int
    default_permissions: bool = False
    no_open: bool = False
    iomap: bool = False
    max_write: int = 1 << 20
    max_pages: int = 256
    max_readahead: int = 1 << 20
    max_background: int = 64
    congestion_threshold: int = 48
    time_gran: int = 1
    request_timeout: int = 0
    max_stack_depth: int = 0

    def __post_init__(self) -> None:
        """Refuse with ValueError what no kernel could grant."""
        if self.no_open and self.flags & uapi.FUSE_ATOMIC_O_TRUNC:  # N4
            raise ValueError("ATOMIC_O_TRUNC with an OPEN that is never sent loses truncations")
        limits = {
            "max_write": (_LEAST_MAX_WRITE, 1 << 30),
            "max_pages": (1, _U16),
            "max_readahead": (0, 1 << 30),
            "max_background": (1, _U16),
            "congestion_threshold": (1, self.max_background),
            "time_gran": (1, 10**9),
            "request_timeout": (0, _U16),
            "max_stack_depth": (0, 2),
        }
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}, not in {least}…{most}")


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What holds on a connection once the reply is written.

    Attributes:
        minor: of the protocol both sides speak.
        offered: every flag of the kernel; `flags` those granted.
        no_open, no_opendir: whether ENOSYS to OPEN and OPENDIR is understood as "never ask again".
        iomap: whether the connection is in iomap mode.
        max_write: most bytes that a WRITE will carry.
        buffer_size: bytes that the receive buffer needs.
    """

    minor: int
    offered: int
    flags: int
    no_open: bool
    no_opendir: bool
    iomap: bool
    max_write: int
    max_pages: int
    max_readahead: int
    buffer_size: int

    def has(self, flag: int) -> bool:
        """Whether a flag was granted."""
        return bool(self.flags & flag)

    def offers(self, flag: int) -> bool:
        """Whether the kernel offered a flag, granted or not: HAS_RESEND, HAS_EXPIRE_ONLY."""
        return bool(self.offered & flag)


def negotiate(request: Request, wants: Wants) -> tuple[Negotiated, bytes]:
    """The agreement and the reply that makes it so. Raises Refused for a protocol that is not spoken here."""
    major, minor, readahead, low, high = request.body
    _check_version(request, major, minor)
    offered = low | (high << 32 if low & uapi.FUSE_INIT_EXT else 0)
    iomap = wants.iomap and minor == IOMAP_MINOR and bool(offered & _IOMAP_BIT)
    flags = _grant(offered, wants)
    if iomap:
        flags |= _IOMAP_BIT
    if flags >> 32:
        flags |= uapi.FUSE_INIT_EXT  # N3; offered, or there would be no such bits
    agreed = _limits(wants, flags, minor if iomap else min(minor, HIGHEST_MINOR), offered, readahead)
    return agreed, _reply(request.unique, agreed, wants)


def _check_version(request: Request, major: int, minor: int) -> None:
    """Refuse kernels that are too old or of another protocol."""
    if major > _MAJOR:  # the convention is to name our major and wait for another INIT, which no kernel sends
        reply = header(request.unique, uapi.init_out.size) + uapi.init_out.encode(major=_MAJOR, minor=HIGHEST_MINOR)
        raise Refused(f"the kernel speaks FUSE {major}.{minor}, this is {_MAJOR}.{HIGHEST_MINOR}", request, reply)
    if major < _MAJOR or minor < LOWEST_MINOR:
        message = f"the kernel speaks FUSE {major}.{minor}, at least {_MAJOR}.{LOWEST_MINOR} (Linux 5.15) is needed"
        raise Refused(message, request, reply_error(request.unique, _EPROTO))


def _grant(offered: int, wants: Wants) -> int:
    """The flags that are wanted, offered and compatible with each other."""
    flags = wants.flags & offered & ~_NEVER_ECHOED
    if flags & uapi.FUSE_EXPLICIT_INVAL_DATA:
        flags &= ~uapi.FUSE_AUTO_INVAL_DATA  # the kernel would let AUTO win
    if flags & uapi.FUSE_HANDLE_KILLPRIV_V2:
        flags &= ~uapi.FUSE_HANDLE_KILLPRIV
    if flags & uapi.FUSE_NO_EXPORT_SUPPORT:
        flags &= ~uapi.FUSE_EXPORT_SUPPORT
    if flags & uapi.FUSE_WRITEBACK_CACHE or not wants.max_stack_depth:
        flags &= ~uapi.FUSE_PASSTHROUGH
    if not flags & uapi.FUSE_DO_READDIRPLUS:
        flags &= ~uapi.FUSE_READDIRPLUS_AUTO
    if not (wants.default_permissions or flags & uapi.FUSE_POSIX_ACL):  # POSIX_ACL implies the option
        flags &= ~uapi.FUSE_ALLOW_IDMAP  # else the kernel ends the connection
    if not wants.request_timeout:
        flags &= ~uapi.FUSE_REQUEST_TIMEOUT
    return flags


def _limits(wants: Wants, flags: int, minor: int, offered: int, readahead: int) -> Negotiated:
    """The numbers that follow from the flags."""
    max_pages = wants.max_pages if flags & uapi.FUSE_MAX_PAGES else _PAGES_WITHOUT_MAX_PAGES
    max_write = wants.max_write if flags & uapi.FUSE_BIG_WRITES else _LEAST_MAX_WRITE
    max_write = max(_LEAST_MAX_WRITE, min(max_write, max_pages * mmap.PAGESIZE))
    return Negotiated(
        minor=minor,
        offered=offered,
        flags=flags,
        no_open=wants.no_open and bool(offered & uapi.FUSE_NO_OPEN_SUPPORT),
        no_opendir=bool(offered & uapi.FUSE_NO_OPENDIR_SUPPORT),
        iomap=bool(flags & _IOMAP_BIT),
        max_write=max_write,
        max_pages=max_pages,
        max_readahead=min(wants.max_readahead, readahead),
        buffer_size=max(_LEAST_BUFFER, max_write + _ROOM_FOR_HEADERS),
    )


def _reply(unique: int, agreed: Negotiated, wants: Wants) -> bytes:
    """The INIT reply."""
    body: bytes = uapi.init_out.encode(
        major=_MAJOR,
        minor=agreed.minor,
        max_readahead=agreed.max_readahead,
        flags=agreed.flags & 0xFFFFFFFF,
        max_background=wants.max_background,
        congestion_threshold=wants.congestion_threshold,
        max_write=agreed.max_write,
        time_gran=wants.time_gran,
        max_pages=agreed.max_pages if agreed.has(uapi.FUSE_MAX_PAGES) else 0,
        flags2=agreed.flags >> 32,
        max_stack_depth=wants.max_stack_depth if agreed.has(uapi.FUSE_PASSTHROUGH) else 0,
        request_timeout=wants.request_timeout if agreed.has(uapi.FUSE_REQUEST_TIMEOUT) else 0,
    )
    return header(unique, len(body)) + body
