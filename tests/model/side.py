"""One mounted file system that operations are done to: the same ones on kernel ext4 and on fusewire.

An operation is a tuple: a method's name and its arguments.  Its answer is what a program would see, in words that are
the same wherever the mount stands: a value, or the name of an errno.  Operations need nothing but their arguments; one
on an empty slot (of open files) answers ``empty``, so any part of a sequence is a sequence.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import random
import struct
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.walk import FS_IOC_GETFLAGS, runs_text

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400
FS_IOC_SETFLAGS = 0x40086602
EVERY_GROUP = (100,)
PAGE = 4096
SEEN_BYTES = 1 << 26

Operation = tuple[Any, ...]
Answer = Any


@lru_cache(maxsize=64)
def data_of(seed: int, length: int) -> bytes:
    """The bytes that a write with this seed writes."""
    return random.Random(seed).randbytes(length)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _check(LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def renameat2(old: bytes, new: bytes, flags: int) -> None:
    _check(LIBC.renameat2(AT_FDCWD, old, AT_FDCWD, new, flags))


def link_opened(fd: int, path: bytes) -> None:
    """linkat(2) of an open file, by its name in /proc."""
    _check(LIBC.linkat(AT_FDCWD, b"/proc/self/fd/%d" % fd, AT_FDCWD, path, AT_SYMLINK_FOLLOW))


def read_runs(fd: int, size: int) -> str:
    """SEEK_DATA and SEEK_HOLE from end to end."""
    runs, position = [], 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        runs.append((start, position))
    return runs_text(runs)


class Side:
    """The mount at ``root``, with a few slots for open files."""

    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(root)
        self.slots: dict[int, int] = {}

    def do(self, operation: Operation) -> Answer:
        """The answer to one operation."""
        try:
            return getattr(self, operation[0])(*operation[1:])
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error.errno))
        except KeyError:
            return "empty"

    def close_all(self) -> None:
        """Close whatever is open."""
        for fd in self.slots.values():
            with suppress(OSError):
                os.close(fd)
        self.slots.clear()

    def at(self, path: bytes) -> bytes:
        return self.root + b"/" + path

    # --- names --------------------------------------------------------------------------------------------------------

    def create(self, path: bytes, mode: int) -> None:
        os.close(os.open(self.at(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, mode))

    def create_many(self, folder: bytes, prefix: bytes, count: int) -> None:
        for index in range(count):
            self.create(folder + b"/" + prefix + b"%d" % index, 0o644)

    def unlink_many(self, folder: bytes, prefix: bytes, count: int, step: int) -> int:
        done = 0
        for index in range(0, count, step):
            with suppress(FileNotFoundError):
                os.unlink(self.at(folder + b"/" + prefix + b"%d" % index))
                done += 1
        return done

    def mkdir(self, path: bytes, mode: int) -> None:
        os.mkdir(self.at(path), mode)

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self.at(path))

    def mknod(self, path: bytes, mode: int, major: int, minor: int) -> None:
        os.mknod(self.at(path), mode, os.makedev(major, minor))

    def symlink(self, path: bytes, target: bytes) -> None:
        os.symlink(target, self.at(path))

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(self.at(path))

    def link(self, source: bytes, path: bytes) -> None:
        os.link(self.at(source), self.at(path), follow_symlinks=False)

    def unlink(self, path: bytes) -> None:
        os.unlink(self.at(path))

    def rename(self, old: bytes, new: bytes, flags: int) -> None:
        renameat2(self.at(old), self.at(new), flags)

    def listdir(self, path: bytes) -> list[bytes]:
        return sorted(os.listdir(self.at(path)))

    def stat(self, path: bytes) -> tuple[int, ...]:
        return self._shown(os.lstat(self.at(path)))

    def _shown(self, found: os.stat_result) -> tuple[int, ...]:
        size = found.st_size if found.st_mode & 0o170000 != 0o040000 else 0
        return found.st_mode, found.st_nlink, found.st_uid, found.st_gid, size, found.st_rdev

    # --- open files ---------------------------------------------------------------------------------------------------

    def open(self, slot: int, path: bytes, flags: int, mode: int) -> None:
        new = os.open(self.at(path), flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
        self._put(slot, new)

    def tmpfile(self, slot: int, path: bytes, mode: int) -> None:
        self._put(slot, os.open(self.at(path), os.O_TMPFILE | os.O_RDWR, mode))

    def _put(self, slot: int, fd: int) -> None:
        old = self.slots.pop(slot, None)
        self.slots[slot] = fd
        if old is not None:
            os.close(old)

    def close(self, slot: int) -> None:
        os.close(self.slots.pop(slot))

    def link_slot(self, slot: int, path: bytes) -> None:
        link_opened(self.slots[slot], self.at(path))

    def fstat(self, slot: int) -> tuple[int, ...]:
        return self._shown(os.fstat(self.slots[slot]))

    def write(self, slot: int, length: int, seed: int) -> int:
        return os.write(self.slots[slot], data_of(seed, length))

    def pwrite(self, slot: int, offset: int, length: int, seed: int) -> int:
        return os.pwrite(self.slots[slot], data_of(seed, length), offset)

    def pread(self, slot: int, offset: int, length: int) -> str:
        return hashlib.sha256(os.pread(self.slots[slot], length, offset)).hexdigest()[:16]

    def map_write(self, slot: int, offset: int, length: int, seed: int) -> int:
        """A store through a shared mapping, as far as the file reaches."""
        fd = self.slots[slot]
        length = min(length, max(os.fstat(fd).st_size - offset, 0))
        if not length:
            return 0
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(fd, offset - start + length, offset=start) as mapped:
            mapped[offset - start:] = data_of(seed, length)
        return length

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self.slots[slot], size)

    def fallocate(self, slot: int, mode: int, offset: int, length: int) -> None:
        fallocate(self.slots[slot], mode, offset, length)

    def copy_range(self, source: int, target: int, offset: int, to: int, length: int) -> int:
        """copy_file_range(2) until it is done or copies nothing."""
        done = 0
        while done < length:
            count = os.copy_file_range(self.slots[source], self.slots[target], length - done, offset + done, to + done)
            if not count:
                break
            done += count
        return done

    def fsync(self, slot: int) -> None:
        os.fsync(self.slots[slot])

    def fdatasync(self, slot: int) -> None:
        os.fdatasync(self.slots[slot])

    def forget_pages(self, slot: int) -> None:
        """Have later reads ask the file system, not the page cache."""
        os.fsync(self.slots[slot])
        os.posix_fadvise(self.slots[slot], 0, 0, os.POSIX_FADV_DONTNEED)

    def syncfs(self) -> None:
        """Write everything.  What could not be written before, and was told then, is told here once more by FUSE."""
        fd = os.open(self.root, os.O_RDONLY)
        try:
            if LIBC.syncfs(fd) < 0 and ctypes.get_errno() == errno.ENOSPC:
                _check(LIBC.syncfs(fd))
        finally:
            os.close(fd)

    # --- files by name ------------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, path: bytes, flags: int) -> Any:
        fd = os.open(self.at(path), flags | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            yield fd
        finally:
            os.close(fd)

    def write_file(self, path: bytes, offset: int, length: int, seed: int) -> int:
        """Written and on the disk: what a full disk refuses, it has refused when this returns."""
        with self.opened(path, os.O_WRONLY) as fd:
            done = os.pwrite(fd, data_of(seed, length), offset)
            os.fsync(fd)
            return done

    def fill_file(self, path: bytes, offset: int, length: int, seed: int) -> str | None:
        """Write all of it or empty the file: how much of a write that does not fit is kept is not compared."""
        with self.opened(path, os.O_WRONLY) as fd:
            try:
                done = os.pwrite(fd, data_of(seed, length), offset)
                os.fsync(fd)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                done = 0
            if done < length:
                os.ftruncate(fd, 0)
                os.fsync(fd)
                return "full"
            return None

    def fill_room(self, path: bytes, mode: int, offset: int, length: int) -> str | None:
        """As ``fill_file``, with fallocate(2)."""
        with self.opened(path, os.O_WRONLY) as fd:
            try:
                fallocate(fd, mode, offset, length)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                os.ftruncate(fd, 0)
                return "full"
            return None

    def write_direct(self, path: bytes, page: int, pages: int, seed: int) -> int:
        with self.opened(path, os.O_WRONLY | os.O_DIRECT) as fd, mmap.mmap(-1, pages * PAGE) as buffer:
            buffer[:] = data_of(seed, pages * PAGE)
            return os.pwritev(fd, [buffer], page * PAGE)

    def read_file(self, path: bytes) -> tuple[int, str]:
        digest = hashlib.sha256()
        with self.opened(path, os.O_RDONLY) as fd:
            size = os.fstat(fd).st_size
            for offset in range(0, min(size, SEEN_BYTES), 1 << 20):
                digest.update(os.pread(fd, 1 << 20, offset))
        return size, digest.hexdigest()[:16]

    def runs(self, path: bytes) -> str:
        """Where data and holes are, once everything is on the disk."""
        with self.opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)
            return read_runs(fd, os.fstat(fd).st_size)

    def truncate(self, path: bytes, size: int) -> None:
        os.truncate(self.at(path), size)

    # --- attributes ---------------------------------------------------------------------------------------------------

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self.at(path), mode)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        os.chown(self.at(path), uid, gid, follow_symlinks=False)

    def utimens(self, path: bytes, atime: int, mtime: int) -> None:
        os.utime(self.at(path), ns=(atime, mtime), follow_symlinks=False)

    def touch(self, path: bytes) -> None:
        os.utime(self.at(path), None, follow_symlinks=False)

    def setxattr(self, path: bytes, name: bytes, length: int, seed: int, flags: int) -> None:
        os.setxattr(self.at(path), name, data_of(seed, length), flags, follow_symlinks=False)

    def setacl(self, path: bytes, name: bytes, value: bytes) -> None:
        os.setxattr(self.at(path), name, value, follow_symlinks=False)

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        return os.getxattr(self.at(path), name, follow_symlinks=False)

    def removexattr(self, path: bytes, name: bytes) -> None:
        os.removexattr(self.at(path), name, follow_symlinks=False)

    def listxattr(self, path: bytes) -> list[str]:
        return sorted(os.listxattr(self.at(path), follow_symlinks=False))

    def chattr(self, path: bytes, clear: int, add: int) -> int:
        """Change inode flags; the flags then."""
        with self.opened(path, os.O_RDONLY) as fd:
            old: int = struct.unpack("<I", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4])[0]
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("<Q", old & ~clear | add))
            new: int = struct.unpack("<I", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4])[0]
            return new

    # --- as somebody else ---------------------------------------------------------------------------------------------

    def umask(self, mask: int) -> None:
        os.umask(mask)

    def by(self, uid: int, operation: Operation) -> Answer:
        """An operation done by another user, whose group has the same number, and who is in one more."""
        with user(uid):
            return self.do(operation)


@contextmanager
def user(uid: int, groups: tuple[int, ...] = EVERY_GROUP) -> Any:
    """Be this user, with a group of the same number and ``groups``, for a while."""
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)
