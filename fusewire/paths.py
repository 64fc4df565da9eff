"""Which of the kernel's ways fusewire takes here, and why not a better one: conclusions from ``kernel.Facts``.

A ``Path`` is one question with the way taken, the best way there is, and, where the two differ, the reason in words
that people use.  ``WAYS_NOT_USED_YET`` holds what kernels may offer and this version of fusewire makes no use of.
"""

from dataclasses import dataclass

from fusewire.kernel import Facts
from fusewire.mount import Route

IOMAP, IO_URING = "iomap", "io_uring"
WAYS_NOT_USED_YET = frozenset((IOMAP, IO_URING))

_PAGE_BYTES = 4096
_LONGEST_READ_PAGES = 256       # 1 MiB: more gains nothing, fuse-vanilla-notes.md 12
_SYNC_MINOR = 45                # since which fuseblk mounts are told of sync(2)


@dataclass(frozen=True, slots=True)
class Path:
    """The answer to one question."""

    topic: str      # a stable key
    taken: str
    best: str
    why_not: str    # "" where the taken way is the best one

    @property
    def is_best(self) -> bool:
        """Whether nothing better exists."""
        return not self.why_not


def can_mount(facts: Facts) -> str:
    """Why nothing at all can be mounted; "" if something can."""
    if facts.route is Route.FUSERMOUNT:
        if not facts.fusermount:
            return "only root can mount here: fusermount3 is not installed (package fuse3)"
        if not facts.fusermount_is_setuid:
            return f"{facts.fusermount} is not set-user-ID root, so it cannot mount for users (reinstall fuse3)"
    if facts.device_problem:
        return facts.device_problem
    return "" if facts.has_fuse else "this kernel has no FUSE (CONFIG_FUSE_FS)"


def choose(facts: Facts) -> list[Path]:
    """One path for each question, the most important first."""
    return [_mount(facts), _data(facts), _transport(facts), _start(facts), _sync(facts), _read_size(facts)]


def _path(topic: str, taken: str, best: str, why_not: str) -> Path:
    return Path(topic, taken if why_not else best, best, why_not)


def _no_fuseblk(facts: Facts) -> str:
    """Why a mount cannot be a fuseblk; "" if it can."""
    if facts.route is Route.USER_NAMESPACE:
        return "inside a user namespace the kernel mounts no block devices; the real root can"
    if facts.route is Route.FUSERMOUNT:
        return "only root can mount block devices"
    return "" if facts.has_fuseblk else "this kernel has no fuseblk (CONFIG_BLOCK)"


def _mount(facts: Facts) -> Path:
    best = "fuseblk, as root: unmounting waits until everything is written"
    why = can_mount(facts)
    if why:
        return Path("mount", "none", best, why)
    if not _no_fuseblk(facts) and facts.loop_problem:
        return Path("mount", "fuseblk for devices; plain fuse (-o noloop) for image files", best, facts.loop_problem)
    return _path("mount", f"plain fuse, {facts.route.value}", best, _no_fuseblk(facts))


def _data(facts: Facts) -> Path:
    best = "file data moved by the kernel itself (fuse iomap)"
    return _path("file_data", "file data copied through the daemon (READ requests)", best, _no_iomap(facts))


def _no_iomap(facts: Facts) -> str:
    """Why the kernel does not move file data itself; "" if it does."""
    if not facts.has_iomap:
        if facts.device_problem:
            return "whether this kernel has the fuse iomap extension cannot be asked: " + facts.device_problem
        return f"this kernel ({facts.release}) does not have the fuse iomap extension"
    if IOMAP in WAYS_NOT_USED_YET:
        return "the kernel has it, but this version of fusewire does not use it yet"
    if facts.may_iomap:
        return ""
    if facts.iomap_parameter is False:
        return "it is switched off: as root, echo Y > /sys/module/fuse/parameters/enable_iomap"
    return "this process may not use it: it needs CAP_SYS_RAWIO"


def _transport(facts: Facts) -> Path:
    best = "requests through a shared ring (FUSE over io_uring)"
    return _path("requests", "requests through /dev/fuse, one system call each way", best, _no_io_uring(facts))


def _no_io_uring(facts: Facts) -> str:
    """Why requests do not come through io_uring; "" if they do."""
    if facts.io_uring_parameter is None:
        return "this kernel does not have it (6.14 is the first)"
    if IO_URING in WAYS_NOT_USED_YET:
        state = "on" if facts.io_uring_parameter else "off"
        return f"the kernel has it (switched {state}), but this version of fusewire does not use it yet"
    return "" if facts.io_uring_parameter else "it is off: as root, echo Y > /sys/module/fuse/parameters/enable_uring"


def _start(facts: Facts) -> Path:
    best = "mount returns when the file system answers (SYNC_INIT)"
    why = ""
    if facts.route is Route.FUSERMOUNT:
        why = "fusermount3 hands over a mount that is already made"
    elif not facts.sync_init:
        why = "this kernel does not have it (6.18 is the first)"
    return _path("start", "mount returns at once; fusewire waits until a first request is answered", best, why)


def _sync(facts: Facts) -> Path:
    best = "sync(1) reaches the daemon"
    why = _no_fuseblk(facts)
    if why:
        why = f"only fuseblk mounts are told of it, and {why}"
    elif facts.protocol_minor is None or facts.protocol_minor < _SYNC_MINOR:
        why = "this kernel does not tell anybody (6.18 is the first)"
    return _path("sync", "sync(1) does not reach the daemon; fsync of a file always does", best, why)


def _read_size(facts: Facts) -> Path:
    best = f"up to {_LONGEST_READ_PAGES * _PAGE_BYTES >> 10} KiB in a request"
    pages, why = facts.max_pages_limit, ""
    if pages < _LONGEST_READ_PAGES:
        why = f"fs.fuse.max_pages_limit is {pages}: as root, sysctl fs.fuse.max_pages_limit={_LONGEST_READ_PAGES}"
    return _path("read_size", f"up to {pages * _PAGE_BYTES >> 10} KiB in a request", best, why)
