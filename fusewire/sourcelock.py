"""The lock on a source, so that no second writer works on one file system.  Sources: open(2), flock(2), loop(4).

K1  a block device is claimed with O_EXCL; a ``fuseblk`` mount claims it itself, so ours is released just before it.
K2  an image file is locked with flock, exclusively to write, shared to read.
"""

import errno
import fcntl
import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from fusewire import ioctl, loopdev, mountinfo
from fusewire.loopdev import SourceError, reason


class SourceBusy(SourceError):
    """The source has another user; the text says which where that can be known."""


@dataclass(slots=True)
class SourceLock:
    """A claim on a source, held until ``release`` or the end of the process."""

    fd: int                     # -1 once released
    is_device: bool
    warnings: list[str] = field(default_factory=list)   # sentences about other, tolerable users

    def release(self) -> None:
        """Give up the claim.  May be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> "SourceLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_source(path: str, write: bool) -> SourceLock:
    """A claim on a block device or an image file.

    ``SourceBusy`` names the other user; ``SourceError`` says why the source cannot be opened or is of no use.
    """
    try:
        kind = os.stat(path).st_mode
    except OSError as error:
        raise SourceError(f"{path}: {reason(error)}") from error
    if stat.S_ISBLK(kind):
        return _lock_device(path, write)
    if stat.S_ISREG(kind):
        return _lock_image(path, write)
    raise SourceError(f"{path}: neither a block device nor a regular file")


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise SourceBusy(f"{path} is in use{_by(device_users(os.stat(path).st_rdev))}") from error
        hint = " (mount with -o ro)" if error.errno == errno.EROFS else ""
        raise SourceError(f"{path}: {reason(error)}{hint}") from error


def _lock_device(path: str, write: bool) -> SourceLock:
    fd = _open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_EXCL)
    if write and ioctl.is_read_only(fd):
        os.close(fd)
        raise SourceError(f"{path}: the device is read-only (mount with -o ro)")
    return SourceLock(fd, is_device=True)


def _lock_image(path: str, write: bool) -> SourceLock:
    fd = _open(path, os.O_RDWR if write else os.O_RDONLY)
    lock = SourceLock(fd, is_device=False)
    with ExitStack() as undo:
        undo.callback(lock.release)
        _flock(fd, path, write)
        lock.warnings += _other_loops(fd, path, write)
        undo.pop_all()
    return lock


def _flock(fd: int, path: str, write: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SourceBusy(f"{path} is in use{_by(flock_holders(os.fstat(fd)))}") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot lock: {reason(error)}") from error


def _other_loops(fd: int, path: str, write: bool) -> list[str]:
    """Warnings about loop devices on the image.  A writer tolerates none (flock does not reach them)."""
    warnings = []
    for device, status in loopdev.attached_to(os.fstat(fd)):
        use = f"{path} is in use by {device}{_mounted(device)}"
        if write:
            raise SourceBusy(f"{use} (losetup -d {device} frees it)")
        if not status.flags & ioctl.LO_FLAGS_READ_ONLY:
            warnings.append(f"{use}, which may change it while it is read here")
    return warnings


# --- Who it is --------------------------------------------------------------------------------------------------------


def _by(users: list[str]) -> str:
    return f": {', '.join(users)}" if users else ""


def _mounted(device: str) -> str:
    try:
        found = mountinfo.mounts_of_device(os.stat(device).st_rdev)
    except OSError:
        return ""
    return f" (mounted on {os.fsdecode(found[0].target)})" if found else ""


def device_users(rdev: int) -> list[str]:
    """Who claims a block device, in words: mounts, swap, devices made of it, the same for its partitions."""
    node = Path(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}")
    users = [f"mounted on {os.fsdecode(m.target)} ({m.fstype})" for m in mountinfo.mounts_of_device(rdev)]
    users += [f"part of {holder.name}" for holder in _entries(node / "holders")]
    users += ["used for swap"] if rdev in _swap_devices() else []
    for partition in _entries(node):
        if (partition / "partition").exists():
            users += [f"{partition.name} {use}" for use in device_users(_number(partition / "dev"))]
    return users


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _number(dev_file: Path) -> int:
    try:
        major, minor = map(int, dev_file.read_text("ascii").split(":"))
    except (OSError, ValueError):
        return 0
    return os.makedev(major, minor)


def _swap_devices() -> set[int]:
    found = set()
    for line in _lines("/proc/swaps")[1:]:
        try:
            found.add(os.stat(mountinfo.unescape(line.split()[0])).st_rdev)
        except (OSError, IndexError):
            continue
    return found


def _lines(path: str) -> list[bytes]:
    try:
        return Path(path).read_bytes().splitlines()
    except OSError:
        return []


def flock_holders(image: os.stat_result) -> list[str]:
    """The processes that hold a flock on a file, in words, from ``/proc/locks``."""
    place = f"{os.major(image.st_dev):02x}:{os.minor(image.st_dev):02x}:{image.st_ino}".encode()
    holders = []
    for line in _lines("/proc/locks"):
        fields = line.split()
        if len(fields) >= 6 and fields[1] == b"FLOCK" and fields[5] == place and fields[4].isdigit():
            holders.append(_process(int(fields[4])))
    return holders


def _process(pid: int) -> str:
    name = _lines(f"/proc/{pid}/comm")
    return f"{os.fsdecode(name[0])} (process {pid})" if name else f"process {pid}"
