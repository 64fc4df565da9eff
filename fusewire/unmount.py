"""Unmounting: umount2(2) where we may, fusermount3 elsewhere, and then waiting until the daemon has finished its work.

umount2 of a ``fuseblk`` returns after the daemon has answered DESTROY.  A plain ``fuse`` mount's daemon only notices
afterwards that its connection has ended.  In both cases its process ends a little later, and a loop device goes with
its last user: ``unmount`` returns when the process is gone and the loop device free.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fusewire import fusermount, loopdev, mountapi, mountinfo, runtime
from fusewire.mountinfo import Mount
from fusewire.mountrequest import SUBTYPE, MountError

_PATIENCE_SECONDS = 3.0         # then we say for whom we wait
_LOOP_SECONDS = 5.0             # a loop device that others hold for longer is theirs
_FORCE_SECONDS = 5.0            # callers whose connection was cut need a moment to leave
_PAUSE_SECONDS = 0.01           # neither of the two can be polled for
_NAMED_USERS = 5                # processes named in "is busy"


def find_ours(name: str) -> Mount:
    """The fusewire mount at a directory, or of a source.  ``MountError`` if there is none, or another file system."""
    mount = mountinfo.find(name) or _by_source(name)
    if mount is None:
        raise MountError(f"{name}: not mounted")
    if mount.fstype.partition(".")[2] != SUBTYPE:
        raise MountError(f"{name}: mounted as {mount.fstype}, not by fusewire; use umount(8)")
    return mount


def _by_source(name: str) -> Mount | None:
    wanted = os.fsencode(os.path.realpath(name))
    sources = {record.dev for record in runtime.records() if os.path.realpath(record.source) == os.fsdecode(wanted)}
    for mount in reversed(mountinfo.mounts()):
        if mount.fstype.endswith(f".{SUBTYPE}") and (mount.source == wanted or mount.dev in sources):
            return mount
    return None


def unmount(
    name: str, *, lazy: bool = False, force: bool = False, say: Callable[[str], None] = lambda _text: None
) -> None:
    """Unmount and return when the daemon is done.

    Args:
        name: the directory, or the source as it was given to mount.
        lazy: detach now, finish when the last user has gone; does not wait.
        force: cut the connection first: for a daemon that does not answer.  Does not wait for long.
        say: gets a sentence for the user when waiting takes long.

    Raises: MountError: not mounted, busy, not permitted.
    """
    mount = find_ours(name)
    record = runtime.find_mount(mount)
    _detach(mount, lazy, force)
    if lazy or record is None:
        return
    others = mountinfo.mounts_of_device(mount.dev)
    if others:
        say(f"{name}: still mounted on {os.fsdecode(others[0].target)}")
        return
    if not runtime.wait_gone(record, _PATIENCE_SECONDS):
        if force:
            say(f"{name}: unmounted, but process {record.pid} has not ended")
            return
        say(f"{name}: waiting for process {record.pid} to finish{_elsewhere(mount.dev)}")
        runtime.wait_gone(record)
    if record.loop >= 0 and not _loop_freed(record.loop):
        say(f"{name}: /dev/loop{record.loop} is still used by something else")


def leave(target: str, patience_seconds: float) -> None:
    """Unmount our own mount, as its daemon: when its users have gone, or by force when they have not in time.

    What was written until then is handed to the daemon, which must go on serving meanwhile; not what users whose files
    are still open write later.  Raises MountError, OSError: there is nothing to unmount, or it cannot be done.
    """
    mount = find_ours(target)
    _write_back(target)
    try:
        _patiently(lambda: mountapi.umount(mount.target, mountapi.UMOUNT_NOFOLLOW), patience_seconds)
    except mountapi.MountFailed:
        handle = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _detach(mount, lazy=True, force=False)
            mountapi.syncfs(handle)
        finally:
            os.close(handle)


def _write_back(target: str) -> None:
    handle = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mountapi.syncfs(handle)
    finally:
        os.close(handle)


def _detach(mount: Mount, lazy: bool, force: bool) -> None:
    flags = mountapi.UMOUNT_NOFOLLOW
    flags |= (mountapi.MNT_DETACH if lazy else 0) | (mountapi.MNT_FORCE if force else 0)
    target = os.fsdecode(mount.target)
    try:
        _patiently(lambda: mountapi.umount(mount.target, flags), _FORCE_SECONDS if force else 0)
    except mountapi.MountFailed as error:
        if error.errno == errno.EPERM and not force:
            fusermount.unmount(target, lazy)
        else:
            raise MountError(_explain(error, target)) from error


def _patiently(call: Callable[[], None], seconds: float) -> None:
    """Make a call again while it fails with EBUSY, for so long."""
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except mountapi.MountFailed as error:
            if error.errno != errno.EBUSY or time.monotonic() >= end:
                raise
        time.sleep(_PAUSE_SECONDS)


def _explain(error: OSError, target: str) -> str:
    if error.errno == errno.EBUSY:
        users = ", ".join(busy_users(target))
        return f"{target}: is busy{f': used by {users}' if users else ''} (-l unmounts when they have gone)"
    if error.errno == errno.EPERM:
        return f"{target}: only root can force an unmount"
    return f"{target}: cannot unmount: {os.strerror(error.errno or 0).lower()}"


def _loop_freed(number: int) -> bool:
    """Whether the loop device is free, after some patience: a scanner may have it open for a moment."""
    end = time.monotonic() + _LOOP_SECONDS
    while not loopdev.is_free(number):
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True


# --- Who keeps it -----------------------------------------------------------------------------------------------------


def busy_users(target: str) -> list[str]:
    """Processes that use files below a directory, in words; told by the links in ``/proc``, asking no file system."""
    found = []
    for process in _processes():
        if any(path == target or path.startswith(target.rstrip("/") + "/") for path in _links(process)):
            found.append(f"{_name(process)} (process {process.name})")
            if len(found) == _NAMED_USERS:
                break
    return found


def _processes() -> Iterator[Path]:
    return (entry for entry in sorted(Path("/proc").iterdir()) if entry.name.isdecimal())


def _name(process: Path) -> str:
    try:
        return process.joinpath("comm").read_text("utf-8", "replace").strip()
    except OSError:
        return "?"


def _links(process: Path) -> Iterator[str]:
    try:
        links = [process / "cwd", process / "root", process / "exe", *process.joinpath("fd").iterdir()]
    except OSError:
        links = [process / "cwd", process / "root", process / "exe"]
    for link in links:
        try:
            yield os.readlink(link)
        except OSError:
            continue


def _elsewhere(dev: int) -> str:
    """Words about another mount namespace that still has the mount."""
    device = f" {os.major(dev)}:{os.minor(dev)} ".encode()
    for process in _processes():
        try:
            if device in process.joinpath("mountinfo").read_bytes():
                return f" (still mounted in the mount namespace of {_name(process)}, process {process.name})"
        except OSError:
            continue
    return ""
