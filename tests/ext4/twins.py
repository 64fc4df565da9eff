"""The same operations on names twice: on a kernel ext4 mount, and on the ext4 core as a library.

An operation is a tuple of a method's name and its arguments.  Both sides answer with 0 or an errno, and both tell their
tree in the same words, so that tests compare lists.  Times are told as the number of the operation that stamped them.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusewire.ext4 import inode, inodefree, namespace, namestore, rename, setattr, xattr
from fusewire.ext4.errors import Refused
from fusewire.ext4.inode import FLAG_INDEX, Inode
from fusewire.ext4.newinode import Caller
from tests import mounting
from tests.ext4.driver import Core, image, new_path
from tests.ext4.writer import START, Writer

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400
GETFLAGS, SETFLAGS = 0x80086601, 0x40086602
FSGETXATTR, FSSETXATTR = 0x801C581F, 0x401C5820
FSXATTR = struct.Struct("<IIIII8x")
XFLAG_PROJINHERIT = 0x200
COARSE = 5
ROOT = Caller(0, 0)
FORMS = ["-t ext4 -O orphan_file", "-t ext4 -b 4096", "-t ext4 -O ^metadata_csum,uninit_bg -b 2048", "-t ext3 -I 128",
         "-t ext4 -O ^dir_index,^filetype,^has_journal"]
Operation = tuple[Any, ...]
Answer = int
_NUMBER = re.compile(r"0x[0-9a-f]+|0[0-7]*|[1-9][0-9]*")


def script(text: str) -> list[Operation]:
    """Operations written like commands, ended by ";" or the line: numbers (octal after a 0), "-" for none, ``n*255``
    for 255 times n, two quotes for an empty path; all else is a path or a target."""
    def word(token: str) -> object:
        if _NUMBER.fullmatch(token):
            return int(token, 16 if token.startswith("0x") else 8 if token.startswith("0") else 10)
        if token == "-":
            return None
        stem, _, times = token.partition("*")
        return (stem[:-1] + stem[-1] * int(times) if times else token.replace("''", "")).encode()

    commands = (part.split() for line in text.splitlines() for part in line.split(";"))
    return [(words[0], *map(word, words[1:])) for words in commands if words]


class KernelSide:
    """A mounted kernel ext4; ``starts`` says at which coarse time each operation began (unless ``hurried``)."""

    def __init__(self, root: Path) -> None:
        self.root, self.starts, self.hurried = os.fsencode(root), list[int](), False

    def do(self, operation: Operation) -> Answer:
        """The errno of one operation, which gets a tick of the clock of its own."""
        before = now = time.clock_gettime_ns(COARSE)
        while now == before and not self.hurried:
            now = time.clock_gettime_ns(COARSE)
        self.starts.append(now)
        try:
            getattr(self, operation[0])(*operation[1:])
        except OSError as error:
            return error.errno or 0
        return 0

    def when(self, seconds: int, nanoseconds: int) -> int:
        """The number of the operation that was under way then; -1: before all."""
        return bisect.bisect_right(self.starts, seconds * 1_000_000_000 + nanoseconds) - 1

    def at(self, path: bytes) -> bytes:
        return self.root + b"/" + path

    def create(self, path: bytes, mode: int = 0o644) -> None:
        os.close(os.open(self.at(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))

    def mknod(self, path: bytes, mode: int, major: int = 0, minor: int = 0) -> None:
        os.mknod(self.at(path), mode, os.makedev(major, minor))

    def mkdir(self, path: bytes, mode: int = 0o755) -> None:
        os.mkdir(self.at(path), mode)

    def symlink(self, path: bytes, target: bytes) -> None:
        os.symlink(target, self.at(path))

    def link(self, source: bytes, path: bytes) -> None:
        os.link(self.at(source), self.at(path), follow_symlinks=False)

    def unlink(self, path: bytes) -> None:
        os.unlink(self.at(path))

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self.at(path))

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        if LIBC.renameat2(AT_FDCWD, self.at(old), AT_FDCWD, self.at(new), flags):
            raise OSError(ctypes.get_errno(), "renameat2")

    def tmpfile(self, directory: bytes, path: bytes | None = None, mode: int = 0o600) -> None:
        descriptor = os.open(self.at(directory), os.O_TMPFILE | os.O_RDWR, mode)
        try:
            if path is not None:
                opened = f"/proc/self/fd/{descriptor}".encode()
                if LIBC.linkat(AT_FDCWD, opened, AT_FDCWD, self.at(path), AT_SYMLINK_FOLLOW):
                    raise OSError(ctypes.get_errno(), "linkat")
        finally:
            os.close(descriptor)

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self.at(path), mode)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        os.chown(self.at(path), uid, gid)

    def setxattr(self, path: bytes, name: bytes, value: bytes) -> None:
        os.setxattr(self.at(path), name, value)

    def flags(self, path: bytes, flags: int) -> None:
        """Set the flags that people set (chattr), the others kept."""
        descriptor = os.open(self.at(path), os.O_RDONLY)
        try:
            old = struct.unpack("<I", fcntl.ioctl(descriptor, GETFLAGS, bytes(8))[:4])[0]
            kept = old & ~setattr.FLAGS_MODIFIABLE
            fcntl.ioctl(descriptor, SETFLAGS, struct.pack("<Q", kept | flags))
        finally:
            os.close(descriptor)

    def project(self, path: bytes, project: int, inherit: int) -> None:
        descriptor = os.open(self.at(path), os.O_RDONLY)
        try:
            old = FSXATTR.unpack(fcntl.ioctl(descriptor, FSGETXATTR, bytes(FSXATTR.size)))
            flags = old[0] | (XFLAG_PROJINHERIT if inherit else 0)
            fcntl.ioctl(descriptor, FSSETXATTR, FSXATTR.pack(flags, old[1], old[2], project, old[4]))
        finally:
            os.close(descriptor)


class OurSide:
    """The core on an image; operation ``i`` happens at ``START + i`` seconds.

    ``release``: whether orphans are freed at once, as when nobody uses what was removed.
    """

    def __init__(self, writer: Writer, caller: Caller = ROOT, release: bool = True) -> None:
        self.writer, self.caller, self.release, self.count = writer, caller, release, 0
        self.orphans: list[int] = []

    def do(self, operation: Operation) -> Answer:
        """The errno of one operation."""
        self.writer.clock = (START + self.count, 500)
        self.count += 1
        try:
            getattr(self, operation[0])(*operation[1:])
        except Refused as refusal:
            return refusal.errno
        finally:
            self.writer.clock = None
        return 0

    def when(self, seconds: int, nanoseconds: int) -> int:
        """The number of the operation that stamped this time; -1: before all."""
        return seconds - START if START <= seconds < START + self.count and nanoseconds == 500 else -1

    def parent(self, tx: Any, path: bytes) -> tuple[Inode, bytes]:
        above, _, name = path.rpartition(b"/")
        return self.folder(tx, above), name

    def folder(self, tx: Any, path: bytes) -> Inode:
        """What a path leads to; links lead nowhere, as the targets of these tests do not exist."""
        found = inode.load(tx, 2)
        for name in filter(None, path.split(b"/")):
            found = namespace.lookup_inode(tx, found, name)
            if found.is_symlink:
                raise Refused(errno.ENOENT)
        if not found.is_dir:
            raise Refused(errno.ENOTDIR)
        return found

    def inode(self, tx: Any, path: bytes) -> Inode:
        return namespace.lookup_inode(tx, *self.parent(tx, path))

    def change(self, operation: Callable[..., Any], *paths: bytes, after: tuple[object, ...] = ()) -> Any:
        """``operation(tx, parent, name, …, *after)`` for paths, in one transaction."""
        def run(tx: Any) -> Any:
            arguments: list[object] = []
            for path in paths:
                arguments += self.parent(tx, path)
            return operation(tx, *arguments, *after)

        return self.writer.change(run)

    def gone(self, victim: Inode | None) -> None:
        """What the server does with an inode that lost a name."""
        if victim is None or victim.links:
            return
        if not self.release:
            self.orphans.append(victim.number)
        else:
            self.free(victim.number)

    def free(self, number: int) -> None:
        while not self.writer.change(lambda tx: inodefree.release(tx, tx.inode(number))):
            pass

    def create(self, path: bytes, mode: int = 0o644) -> None:
        self.change(namestore.create, path, after=(mode, self.caller))

    def mknod(self, path: bytes, mode: int, major: int = 0, minor: int = 0) -> None:
        self.change(namestore.create, path, after=(mode, self.caller, (major, minor)))

    def mkdir(self, path: bytes, mode: int = 0o755) -> None:
        self.change(namestore.mkdir, path, after=(mode, self.caller))

    def symlink(self, path: bytes, target: bytes) -> None:
        self.change(namestore.symlink, path, after=(target, self.caller))

    def link(self, source: bytes, path: bytes) -> None:
        self.writer.change(lambda tx: namestore.link(tx, self.inode(tx, source), *self.parent(tx, path)))

    def unlink(self, path: bytes) -> None:
        self.gone(self.change(namestore.unlink, path))

    def rmdir(self, path: bytes) -> None:
        self.gone(self.change(namestore.rmdir, path))

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        self.gone(self.change(rename.rename, old, new, after=(flags, self.caller)).other)

    def tmpfile(self, directory: bytes, path: bytes | None = None, mode: int = 0o600) -> None:
        made = self.writer.change(
            lambda tx: namestore.tmpfile(tx, self.folder(tx, directory), mode, self.caller)).number
        try:
            if path is not None:
                self.writer.change(lambda tx: namestore.link(tx, tx.inode(made), *self.parent(tx, path)))
        finally:
            self.gone(self.writer.inode(made))

    def chmod(self, path: bytes, mode: int) -> None:
        self.writer.change(lambda tx: setattr.chmod(tx, self.inode(tx, path), mode))

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        self.writer.change(lambda tx: setattr.chown(tx, self.inode(tx, path), uid, gid))

    def setxattr(self, path: bytes, name: bytes, value: bytes) -> None:
        self.writer.change(lambda tx: setattr.set_xattr(tx, self.inode(tx, path), name, value))

    def flags(self, path: bytes, flags: int) -> None:
        def run(tx: Any) -> None:
            found = self.inode(tx, path)
            setattr.set_flags(tx, found, found.flags & ~setattr.FLAGS_MODIFIABLE | flags)

        self.writer.change(run)

    def project(self, path: bytes, project: int, inherit: int) -> None:
        def run(tx: Any) -> None:
            found = setattr.set_project(tx, self.inode(tx, path), project)
            if inherit:
                setattr.set_flags(tx, found, found.flags | inode.FLAG_PROJINHERIT)

        self.writer.change(run)


def tree(core: Core, when: Callable[[int, int], int] | None, versions: bool = True) -> list[str]:
    """One line for each name of an image: what it leads to, and what the inode says, its times by ``when``."""
    lines, root = [], core.root()
    numbers: dict[int, bytes] = {}
    for path, found in [(b"/", root), *core.tree()]:
        first = numbers.setdefault(found.number, path)
        lines.append(" ".join([path.decode("latin-1"), f"same={first.decode('latin-1')}",
                               *_words(core, found, when, versions)]))
    return sorted(lines)


def _words(core: Core, of: Inode, when: Callable[[int, int], int] | None, versions: bool) -> Iterator[str]:
    yield f"{of.mode:o} {of.uid}:{of.gid} links={of.links} flags={of.flags:#x} project={of.project}"
    yield f"rdev={of.rdev} indexed={bool(of.flags & FLAG_INDEX)} sectors={of.sectors}"
    if versions:
        yield f"version={of.version}"
    if when is not None:
        times = {name: getattr(of, name) for name in ("atime", "ctime", "mtime", "crtime")}
        yield " ".join(f"{name}={when(*value) if value else None}" for name, value in times.items())
    if of.is_symlink:
        yield core.run(namespace.readlink, of).decode("latin-1")
    elif of.is_dir:
        parent = core.run(namespace.lookup_inode, of, b"..") if of.number != 2 else of
        yield f"size={of.size} parent={parent.number == of.number}"
    else:
        yield f"size={of.size}"
    for name in sorted(core.run(xattr.names, of, True)):
        yield f"{name!r}={core.run(xattr.get, of, name)!r}"


@contextmanager
def kernel_side(path: Path, options: str = "rw,noatime") -> Iterator[KernelSide]:
    """A kernel mount of an image, for writing; umask is 0 as long."""
    mask = os.umask(0)
    try:
        with mounting.kernel_mount(path, options) as mounted:
            yield KernelSide(mounted.root)
    finally:
        os.umask(mask)


def name_of(number: int) -> str:
    """An errno's name, for messages."""
    return errno.errorcode.get(number, str(number)) if number else "0"


