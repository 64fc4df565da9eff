"""How the kernel has the file system mounted at present: flags that ``mount -o remount`` changes.

The kernel does not tell the server of a remount.  Before a remount to read-only it has everything written back, and
sends SYNCFS to a ``fuseblk``; then it refuses changes by itself.  The mount table shows the flags at once, and poll(2)
reports each change of the table (POLLPRI; proc(5)).
"""

import os
import select
import threading
from collections.abc import Callable
from typing import NamedTuple

from fusewire import mountinfo, options

TABLE = "/proc/self/mountinfo"


class MountFlags(NamedTuple):
    """Flags of the mounted file system (not of one mount of it)."""

    read_only: bool = False
    sync: bool = False          # every change is durable before it is answered
    dirsync: bool = False       # every change of names is


AS_USUAL = MountFlags()


def asked_for(flags: int) -> MountFlags:
    """What MS_* flags ask for."""
    return MountFlags(bool(flags & options.MS_RDONLY), bool(flags & options.MS_SYNCHRONOUS),
                      bool(flags & options.MS_DIRSYNC))


def of_device(dev: int) -> MountFlags | None:
    """The flags of the file system with this ``st_dev``; None if the table does not show it."""
    found = next(iter(mountinfo.mounts_of_device(dev)), None)
    if found is None:
        return None
    words = found.super_options.split(",")
    return MountFlags("ro" in words, "sync" in words, "dirsync" in words)


def watch(dev: int, before: MountFlags, changed: Callable[[MountFlags], None]) -> threading.Thread:
    """A started thread that tells of each change of the flags, to the end of the process.  OSError: no mount table."""
    table = os.open(TABLE, os.O_RDONLY | os.O_CLOEXEC)      # from now on changes are reported
    thread = threading.Thread(target=_follow, args=(table, dev, before, changed), name="remount", daemon=True)
    thread.start()
    return thread


def _follow(table: int, dev: int, before: MountFlags, changed: Callable[[MountFlags], None]) -> None:
    poller = select.poll()
    poller.register(table, select.POLLPRI)
    while True:
        now = of_device(dev)
        if now is not None and now != before:
            before = now
            changed(now)
        poller.poll()
