"""What programs may rely on when they read: each check runs on kernel ext4 first, which is the judge, then on fusewire.

Where FUSE itself cannot do what ext4 does, `BY_DRIVER` says so and the check expects that.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import populate
from tests.images import kernel, make_cached
from tests.mounting import fusewire_mount, kernel_mount
from tests.walk import getdents

MIB = 1 << 20
BIG = populate.pattern("big", 3 * MIB + 123)
NAMES = 3000
BLOCK = 4096
OPTIONS = "ro,relatime"
FS_IOC_FIEMAP = 0xC020660B
LIBC = ctypes.CDLL(None, use_errno=True)

# fs/fuse has no fiemap operation: the VFS answers for it. It lets files be as large as the VFS does: lseek does not ask
# what ext4 could store.
BY_DRIVER: dict[str, dict[str, int | str]] = {
    "kernel": {"fiemap": "ok", "seek far": "EINVAL"},
    "fusewire": {"fiemap": "ENOTSUP", "seek far": 1 << 50},
}


def contents(root: Path) -> None:
    """What the checks below use, beside the ordinary subjects."""
    (root / "big").write_bytes(BIG)
    names = populate.folder(root, "names-3000")
    for index in range(NAMES):
        (names / f"{index:05}-{'n' * (index % 50)}").touch()
    shutil.copy("/bin/true", root / "program")
    os.chmod(root / "program", 0o755)
    (root / "script").write_text("#!/bin/sh\necho from the script\n")
    os.chmod(root / "script", 0o755)
    private = populate.folder(root, "private")
    (private / "inside").write_bytes(b"secret")
    os.chmod(private, 0o700)
    block = populate.block_size(root)
    populate.sparse_file(root / "seek", {0: b"a" * block, 10 * block: b"b" * block}, 20 * block)


RECIPE = kernel("posix", "-t ext4 -b 4096", *populate.ORDINARY, populate.acls, populate.xattrs, contents, size=64 * MIB)


@pytest.fixture(scope="module")
def image(mounts: None, image_cache: Path) -> Path:
    return make_cached(RECIPE, image_cache)


@pytest.fixture(scope="module", params=["kernel", "fusewire"])
def mounted(request: pytest.FixtureRequest, image: Path) -> Iterator[tuple[str, Path]]:
    """The side's name and its root."""
    mount = kernel_mount if request.param == "kernel" else fusewire_mount
    with mount(image, OPTIONS) as served:
        yield request.param, served.root


@pytest.fixture
def root(mounted: tuple[str, Path]) -> Path:
    return mounted[1]


@pytest.fixture(scope="module")
def pair(image: Path) -> Iterator[tuple[Path, Path]]:
    """A kernel mount and a fusewire mount of the same image, together."""
    with kernel_mount(image, OPTIONS) as ours, fusewire_mount(image, OPTIONS) as theirs:
        yield ours.root, theirs.root


def outcome(action: Callable[[], object]) -> str:
    """``ok``, or the name of the errno."""
    try:
        result = action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    if isinstance(result, int) and not isinstance(result, bool) and result > 2:
        os.close(result)
    return "ok"