def compare(arguments: str, operations: list[Operation], versions: bool = True) -> None:
    """Do the operations on both sides: the same answers, the same trees, nothing for e2fsck to find."""
    source = image(arguments, 16384)
    theirs = Path(shutil.copy(source, new_path()))
    with Writer(source) as writer:
        ours, wrong = OurSide(writer), []
        with kernel_side(theirs) as kernel:
            for number, operation in enumerate(operations):
                expected, found = kernel.do(operation), ours.do(operation)
                if expected != found:
                    wrong.append(f"{number}: {operation}: {name_of(found)}, kernel: {name_of(expected)}")
        assert not wrong, "\n".join(wrong)
        writer.check()
        _assert_same(theirs, kernel, writer, ours, versions)
        with kernel_side(theirs) as kernel, kernel_side(writer.path) as again:
            assert listing(again.root) == listing(kernel.root)
            assert again.do(("mkdir", b"by the kernel")) == 0
        writer.check_only()


def listing(root: bytes) -> list[tuple[object, ...]]:
    """What is below a mounted directory: name, mode, links, size, and the target of a link."""
    found = []
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            of = os.lstat(path)
            target = os.readlink(path) if os.path.islink(path) else b""
            found.append((path[len(root):], of.st_mode, of.st_nlink, of.st_size, target))
    return sorted(found)


def _assert_same(theirs: Path, kernel: KernelSide, writer: Writer, ours: OurSide, versions: bool) -> None:
    with Core(theirs) as core:
        fine = core.fs.geometry.inode_bytes > 128  # smaller inodes keep whole seconds
        wanted = tree(core, kernel.when if fine else None, versions)
    assert tree(writer, ours.when if fine else None, versions) == wanted
