"""Loop devices: an image file, or a part of one, shown as a block device.  Sources: loop(4), ``linux/loop.h``.

L1  a loop device of ours is AUTOCLEAR: the kernel frees it at its last close, even if we are killed.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fusewire import ioctl

_CONTROL = "/dev/loop-control"
_ATTEMPTS = 64      # so many rivals may win the race for a free loop device before we give up


class SourceError(Exception):
    """A source that cannot be used; the text names it and the reason."""


def reason(error: OSError) -> str:
    """The words of an ``OSError``, without its number and path."""
    return (error.strerror or str(error)).lower()


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """A file descriptor for the length of a ``with`` block."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@dataclass(slots=True)
class LoopDevice:
    """An attached loop device, kept by ``fd`` until a mount or another opener keeps it."""

    path: str
    fd: int                     # O_RDWR, or O_RDONLY for a read-only one; -1 once closed
    number: int
    read_only: bool
    direct_io: bool = False     # the image's page cache is bypassed

    def close(self) -> None:
        """Close our fd: the kernel frees the device if nobody else has it open (L1).  May be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def detach(self) -> None:
        """Free the device now, or as soon as its other users close it."""
        try:
            if self.fd >= 0:
                ioctl.loop_clear(self.fd)
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.EBUSY):
                raise
        finally:
            self.close()

    def __enter__(self) -> "LoopDevice":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Part:
    """What of an image a loop device shows, and how."""

    offset_bytes: int = 0
    sizelimit_bytes: int = 0    # 0: to the end of the file
    read_only: bool = False
    direct_io: bool = False     # bypass the image's page cache where its file system can
    sector_bytes: int = 0       # logical sector of the device; 0: 512


WHOLE = Part()


def attach(image_fd: int, name: str, part: Part = WHOLE) -> LoopDevice:
    """A free loop device, made to show a part of an open image file (O_RDWR unless the part is read-only).

    ``name`` is what losetup(8) shows and errors name.  ``SourceError`` when there is no device to be had.
    """
    try:
        with opened(_CONTROL, os.O_RDWR) as control:
            for _ in range(_ATTEMPTS):
                device = _claim(ioctl.loop_get_free(control), image_fd, os.fsencode(name), part)
                if device is not None:
                    return device
    except OSError as error:
        raise SourceError(f"{name}: cannot make a loop device: {_explain(error)}") from error
    raise SourceError(f"{name}: cannot make a loop device: others took every free one first")


def _claim(number: int, image_fd: int, name: bytes, part: Part) -> LoopDevice | None:
    """The loop device of that number showing the image; None if somebody else was faster."""
    path = f"/dev/loop{number}"
    fd = _open_node(path, os.O_RDONLY if part.read_only else os.O_RDWR)
    if fd is None:
        return None
    device = LoopDevice(path, fd, number, part.read_only)
    try:
        _configure(fd, image_fd, name, part)
    except OSError as error:
        device.close()
        if error.errno in (errno.EBUSY, errno.EAGAIN):
            return None
        raise
    device.direct_io = part.direct_io and _use_direct_io(fd)
    return device


def _open_node(path: str, mode: int) -> int | None:
    """The loop device's node opened; None if it was removed meanwhile (LOOP_CTL_REMOVE by a rival)."""
    try:
        return os.open(path, mode | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def _configure(fd: int, image_fd: int, name: bytes, part: Part) -> None:
    flags = ioctl.LO_FLAGS_AUTOCLEAR | (ioctl.LO_FLAGS_READ_ONLY if part.read_only else 0)
    ioctl.loop_configure(
        fd,
        image_fd,
        offset_bytes=part.offset_bytes,
        sizelimit_bytes=part.sizelimit_bytes,
        flags=flags,
        block_bytes=part.sector_bytes,
        name=name,
    )


def _use_direct_io(fd: int) -> bool:
    """Whether the image's page cache is bypassed now; not every file system and alignment allows it."""
    try:
        ioctl.loop_set_direct_io(fd, True)
    except OSError:
        return False
    status = ioctl.loop_status(fd)
    return status is not None and bool(status.flags & ioctl.LO_FLAGS_DIRECT_IO)


def _explain(error: OSError) -> str:
    """The error in words that say what to do."""
    where = f"{error.filename}: " if error.filename else ""
    hint = {
        errno.ENOENT: " (is the loop module loaded, and /dev complete? -o noloop does without)",
        errno.EACCES: " (only root may; -o noloop does without)",
        errno.EPERM: " (only root may; -o noloop does without)",
    }.get(error.errno or 0, "")
    return f"{where}{reason(error)}{hint}"


# --- Loop devices of others -------------------------------------------------------------------------------------------


def attached_to(image: os.stat_result) -> list[tuple[str, ioctl.LoopInfo]]:
    """(path, status) of each loop device that shows a part of this file; those that we may not open are left out."""
    wanted = (ioctl.kernel_dev(image.st_dev), image.st_ino)
    found = []
    for entry in sorted(Path("/sys/block").glob("loop*/loop")):
        path = f"/dev/{entry.parent.name}"
        status = status_of(path)
        if status is not None and (status.device, status.inode) == wanted:
            found.append((path, status))
    return found


def status_of(path: str) -> ioctl.LoopInfo | None:
    """What the loop device at ``path`` shows; None if nothing, if it is no loop device or if it cannot be opened."""
    try:
        with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
            return ioctl.loop_status(fd)
    except OSError:
        return None


def is_free(number: int) -> bool:
    """Whether no file is attached to the loop device (or it does not exist), told without opening it."""
    return not Path(f"/sys/block/loop{number}/loop").exists()