def as_user(uid: int, gid: int, groups: list[int], action: Callable[[], object]) -> str:
    """The outcome of ``action`` in a child with these ids."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            os.write(writer, outcome(action).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text


@pytest.fixture
def opened(root: Path) -> Iterator[int]:
    """``big``, open for reading."""
    fd = os.open(root / "big", os.O_RDONLY)
    yield fd
    os.close(fd)


# --- open, and what a read-only file system refuses -------------------------------------------------------------------

OPENS = [
    ("big", os.O_RDONLY, "ok"),
    ("big", os.O_WRONLY, "EROFS"),
    ("big", os.O_RDWR, "EROFS"),
    ("big", os.O_RDONLY | os.O_TRUNC, "EROFS"),
    ("big", os.O_WRONLY | os.O_APPEND, "EROFS"),
    ("big", os.O_RDONLY | os.O_CREAT, "ok"),
    ("big", os.O_RDONLY | os.O_CREAT | os.O_EXCL, "EEXIST"),
    ("new", os.O_WRONLY | os.O_CREAT, "EROFS"),
    ("new", os.O_RDONLY, "ENOENT"),
    ("big", os.O_RDONLY | os.O_DIRECTORY, "ENOTDIR"),
    ("big/below", os.O_RDONLY, "ENOTDIR"),
    ("dirs", os.O_RDONLY, "ok"),
    ("dirs", os.O_WRONLY, "EISDIR"),
    ("dirs", os.O_RDONLY | os.O_DIRECTORY, "ok"),
    ("dirs", os.O_TMPFILE | os.O_WRONLY, "EROFS"),
    ("links/relative", os.O_RDONLY | os.O_NOFOLLOW, "ELOOP"),
    ("links/relative", os.O_RDONLY, "ok"),
    ("links/loop", os.O_RDONLY, "ELOOP"),
    ("links/to-60", os.O_RDONLY, "ENOENT"),
    ("special/socket", os.O_RDONLY, "ENXIO"),
    ("special/fifo", os.O_RDONLY | os.O_NONBLOCK, "ok"),
    ("n" * 256, os.O_RDONLY, "ENAMETOOLONG"),
    ("n" * 255, os.O_RDONLY, "ENOENT"),
    ("names/" + "n" * 255, os.O_RDONLY, "ok"),
    ("big", os.O_PATH, "ok"),
    ("big", os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC | os.O_SYNC, "ok"),
]


@pytest.mark.parametrize(("path", "flags", "expected"), OPENS)
def test_open(root: Path, path: str, flags: int, expected: str) -> None:
    assert outcome(lambda: os.open(root / path, flags, 0o644)) == expected


CHANGES: dict[str, Callable[[Path], object]] = {
    "mkdir": lambda root: os.mkdir(root / "new"),
    "mkdir over": lambda root: os.mkdir(root / "dirs"),
    "rmdir": lambda root: os.rmdir(root / "dirs/empty"),
    "unlink": lambda root: os.unlink(root / "big"),
    "unlink absent": lambda root: os.unlink(root / "new"),
    "rename": lambda root: os.rename(root / "big", root / "new"),
    "link": lambda root: os.link(root / "big", root / "new"),
    "symlink": lambda root: os.symlink("x", root / "new"),
    "mknod": lambda root: os.mkfifo(root / "new"),
    "chmod": lambda root: os.chmod(root / "big", 0o600),
    "chown": lambda root: os.chown(root / "big", 1, 1),
    "utime": lambda root: os.utime(root / "big"),
    "truncate": lambda root: os.truncate(root / "big", 1),
    "setxattr": lambda root: os.setxattr(root / "big", "user.x", b"1"),
    "removexattr": lambda root: os.removexattr(root / "xattrs/small", "user.a"),
    "setflags": lambda root: populate.set_flags(root / "big", 0x40),
    "access W": lambda root: os.close(os.open(root / "big", os.O_RDWR)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_refused(root: Path, name: str) -> None:
    assert outcome(lambda: CHANGES[name](root)) == ("EEXIST" if name == "mkdir over" else "EROFS")


OFFSETS = [0, 1, 4095, 4096, 131_071, MIB, 3 * MIB, len(BIG) - 1, len(BIG), len(BIG) + 1, 1 << 40]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offset", [0, 1, 4095, 4096, 131_071, MIB, 3 * MIB, len(BIG) - 1, len(BIG), len(BIG) + 1, 1 << 40]
)
@pytest.mark.parametrize("count", [0, 1, 4096, 200_000, 4 * MIB])
def test_pread(opened: int, offset: int, count: int) -> None:
    assert os.pread(opened, count, offset) == BIG[offset : offset + count]


def test_pread_of_odd_offsets(opened: int) -> None:
    assert outcome(lambda: os.pread(opened, 1, -1)) == "EINVAL"
    assert os.pread(opened, 1, (1 << 63) - 2) == b""


def test_readv(opened: int) -> None:
    buffers = [bytearray(7), bytearray(4096), bytearray(100_000)]
    assert os.preadv(opened, buffers, 3) == 7 + 4096 + 100_000
    assert b"".join(buffers) == BIG[3 : 3 + 7 + 4096 + 100_000]


@pytest.mark.parametrize("path", ["big", "seek", "sizes/0", "sizes/60", "holes/odd", "holes/end"])
def test_mmap(root: Path, path: str) -> None:
    data = (root / path).read_bytes()
    if not data:
        return
    with open(root / path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == data
    with open(root / path, "rb") as file, mmap.mmap(file.fileno(), len(data), flags=mmap.MAP_PRIVATE) as private:
        private[0:1] = b"!"
        assert private[1:] == data[1:]
    assert (root / path).read_bytes() == data


@pytest.mark.parametrize(("offset", "count"), [(0, 4096), (4096, 1 << 20), (len(BIG) & -4096, 4096), (4 * MIB, 4096)])
def test_direct(root: Path, offset: int, count: int) -> None:
    fd = os.open(root / "big", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, count) as buffer:
            length = os.preadv(fd, [buffer], offset)
            assert buffer[:length] == BIG[offset : offset + count]
            assert length == len(BIG[offset : offset + count])
    finally:
        os.close(fd)


def test_sendfile_and_copies(root: Path, opened: int, tmp_path: Path) -> None:
    target = os.open(tmp_path / "sent", os.O_RDWR | os.O_CREAT)
    try:
        position = 0
        while sent := os.sendfile(target, opened, position, len(BIG)):
            position += sent
        assert os.pread(target, len(BIG) + 1, 0) == BIG
    finally:
        os.close(target)
    shutil.copyfile(root / "big", tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == BIG
    fd = os.open(tmp_path / "ranged", os.O_RDWR | os.O_CREAT)
    try:
        outside = outcome(lambda: os.copy_file_range(opened, fd, 1, 0, 0) * 0)
        assert outside in ("ok", "EXDEV")  # between file systems: the kernel's affair, never an I/O error
    finally:
        os.close(fd)


def test_program_runs(root: Path) -> None:
    assert subprocess.run([root / "program"], check=False).returncode == 0
    assert subprocess.run([root / "script"], check=True, capture_output=True).stdout == b"from the script\n"
    assert outcome(lambda: subprocess.run([root / "big"], check=False)) == "EACCES"


# --- lseek ------------------------------------------------------------------------------------------------------------

SEEKS = [
    (os.SEEK_DATA, 0, 0),
    (os.SEEK_DATA, BLOCK, 10 * BLOCK),
    (os.SEEK_DATA, 10 * BLOCK + 5, 10 * BLOCK + 5),
    (os.SEEK_DATA, 11 * BLOCK, "ENXIO"),
    (os.SEEK_DATA, 20 * BLOCK, "ENXIO"),
    (os.SEEK_DATA, -1, "ENXIO"),
    (os.SEEK_HOLE, 0, BLOCK),
    (os.SEEK_HOLE, BLOCK + 1, BLOCK + 1),
    (os.SEEK_HOLE, 10 * BLOCK, 11 * BLOCK),
    (os.SEEK_HOLE, 20 * BLOCK - 1, 20 * BLOCK - 1),
    (os.SEEK_HOLE, 20 * BLOCK, "ENXIO"),
    (os.SEEK_HOLE, 1 << 50, "ENXIO"),
    (os.SEEK_END, 0, 20 * BLOCK),
    (os.SEEK_END, -20 * BLOCK - 1, "EINVAL"),
    (os.SEEK_SET, 1 << 50, "seek far"),
    (os.SEEK_SET, 1 << 40, 1 << 40),
    (99, 0, "EINVAL"),
]


@pytest.mark.parametrize(("whence", "offset", "expected"), SEEKS)
def test_lseek(mounted: tuple[str, Path], whence: int, offset: int, expected: int | str) -> None:
    side, root = mounted
    fd = os.open(root / "seek", os.O_RDONLY)
    try:
        found: int | str = os.lseek(fd, offset, whence)
    except OSError as error:
        found = errno.errorcode[error.errno or 0]
    finally:
        os.close(fd)
    assert found == BY_DRIVER[side].get(str(expected), expected)


@pytest.mark.parametrize("path", ["sizes/0", "holes/all", "sizes/60"])
def test_seek_in_small_files(root: Path, path: str) -> None:
    fd = os.open(root / path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    data, hole = outcome(lambda: os.lseek(fd, 0, os.SEEK_DATA) * 0), outcome(lambda: os.lseek(fd, 0, os.SEEK_HOLE) * 0)
    os.close(fd)
    assert (data, hole) == {0: ("ENXIO", "ENXIO"), MIB: ("ENXIO", "ok"), 60: ("ok", "ok")}[size]


# --- directories ------------------------------------------------------------------------------------------------------


def names_with(fd: int, buffer_bytes: int) -> list[bytes]:
    os.lseek(fd, 0, os.SEEK_SET)
    found = []
    while entries := getdents(fd, buffer_bytes):
        found += [name for _, _, _, name in entries]
    return found


@pytest.mark.parametrize("buffer_bytes", [300, 1000, 4096, 65536, MIB])
def test_getdents_buffers(root: Path, buffer_bytes: int) -> None:
    fd = os.open(root / "names-3000", os.O_RDONLY)
    try:
        found = names_with(fd, buffer_bytes)
    finally:
        os.close(fd)
    assert len(found) == len(set(found)) == NAMES + 2
    assert {b".", b".."} < set(found)


def test_getdents_buffer_too_small(root: Path) -> None:
    fd = os.open(root / "names-3000", os.O_RDONLY)
    assert outcome(lambda: getdents(fd, 20) and 0) == "EINVAL"
    os.close(fd)


def test_seekdir(root: Path) -> None:
    """From any position that readdir has told, the rest of the same names follows; from 0 all."""
    fd = os.open(root / "names-3000", os.O_RDONLY)
    try:
        told = []
        while entries := getdents(fd, 2000):
            told += [(off, name) for _, off, _, name in entries]
        everything = [name for _, name in told]
        for index in (0, 1, 2, 777, 1500, len(told) - 2, len(told) - 1):
            os.lseek(fd, told[index][0], os.SEEK_SET)
            rest = []
            while entries := getdents(fd, 5000):
                rest += [name for _, _, _, name in entries]
            assert rest == everything[index + 1 :]
        assert names_with(fd, 4096) == everything
    finally:
        os.close(fd)


def test_two_readers_of_one_directory(root: Path) -> None:
    first, second = (os.open(root / "names-3000", os.O_RDONLY) for _ in range(2))
    try:
        one = [entry[3] for entry in getdents(first, 1000)]
        two = names_with(second, 3000)
        while entries := getdents(first, 1000):
            one += [entry[3] for entry in entries]
        assert sorted(one) == sorted(two)
    finally:
        os.close(first)
        os.close(second)


def test_directory_is_no_file(root: Path, opened: int) -> None:
    fd = os.open(root / "dirs", os.O_RDONLY)
    try:
        assert outcome(lambda: os.read(fd, 10)) == "EISDIR"
        assert outcome(lambda: getdents(opened)) == "ENOTDIR"
    finally:
        os.close(fd)


# --- names, links, attributes -----------------------------------------------------------------------------------------

LOOKUPS = [
    ("big/", "ENOTDIR"),
    ("big/.", "ENOTDIR"),
    ("dirs/.", "ok"),
    ("dirs/../big", "ok"),
    ("absent/../big", "ENOENT"),
    ("names/" + "n" * 256, "ENAMETOOLONG"),
    ("/".join(["dirs/.."] * 500) + "/big", "ok"),
    ("/".join(["dirs/.."] * 600) + "/big", "ENAMETOOLONG"),
    ("links/loop/x", "ELOOP"),
    ("links/relative/", "ENOTDIR"),
]


@pytest.mark.parametrize(("path", "expected"), LOOKUPS)
def test_lookup(root: Path, path: str, expected: str) -> None:
    assert outcome(lambda: os.stat(f"{root}/{path}") and 0) == expected


def test_readlink(root: Path) -> None:
    assert os.readlink(root / "links/to-59") == "t" * 59
    assert len(os.readlink(root / "links/to-4095")) == 4095
    assert outcome(lambda: os.readlink(root / "big")) == "EINVAL"
    assert outcome(lambda: os.readlink(root / "dirs")) == "EINVAL"
    buffer = ctypes.create_string_buffer(10)
    assert LIBC.readlink(os.fsencode(root / "links/to-255"), buffer, 10) == 10


def test_xattr_errors(root: Path) -> None:
    path = root / "xattrs/small"
    assert outcome(lambda: os.getxattr(path, "user.absent")) == "ENODATA"
    assert outcome(lambda: os.getxattr(path, "unknown.name")) == "ENOTSUP"
    assert outcome(lambda: os.getxattr(path, "user." + "n" * 251)) == "ERANGE"
    size = LIBC.getxattr(os.fsencode(path), b"user.a", None, 0)
    assert size == 1
    short = ctypes.create_string_buffer(1)
    assert LIBC.getxattr(os.fsencode(root / "xattrs/block"), b"user.large", short, 1) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert as_user(1000, 1000, [], lambda: os.getxattr(path, "trusted.t")) == "ENODATA"
    assert as_user(1000, 1000, [], lambda: os.getxattr(path, "user.a")) == "ok"


# --- permissions ------------------------------------------------------------------------------------------------------

PERMISSIONS = [
    # uid, gid, groups, path, outcome of opening it for reading
    (1000, 1000, [], "private/inside", "EACCES"),
    (0, 0, [], "private/inside", "ok"),
    (1000, 1000, [], "owners/mode-0000", "EACCES"),
    (1000, 1000, [], "owners/mode-0444", "ok"),
    (1000, 1000, [], "owners/mode-0640", "EACCES"),
    (1000, 0, [], "owners/mode-0640", "ok"),
    (1000, 1000, [0], "owners/mode-0640", "ok"),
    (1001, 1001, [], "acls/file", "ok"),
    (1002, 1002, [], "acls/file", "EACCES"),
    (1002, 1002, [70_000], "acls/file", "ok"),
    (1002, 70_000, [], "acls/file", "ok"),
    (1001, 1001, [], "acls/dir", "ok"),
    (2000, 2000, [], "acls/dir", "EACCES"),
    (2006, 2006, [], "acls/dir", "ok"),
    (1001, 1001, [], "acls/dir/inherits", "EACCES"),
]


@pytest.mark.parametrize(("uid", "gid", "groups", "path", "expected"), PERMISSIONS)
def test_permissions(root: Path, uid: int, gid: int, groups: list[int], path: str, expected: str) -> None:
    """Modes, supplementary groups and ACLs decide as on ext4 (the numbers are those of `populate.acls`)."""
    assert as_user(uid, gid, groups, lambda: os.open(root / path, os.O_RDONLY)) == expected
    assert as_user(uid, gid, groups, lambda: access(root / path, os.R_OK)) == expected


def access(path: Path, mask: int) -> None:
    if LIBC.access(os.fsencode(path), mask):
        raise OSError(ctypes.get_errno(), "access")


def test_access_for_writing(root: Path) -> None:
    assert outcome(lambda: access(root / "big", os.W_OK)) == "EROFS"
    assert outcome(lambda: access(root / "special/fifo", os.W_OK)) == "ok"
    assert outcome(lambda: access(root / "big", os.X_OK)) == "EACCES"
    assert outcome(lambda: access(root / "program", os.X_OK)) == "ok"


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_statvfs(root: Path) -> None:
    found = os.statvfs(root)
    assert found.f_flag & os.ST_RDONLY
    assert not found.f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC)
    assert (found.f_bsize, found.f_frsize, found.f_namemax) == (4096, 4096, 255)
    assert os.statvfs(root / "dirs/a") == found


def test_fiemap(mounted: tuple[str, Path]) -> None:
    side, root = mounted
    request = struct.pack("<QQIIII", 0, (1 << 64) - 1, 0, 0, 10, 0) + bytes(560)
    with open(root / "big", "rb") as file:
        assert outcome(lambda: len(fcntl.ioctl(file, FS_IOC_FIEMAP, request)) * 0) == BY_DRIVER[side]["fiemap"]


def test_unknown_ioctl(root: Path) -> None:
    with open(root / "big", "rb") as file:
        assert outcome(lambda: fcntl.ioctl(file, 0x5A5A)) == "ENOTTY"


def test_locks(root: Path) -> None:
    with open(root / "big", "rb") as one, open(root / "big", "rb") as two:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert outcome(lambda: fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)) == "EAGAIN"
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.lockf(one, fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 0)
        assert outcome(lambda: fcntl.lockf(two, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)) == "EBADF"


def test_inotify(root: Path) -> None:
    """Watching is the VFS's affair, and reading is reported."""
    fd = LIBC.inotify_init1(os.O_NONBLOCK)
    try:
        assert LIBC.inotify_add_watch(fd, os.fsencode(root / "sizes"), 0x20 | 0x1) > 0  # IN_OPEN, IN_ACCESS
        (root / "sizes/100").read_bytes()
        events = os.read(fd, 4096)
        assert b"100" in events
    finally:
        os.close(fd)


