"""What the kernel keeps of a mount's pages in memory: how far it reads ahead, how much written data may wait.

A FUSE mount starts out limited to one part in a hundred of the memory that the machine lets be dirty, and writers wait
for the server as soon as there is more.  A disk may use all of that memory; so we take more, too.

Sources: Documentation/ABI/testing/sysfs-class-bdi; prctl(2), PR_SET_IO_FLUSHER.
"""

import ctypes
import os
from pathlib import Path

from fusewire import mountinfo

DIRTY_PERCENT = 20      # of what may be dirty: writing back begins early enough to go on beside the writer

_CLASS = Path("/sys/class/bdi")
_PR_SET_IO_FLUSHER = 57
_libc = ctypes.CDLL(None, use_errno=True)


def clean_pages() -> None:
    """Tell the kernel that this thread, and those it starts from now on, clean pages, if we may (CAP_SYS_RESOURCE).

    It does not make them wait then for pages that they have to clean.  (Otherwise it does so for 0.2 s at a time.)
    """
    _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def raise_readahead(target: str, kib: int) -> bool:
    """True when the kernel reads at least so far ahead in files of this mount; False where we may not say so."""
    return _raise_to(_of_mount(target) / "read_ahead_kb", kib)


def raise_dirty_limit(target: str, percent: int = DIRTY_PERCENT) -> bool:
    """True when so much of the memory for dirty pages is this mount's, and its writers wait no sooner than others.

    False where we may not say so, or (before Linux 6.2) cannot.
    """
    where = _of_mount(target)
    return _raise_to(where / "max_ratio", percent) and _write(where / "strict_limit", 0)


def _of_mount(target: str) -> Path:
    found = mountinfo.find(target)
    if found is None:
        return _CLASS / "none"
    # The device that carries a fuseblk has the plain name; the mount's own one has the suffix.
    suffix = "-fuseblk" if found.fstype.startswith("fuseblk") else ""
    return _CLASS / f"{os.major(found.dev)}:{os.minor(found.dev)}{suffix}"


def _raise_to(path: Path, number: int) -> bool:
    try:
        return int(path.read_text("ascii")) >= number or _write(path, number)
    except (OSError, ValueError):
        return False


def _write(path: Path, number: int) -> bool:
    try:
        path.write_text(str(number), "ascii")
    except OSError:
        return False
    return True
