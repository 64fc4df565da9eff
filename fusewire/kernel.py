"""What this kernel and machine offer for FUSE: the probes behind ``fusewire doctor``.

Each probe asks the thing itself where that is possible without a trace: the protocol version comes from the INIT
message of a file system that is created, never mounted anywhere, and dropped.  Only where that is not permitted it is
concluded from the kernel's release, and ``Facts.protocol_from`` says so.
Sources: fuse-vanilla-notes.md 1, 3, 8; fuse-iomap.md 1.
"""

import enum
import os
import platform
import re
import select
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fusewire import fusermount, ioctl, mount, mountapi
from fusewire.mountrequest import MountError

_PARAMETERS = Path("/sys/module/fuse/parameters")
_LOOP_CONTROL = "/dev/loop-control"
_CLONE_NEWUSER, _CLONE_NEWNS = 0x10000000, 0x00020000
_INIT_WAIT_MS = 2000

# INIT flags by bit (linux/fuse.h)
_INIT_EXT, _PASSTHROUGH, _OVER_IO_URING = 30, 37, 41

# first kernel release with a protocol minor
_MINORS = (
    ((7, 3), 46), ((6, 18), 45), ((6, 16), 44), ((6, 15), 43), ((6, 14), 42), ((6, 12), 41), ((6, 9), 40), ((6, 6), 39),
    ((6, 2), 38), ((6, 1), 37), ((5, 17), 36), ((5, 16), 35), ((5, 14), 34), ((5, 11), 33), ((5, 10), 32), ((5, 4), 31),
)


class From(enum.Enum):
    """How the protocol version was learned."""

    ASKED = "asked the kernel"
    ASKED_IN_NAMESPACE = "asked the kernel inside a user namespace"
    RELEASE = "concluded from the kernel's release; not asked"


@dataclass(frozen=True, slots=True)
class Hello:
    """What the kernel says in INIT."""

    minor: int
    max_readahead_bytes: int
    flags: int              # the bits of both flag words

    def offers(self, bit: int) -> bool:
        """Whether an INIT flag is offered."""
        return bool(self.flags >> bit & 1)


@dataclass(frozen=True, slots=True)
class Facts:
    """The answers of all probes; None where there is none to be had."""

    release: str
    machine: str
    device_problem: str                 # why /dev/fuse cannot be opened; "" if it can
    protocol_minor: int | None
    protocol_from: From
    init_flags: int | None              # offered in INIT; None unless asked
    has_fuse: bool
    has_fuseblk: bool
    sync_init: bool | None
    io_uring_parameter: bool | None     # fuse.enable_uring; None: the kernel does not know it
    io_uring_offered: bool | None
    passthrough: bool | None
    iomap_support: int | None           # ioctl.IOMAP_SUPPORT_*; None: the kernel has no iomap
    iomap_parameter: bool | None        # fuse.enable_iomap
    max_pages_limit: int                # pages of one request
    default_request_timeout_s: int
    max_request_timeout_s: int
    fusermount: str                     # its path, "" if it is not installed
    fusermount_is_setuid: bool
    user_allow_other: bool
    loop_problem: str                   # why no loop device can be made; "" if one can
    user_namespaces: bool               # this user may make one
    route: mount.Route
    fusectl: bool                       # FUSE's control file system is mounted

    @property
    def has_iomap(self) -> bool:
        """Whether the kernel has the iomap extension."""
        return self.iomap_support is not None

    @property
    def may_iomap(self) -> bool:
        """Whether this process may use it for file data."""
        return bool((self.iomap_support or 0) & ioctl.IOMAP_SUPPORT_FILEIO)


def probe() -> Facts:
    """The facts about this machine."""
    problem, sync, iomap = _probe_device()
    hello, learned = _ask(problem)
    flags = hello.flags if hello else None
    helper = _fusermount()
    types = _lines("/proc/filesystems")
    return Facts(
        release=platform.release(),
        machine=platform.machine(),
        device_problem=problem,
        protocol_minor=hello.minor if hello else minor_of_release(platform.release()),
        protocol_from=learned,
        init_flags=flags,
        has_fuse="fuse" in (line.split()[-1] for line in types if line.split()),
        has_fuseblk="fuseblk" in (line.split()[-1] for line in types if line.split()),
        sync_init=sync,
        io_uring_parameter=_switch("enable_uring"),
        io_uring_offered=None if hello is None else hello.offers(_OVER_IO_URING),
        passthrough=None if hello is None else hello.offers(_PASSTHROUGH),
        iomap_support=iomap,
        iomap_parameter=_switch("enable_iomap"),
        max_pages_limit=_number("/proc/sys/fs/fuse/max_pages_limit", 256),
        default_request_timeout_s=_number("/proc/sys/fs/fuse/default_request_timeout", 0),
        max_request_timeout_s=_number("/proc/sys/fs/fuse/max_request_timeout", 0),
        fusermount=helper,
        fusermount_is_setuid=bool(helper) and _is_setuid_root(helper),
        user_allow_other=fusermount.user_allow_other(),
        loop_problem=_loop_problem(),
        user_namespaces=_in_child(enter_namespace) is not None,
        route=mount.route(),
        fusectl=Path("/sys/fs/fuse/connections").is_mount(),
    )