def test_handles(mounted: tuple[str, Path]) -> None:
    """A handle from name_to_handle_at opens the same inode again."""
    _, root = mounted
    handle = ctypes.create_string_buffer(struct.pack("<Ii", 128, 0) + bytes(128), 136)
    mount_id = ctypes.c_int()
    assert LIBC.name_to_handle_at(-100, os.fsencode(root / "big"), handle, ctypes.byref(mount_id), 0) == 0
    directory = os.open(root, os.O_RDONLY)
    try:
        fd = LIBC.open_by_handle_at(directory, handle, os.O_RDONLY)
        assert fd >= 0, errno.errorcode[ctypes.get_errno()]
        assert os.fstat(fd).st_ino == os.stat(root / "big").st_ino
        assert os.pread(fd, 100, 0) == BIG[:100]
        os.close(fd)
    finally:
        os.close(directory)


def test_concurrent_readers(root: Path) -> None:
    """Sixteen threads read the same file at different places."""
    fd = os.open(root / "big", os.O_RDONLY)

    def read_from(start: int) -> bool:
        return all(
            os.pread(fd, 10_000, offset) == BIG[offset : offset + 10_000] for offset in range(start, len(BIG), 190_001)
        )

    try:
        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(read_from, range(0, 160_000, 10_000)))
    finally:
        os.close(fd)


