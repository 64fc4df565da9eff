"""The mount system calls as typed functions: mount(2), umount2(2) and the newer fsopen family, through ctypes.

A call runs without the interpreter's lock, so it may block in a thread while the loop serves.  Sources: mount(2),
umount2(2), fsopen(2), fsconfig(2), fsmount(2), move_mount(2), ``linux/mount.h``.
"""

import ctypes
import errno
import os
import platform

from fusewire import options

_libc = ctypes.CDLL(None, use_errno=True)

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_FSOPEN, _FSCONFIG, _FSMOUNT, _MOVE_MOUNT = 430, 431, 432, 429     # the same on every machine but those below
_OTHER_NUMBERS = platform.machine().startswith(("mips", "alpha"))
_CLOEXEC = 1                    # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6
_EMPTY_SOURCE_PATH = 4          # MOVE_MOUNT_F_EMPTY_PATH
_AT_FDCWD = -100

# Flags of the mount (fsmount); the others belong to the file system (fsconfig).
_ATTRIBUTES = {
    options.MS_RDONLY: 0x01, options.MS_NOSUID: 0x02, options.MS_NODEV: 0x04, options.MS_NOEXEC: 0x08,
    options.MS_NOATIME: 0x10, options.MS_STRICTATIME: 0x20, options.MS_NODIRATIME: 0x80,
    options.MS_NOSYMFOLLOW: 0x200000,
}
_SUPER_FLAGS = {
    options.MS_RDONLY: b"ro", options.MS_SYNCHRONOUS: b"sync", options.MS_DIRSYNC: b"dirsync",
    options.MS_LAZYTIME: b"lazytime",
}


class MountFailed(OSError):
    """A mount call that failed, with the kernel's own explanation where it gave one (``kernel_says``)."""

    def __init__(self, number: int, kernel_says: str = "") -> None:
        super().__init__(number, os.strerror(number))
        self.kernel_says = kernel_says


def _check(result: int) -> int:
    if result < 0:
        raise MountFailed(ctypes.get_errno())
    return result


def mount(source: bytes, target: bytes, fstype: bytes, flags: int, data: bytes) -> None:
    """mount(2).  ``data``: the file system's options, separated by commas."""
    _check(_libc.mount(source, target, fstype, ctypes.c_ulong(flags), data))


def umount(target: bytes, flags: int = 0) -> None:
    """umount2(2); ``flags``: MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW."""
    _check(_libc.umount2(target, flags))


def syncfs(fd: int) -> None:
    """syncfs(2): have a file system write back what the kernel still holds; returns when that is done."""
    _check(_libc.syncfs(fd))


def unshare(flags: int) -> None:
    """Leave namespaces for new ones (unshare(2)); of the calling thread only, so for processes that have no other."""
    _check(_libc.unshare(flags))


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    if _OTHER_NUMBERS:
        raise MountFailed(errno.ENOSYS)
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *words))


class Context:
    """A file system being configured (fsopen(2)); close it by ``with``.  ENOSYS and EPERM come from the constructor."""

    def __init__(self, fstype: bytes) -> None:
        self.fd = _syscall(_FSOPEN, fstype, _CLOEXEC)

    def __enter__(self) -> "Context":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def _configure(self, command: int, key: bytes | None, value: bytes | None) -> None:
        try:
            _syscall(_FSCONFIG, self.fd, command, key, value, 0)
        except MountFailed as error:
            raise MountFailed(error.errno or 0, self.log()) from None

    def set(self, key: bytes, value: bytes | None = None) -> None:
        """Set an option, or a flag where there is no value."""
        self._configure(_SET_FLAG if value is None else _SET_STRING, key, value)

    def create(self, flags: int) -> None:
        """Make the file system; waits for INIT's answer after ``ioctl.sync_init``.  ``flags``: MS_*."""
        for flag, name in _SUPER_FLAGS.items():
            if flags & flag:
                self.set(name)
        self._configure(_CMD_CREATE, None, None)

    def mounted(self, flags: int = 0) -> int:
        """A directory fd of the made file system, mounted nowhere yet.  ``flags``: MS_*, relatime if none says else."""
        attributes = sum(bit for flag, bit in _ATTRIBUTES.items() if flags & flag)
        return _syscall(_FSMOUNT, self.fd, _CLOEXEC, attributes)

    def attach(self, target: bytes, flags: int) -> None:
        """Mount the made file system at a directory.  ``flags`` as for ``mounted``."""
        mount_fd = self.mounted(flags)
        try:
            _syscall(_MOVE_MOUNT, mount_fd, b"", _AT_FDCWD, target, _EMPTY_SOURCE_PATH)
        finally:
            os.close(mount_fd)

    def log(self) -> str:
        """What the kernel has said about this context, on one line; reading it empties the log."""
        said: list[str] = []
        while len(said) < 16:
            try:
                said.append(os.read(self.fd, 4096).decode("utf-8", "replace"))
            except OSError:     # ENODATA: no more
                break
        return "; ".join(line.removeprefix("e ").removeprefix("w ").strip() for line in said)