# --- Small readers ----------------------------------------------------------------------------------------------------


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("utf-8", "replace").splitlines()
    except OSError:
        return []


def _number(path: str, missing: int) -> int:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else missing


def _switch(parameter: str) -> bool | None:
    """A boolean parameter of the fuse module; None if it has none of that name."""
    text = "".join(_lines(str(_PARAMETERS / parameter))).strip()
    return text in ("Y", "1") if text else None


def _fusermount() -> str:
    try:
        return fusermount.program()
    except MountError:
        return ""


def _is_setuid_root(path: str) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return bool(found.st_mode & stat.S_ISUID) and found.st_uid == 0


def _loop_problem() -> str:
    try:
        os.close(os.open(_LOOP_CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{_LOOP_CONTROL}: {os.strerror(error.errno or 0).lower()}"
    return ""


def minor_of_release(release: str) -> int | None:
    """The FUSE protocol minor that a kernel release of mainline has; None for one older than 5.4 or unreadable."""
    match = re.match(r"(\d{1,3})\.(\d{1,3})", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    return next((minor for first, minor in _MINORS if version >= first), None)


# --- Asking the device ------------------------------------------------------------------------------------------------


def _probe_device() -> tuple[str, bool | None, int | None]:
    """(why it cannot be opened or "", SYNC_INIT, iomap support) of a fresh ``/dev/fuse``."""
    try:
        fd = mount.open_device()
    except MountError as error:
        return str(error), None, None
    try:
        iomap = ioctl.iomap_support(fd)     # first: after SYNC_INIT an ioctl may wait for the mount
        return "", ioctl.sync_init(fd), iomap
    except OSError as error:
        return f"{mount.DEVICE}: {os.strerror(error.errno or 0).lower()}", None, None
    finally:
        os.close(fd)


def _ask(device_problem: str) -> tuple[Hello | None, From]:
    """What the kernel says in INIT, and how it was asked."""
    if not device_problem:
        if mount.may_administer():
            said = _in_child(_hello_bytes)
            if said:
                return parse_hello(said), From.ASKED
        said = _in_child(lambda: enter_namespace() and _hello_bytes())
        if said:
            return parse_hello(said), From.ASKED_IN_NAMESPACE
    return None, From.RELEASE


def parse_hello(message: bytes) -> Hello | None:
    """The content of an INIT request; None for anything else."""
    if len(message) < 56 or struct.unpack_from("=II", message) != (len(message), 26):
        return None
    _, minor, readahead, flags = struct.unpack_from("=IIII", message, 40)
    if flags >> _INIT_EXT & 1 and len(message) >= 60:
        flags |= struct.unpack_from("=I", message, 56)[0] << 32
    return Hello(minor, readahead, flags)


def _hello_bytes() -> bytes:
    """The INIT request of a file system that is made for this and mounted nowhere."""
    fd = mount.open_device()
    with mountapi.Context(b"fuse") as context:
        for name, value in (("source", "probe"), ("fd", fd), ("rootmode", "40000"), ("user_id", 0), ("group_id", 0)):
            context.set(name.encode(), str(value).encode())
        context.create(0)
        waiter = select.poll()
        waiter.register(fd, select.POLLIN)
        waiter.poll(_INIT_WAIT_MS)
        return os.read(fd, 8192)


def enter_namespace() -> bytes:
    """Something true once this process is root in a user and mount namespace of its own."""
    user, group = os.getuid(), os.getgid()
    mountapi.unshare(_CLONE_NEWUSER | _CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny", "ascii")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1", "ascii")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1", "ascii")
    return b"entered"


def _in_child(work: Callable[[], bytes]) -> bytes | None:
    """The result of a function run in a child process, which may change itself for good; None if it failed."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(theirs, work())
            status = 0
        except (OSError, MountError):
            pass        # the parent sees no bytes
        finally:
            os._exit(status)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said or None