def test_unmount_while_in_use(image: Path) -> None:
    """An open file keeps the mount busy; nothing is lost."""
    with fusewire_mount(image, OPTIONS) as served:
        fd = os.open(served.root / "big", os.O_RDONLY)
        done = subprocess.run(["umount", served.root], capture_output=True, text=True, check=False)
        assert done.returncode == 32 and "busy" in done.stderr
        assert os.pread(fd, 10, 0) == BIG[:10]
        os.close(fd)


# --- whole trees by the programs that people use ----------------------------------------------------------------------

FIND_FORMAT = r"%P %y %m %n %U %G %s %b %i %l %T@ %C@ %A@\n"  # all but %D, the device number of the mount


def output(*command: str, cwd: Path) -> list[bytes]:
    done = subprocess.run(command, capture_output=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr.decode()[:2000]
    return done.stdout.split(b"\n")


def test_find_prints_the_same(pair: tuple[Path, Path]) -> None:
    ours, theirs = (output("find", ".", "-printf", FIND_FORMAT, cwd=root) for root in pair)
    assert len(ours) > NAMES
    assert sorted(ours) == sorted(theirs)


def test_diff_finds_nothing(pair: tuple[Path, Path]) -> None:
    exclude = ["--exclude=special", "--exclude=fifo", "--exclude=far", "--no-dereference"]
    done = subprocess.run(["diff", "-r", *exclude, *pair], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_tar_makes_the_same_archive(pair: tuple[Path, Path]) -> None:
    """Byte by byte, with attributes, ACLs and holes; nothing in the headers depends on time or process."""
    words = ["tar", "-c", "--sparse", "--sparse-version=0.0", "--sort=name", "--xattrs", "--acls", "--format=posix"]
    words += [
        "--pax-option=delete=atime,exthdr.name=%d/%f,exthdr.mtime=0",
        "--exclude=./special/socket",
        "--exclude=./times",
        ".",
    ]
    ours, theirs = (subprocess.run(words, cwd=root, capture_output=True, check=True).stdout for root in pair)
    assert len(ours) > len(BIG)
    assert ours == theirs


def test_every_file_type_is_shown(pair: tuple[Path, Path]) -> None:
    """The tree under test has them all, so that the comparisons above mean something."""
    walk = [os.path.join(path, name) for path, below, files in os.walk(pair[0]) for name in below + files]
    assert len({stat.S_IFMT(os.lstat(path).st_mode) for path in walk}) == 7
