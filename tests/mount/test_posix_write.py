"""What programs may rely on when they change names and attributes: kernel ext4 is asked first, and is the judge."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.images import debugfs, mke2fs
from tests.model.generate import ACLS, DEFAULT, acl
from tests.model.side import FS_IOC_SETFLAGS, fallocate, link_opened, renameat2, user
from tests.mount.writable_mount import DRIVERS, MOUNTS, error_of, here, mounted, writable  # noqa: F401
from tests.walk import FS_IOC_FSGETXATTR, FS_IOC_GETFLAGS, FS_IOC_GETVERSION

NOBODY = 0xFFFFFFFF
ALICE, BOB = 1000, 1001
MANY = 5000
APPEND, IMMUTABLE = 0x20, 0x10
FS_IOC_FSSETXATTR, FS_IOC_GETFSLABEL, FS_IOC_SETFSLABEL = 0x401C5820, 0x81009431, 0x41009432
FS_IOC_SETVERSION = 0x40087602


def make(path: Path, data: bytes = b"", mode: int = 0o644) -> Path:
    path.write_bytes(data)
    os.chmod(path, mode)
    return path


def open_close(path: Path, flags: int) -> None:
    os.close(os.open(path, flags))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def set_flags(path: Path, flags: int) -> None:
    """Set the flags that a user may set."""
    fd = os.open(path, os.O_RDONLY)
    try:
        old = struct.unpack("<I", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4])[0]
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("<Q", old & ~(APPEND | IMMUTABLE) | flags))
    finally:
        os.close(fd)


# --- permissions ------------------------------------------------------------------------------------------------------


def test_permissions_of_others(here: Path) -> None:  # noqa: F811
    make(here / "private", b"x", 0o600)
    make(here / "readable", b"x", 0o644)
    (here / "closed").mkdir(0o700)
    os.mkdir(here / "shut", 0o755)
    with user(ALICE, ()):
        assert error_of(os.open, here / "private", os.O_RDONLY) == "EACCES"
        assert error_of(os.open, here / "readable", os.O_WRONLY) == "EACCES"
        assert error_of(os.truncate, here / "readable", 0) == "EACCES"
        assert error_of(os.stat, here / "closed" / "x") == "EACCES"
        assert error_of(os.mkdir, here / "shut" / "x") == "EACCES"
        assert error_of(os.chmod, here / "readable", 0o777) == "EPERM"
        assert error_of(os.chown, here / "readable", ALICE, ALICE) == "EPERM"
        assert error_of(os.utime, here / "readable", (1, 1)) == "EPERM"
        assert error_of(os.setxattr, here / "readable", "user.a", b"1") == "EACCES"
        assert error_of(os.setxattr, here / "readable", "trusted.a", b"1") == "EPERM"
        assert error_of(os.link, here / "private", here / "mine") in ("EPERM", "ok")
        (here / "own").write_bytes(b"mine")
    assert os.stat(here / "own").st_uid == ALICE


def test_sticky_directory(here: Path) -> None:  # noqa: F811
    os.chmod(here, 0o1777)
    with user(ALICE, ()):
        make(here / "a")
    with user(BOB, ()):
        assert error_of(os.unlink, here / "a") == "EPERM"
        assert error_of(os.rename, here / "a", here / "b") == "EPERM"
        make(here / "b")
        assert error_of(os.rename, here / "b", here / "a") == "EPERM"
    with user(ALICE, ()):
        os.unlink(here / "a")


def test_sgid_directory(here: Path) -> None:  # noqa: F811
    os.chown(here, 0, 77)
    os.chmod(here, 0o2777)
    with user(ALICE, ()):
        make(here / "file")
        (here / "dir").mkdir(0o755)
        os.symlink("x", here / "link")
        os.mknod(here / "fifo", stat.S_IFIFO | 0o644)
    assert {os.lstat(here / name).st_gid for name in ("file", "dir", "link", "fifo")} == {77}
    assert mode_of(here / "dir") == 0o2755
    with user(ALICE, ()):       # not in the group: a file may not be set-group-ID of it
        os.close(os.open(here / "program", os.O_CREAT | os.O_WRONLY, 0o2775))
    assert mode_of(here / "program") & stat.S_ISGID == 0


def test_privileges_fall_when_somebody_writes(here: Path) -> None:  # noqa: F811
    def left(change: object, owner: int = ALICE) -> int:
        path = make(here / "program", b"x" * 8192)
        os.chown(path, owner, owner)
        os.chmod(path, 0o6777)
        with user(BOB, ()):
            change(path)  # type: ignore[operator]
        os.sync()
        return mode_of(path)

    def write(path: Path) -> None:
        with open(path, "r+b") as file:
            file.write(b"y")

    def allocate(path: Path) -> None:
        with open(path, "r+b") as file:
            fallocate(file.fileno(), 0, 0, 20000)

    assert left(write) == 0o777
    assert left(lambda path: os.truncate(path, 10)) == 0o777
    assert left(lambda path: os.truncate(path, 8192)) == 0o777
    assert left(allocate) == 0o777
    assert left(os.stat) == 0o6777


def test_privileges_fall_with_the_owner(here: Path) -> None:  # noqa: F811
    path = make(here / "program", b"x", 0o6755)
    os.chown(path, ALICE, ALICE)
    assert mode_of(path) == 0o755
    os.chmod(path, 0o2644)      # mandatory locking, not a privilege
    os.chown(path, BOB, BOB)
    assert mode_of(path) == 0o2644
    os.mkdir(here / "dir")
    os.chmod(here / "dir", 0o6755)
    os.chown(here / "dir", ALICE, ALICE)
    assert mode_of(here / "dir") == 0o6755


def test_capabilities_fall_when_written(here: Path) -> None:  # noqa: F811
    value = struct.pack("<IIIII", 0x02000000, 0x400, 0, 0, 0)
    path = make(here / "program", b"x", 0o777)
    os.setxattr(path, "security.capability", value)
    assert os.getxattr(path, "security.capability") == value
    path.write_bytes(b"other")
    assert error_of(os.getxattr, path, "security.capability") == "ENODATA"


def test_umask_and_default_lists(here: Path) -> None:  # noqa: F811
    mask = os.umask(0o027)
    try:
        os.close(os.open(here / "plain", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(here / "dir", 0o777)
        assert (mode_of(here / "plain"), mode_of(here / "dir")) == (0o640, 0o750)
        os.mkdir(here / "listed")
        os.chmod(here / "listed", 0o777)
        os.setxattr(here / "listed", DEFAULT, acl((1, 7, NOBODY), (2, 6, ALICE), (4, 5, NOBODY), (16, 7, NOBODY),
                                                  (32, 4, NOBODY)))
        os.close(os.open(here / "listed" / "file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(here / "listed" / "dir", 0o777)
        assert (mode_of(here / "listed" / "file"), mode_of(here / "listed" / "dir")) == (0o664, 0o774)
        assert DEFAULT.decode() in os.listxattr(here / "listed" / "dir")
        with user(ALICE, ()):
            assert error_of(open_close, here / "listed" / "file", os.O_RDWR) == "ok"
        with user(BOB, ()):
            assert error_of(open_close, here / "listed" / "file", os.O_RDWR) == "EACCES"
        os.chmod(here / "listed" / "file", 0o604)
        with user(BOB, ()):
            assert error_of(open_close, here / "listed" / "file", os.O_RDONLY) == "ok"
    finally:
        os.umask(mask)


def test_bad_lists(here: Path) -> None:  # noqa: F811
    path = make(here / "file")
    for value in (b"", b"\2\0\0\0", b"\1\0\0\0" + ACLS[0][4:], ACLS[0][:-3], acl((1, 7, NOBODY), (4, 7, NOBODY))):
        assert error_of(os.setxattr, path, b"system.posix_acl_access", value) in ("EINVAL", "ENOTSUP", "ok"), value
    assert error_of(os.setxattr, path, DEFAULT, ACLS[1]) == "EACCES"
    assert mode_of(path) == 0o644


# --- names ------------------------------------------------------------------------------------------------------------


def test_renames(here: Path) -> None:  # noqa: F811
    make(here / "a", b"a")
    make(here / "b", b"b")
    os.link(here / "a", here / "same")
    os.mkdir(here / "d")
    os.mkdir(here / "full")
    make(here / "full" / "x")
    assert error_of(os.rename, here / "a", here / "same") == "ok"     # one file: nothing happens
    assert sorted(os.listdir(here)) == ["a", "b", "d", "full", "same"]
    assert error_of(os.rename, here / "a", here / "d") == "EISDIR"
    assert error_of(os.rename, here / "d", here / "a") == "ENOTDIR"
    assert error_of(os.rename, here / "d", here / "full") == "ENOTEMPTY"
    assert error_of(os.rename, here / "d", here / "d" / "e") == "EINVAL"
    assert error_of(os.rename, here / "full", here / "d") == "ok"
    assert error_of(os.rename, here / "none", here / "x") == "ENOENT"
    assert error_of(os.rename, here / "a", here / "a" / "x") == "ENOTDIR"
    assert error_of(os.rename, here / "a", here / ("n" * 256)) == "ENAMETOOLONG"
    os.rename(here / "a", here / "b")
    assert (here / "b").read_bytes() == b"a"
    path = os.fsencode(here)
    assert error_of(renameat2, path + b"/b", path + b"/same", 1) == "EEXIST"
    renameat2(path + b"/b", path + b"/d", 2)
    assert (here / "d").read_bytes() == b"a"
    assert os.listdir(here / "b") == ["x"]
    renameat2(path + b"/d", path + b"/moved", 4)
    assert stat.S_ISCHR(os.lstat(here / "d").st_mode)
    assert os.lstat(here / "d").st_rdev == 0


def test_link_counts_of_directories(here: Path) -> None:  # noqa: F811
    assert os.stat(here).st_nlink == 2
    for index in range(30):
        os.mkdir(here / f"d{index}")
    assert os.stat(here).st_nlink == 32
    os.rename(here / "d0", here / "d1" / "d0")
    assert (os.stat(here).st_nlink, os.stat(here / "d1").st_nlink) == (31, 3)
    assert os.stat(here / "d1" / "d0" / "..").st_ino == os.stat(here / "d1").st_ino
    os.rmdir(here / "d1" / "d0")
    os.rmdir(here / "d2")
    assert (os.stat(here).st_nlink, os.stat(here / "d1").st_nlink) == (30, 2)
    assert error_of(os.rmdir, here) == "ENOTEMPTY"


def test_names_at_their_limits(here: Path) -> None:  # noqa: F811
    make(here / ("n" * 255), b"x")
    assert error_of(os.mkdir, here / ("n" * 256)) == "ENAMETOOLONG"
    assert error_of(os.symlink, "t" * 4095, here / "l1") == "ok"
    assert error_of(os.symlink, "t" * 4096, here / "l2") == "ENAMETOOLONG"
    assert os.readlink(here / "l1") == "t" * 4095
    assert error_of(os.mkdir, here / ".") == "EEXIST"
    assert error_of(os.rmdir, str(here) + "/.") == "EINVAL"
    odd = os.fsencode(here) + b"/\x01\xff \n*"
    os.close(os.open(odd, os.O_CREAT | os.O_WRONLY))
    assert odd.rsplit(b"/", 1)[1] in os.listdir(os.fsencode(here))


def test_a_removed_directory_takes_no_names(here: Path) -> None:  # noqa: F811
    os.mkdir(here / "gone")
    fd = os.open(here / "gone", os.O_RDONLY)
    try:
        os.rmdir(here / "gone")
        assert error_of(os.mkdir, "x", dir_fd=fd) == "ENOENT"
        assert error_of(os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=fd) == "ENOENT"
        assert os.listdir(fd) == []
        assert os.fstat(fd).st_nlink == 0
    finally:
        os.close(fd)


def test_exclusive_creation(here: Path) -> None:  # noqa: F811
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda _: error_of(open_close, here / "one", flags), range(8)))
    assert sorted(outcomes) == ["EEXIST"] * 7 + ["ok"]
    os.symlink("nowhere", here / "link")
    assert error_of(os.open, here / "link", flags) == "EEXIST"
    make(here / "full", b"data")
    os.close(os.open(here / "full", os.O_WRONLY | os.O_TRUNC))
    assert os.stat(here / "full").st_size == 0


def test_unlinked_files_live_on(here: Path) -> None:  # noqa: F811
    path = make(here / "file", b"a" * 10000)
    fd = os.open(path, os.O_RDWR)
    try:
        os.unlink(path)
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 10, 9995) == b"aaaaa"
        os.pwrite(fd, b"b" * 5000, 20000)
        os.fsync(fd)
        assert os.fstat(fd).st_size == 25000
        os.ftruncate(fd, 100)
        os.fchmod(fd, 0o600)
        os.setxattr(fd, "user.a", b"1")
        assert os.pread(fd, 1000, 0) == b"a" * 100
        assert error_of(link_opened, fd, os.fsencode(here / "back")) == "ENOENT"
    finally:
        os.close(fd)
    assert os.listdir(here) == []


def test_files_without_names(here: Path) -> None:  # noqa: F811
    fd = os.open(here, os.O_TMPFILE | os.O_RDWR, 0o640)
    try:
        os.write(fd, b"content")
        assert os.fstat(fd).st_nlink == 0
        assert os.listdir(here) == []
        link_opened(fd, os.fsencode(here / "named"))
        assert os.fstat(fd).st_nlink == 1
        os.link(here / "named", here / "again")
    finally:
        os.close(fd)
    assert (here / "again").read_bytes() == b"content"
    fd = os.open(here, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o640)
    try:
        assert error_of(link_opened, fd, os.fsencode(here / "never")) == "ENOENT"
    finally:
        os.close(fd)


# --- many names -------------------------------------------------------------------------------------------------------


def test_removing_many_while_reading(here: Path) -> None:  # noqa: F811
    for index in range(MANY):
        os.close(os.open(here / f"name-{index}", os.O_CREAT | os.O_WRONLY))
    with os.scandir(here) as found:
        seen = [entry.name for entry in found if not os.unlink(entry.path)]  # type: ignore[func-returns-value]
    assert len(seen) == len(set(seen)) == MANY
    assert os.listdir(here) == []


def test_listing_while_a_directory_grows(here: Path) -> None:  # noqa: F811
    """Blocks are split under the reader, who sees what is there all the time exactly once."""
    for index in range(600):
        open_close(here / f"stays-{index}", os.O_CREAT | os.O_WRONLY)
    seen: list[str] = []
    with os.scandir(here) as found:
        for entry in found:
            if entry.name.count("-") == 1:
                seen.append(entry.name)
                for suffix in "abcde":
                    open_close(here / f"{entry.name}-{suffix}-{'long' * 20}", os.O_CREAT | os.O_WRONLY)
    assert len(seen) == len(set(seen)) == 600
    assert len(os.listdir(here)) == 600 + 5 * len(seen)


def test_listing_while_names_come_and_go(here: Path) -> None:  # noqa: F811
    """What is there all the time is seen exactly once."""
    for index in range(2000):
        os.close(os.open(here / f"stays-{index}", os.O_CREAT | os.O_WRONLY))
    seen: list[str] = []
    with os.scandir(here) as found:
        for number, entry in enumerate(found):
            seen.append(entry.name)
            if number % 4 == 0 and number < 4000:
                os.close(os.open(here / f"new-{number}", os.O_CREAT | os.O_WRONLY))
                os.unlink(here / f"new-{number}")
    stays = [name for name in seen if name.startswith("stays")]
    assert len(stays) == len(set(stays)) == 2000


def test_processes_creating_in_one_directory(here: Path) -> None:  # noqa: F811
    script = "for i in $(seq 300); do echo $2 > $1/$2-$i; mkdir $1/$2-d$i; rmdir $1/$2-d$i; done"
    running = [subprocess.Popen(["sh", "-c", script, "sh", str(here), name]) for name in "abcd"]
    assert [process.wait() for process in running] == [0] * 4
    assert sorted(os.listdir(here)) == sorted(f"{name}-{index}" for name in "abcd" for index in range(1, 301))
    assert (here / "c-300").read_text() == "c\n"


# --- flags ------------------------------------------------------------------------------------------------------------


def test_immutable(here: Path) -> None:  # noqa: F811
    path = make(here / "file", b"kept")
    set_flags(path, IMMUTABLE)
    try:
        assert error_of(os.unlink, path) == "EPERM"
        assert error_of(os.rename, path, here / "other") == "EPERM"
        assert error_of(os.link, path, here / "other") == "EPERM"
        assert error_of(os.chmod, path, 0o600) == "EPERM"
        assert error_of(os.chown, path, 1, 1) == "EPERM"
        assert error_of(os.utime, path, (1, 1)) == "EPERM"
        assert error_of(os.truncate, path, 1) == "EPERM"
        assert error_of(os.setxattr, path, "user.a", b"1") == "EPERM"
        assert error_of(path.write_bytes, b"changed") == "EPERM"
    finally:
        set_flags(path, 0)
    assert path.read_bytes() == b"kept"
    os.unlink(path)


def test_append_only(here: Path) -> None:  # noqa: F811
    path = make(here / "log", b"first\n")
    set_flags(path, APPEND)
    try:
        for change in (lambda: os.truncate(path, 0), lambda: os.unlink(path), lambda: os.chmod(path, 0o600),
                       lambda: os.link(path, here / "other"), lambda: os.setxattr(path, "user.a", b"1"),
                       lambda: os.utime(path, (1, 1))):
            assert error_of(change) == "EPERM"
        os.utime(path)
        with open(path, "ab") as file:
            file.write(b"second\n")
            file.flush()
            os.fsync(file.fileno())     # the kernel writes back the times, too
    finally:
        set_flags(path, 0)
    assert path.read_bytes() == b"first\nsecond\n"


def test_flags_that_only_root_sets(here: Path) -> None:  # noqa: F811
    with user(ALICE, ()):
        path = make(here / "hers", b"x")
        assert error_of(set_flags, path, IMMUTABLE) == "EPERM"
        assert error_of(set_flags, path, 0x40) == "ok"      # nodump
    with user(BOB, ()):
        assert error_of(set_flags, path, 0) in ("EPERM", "EACCES")
    fd = os.open(path, os.O_RDONLY)
    try:
        assert struct.unpack("<I", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4])[0] & 0x70 == 0x40
        assert error_of(fcntl.ioctl, fd, FS_IOC_SETFLAGS, struct.pack("<Q", 0x40000000)) == "ENOTSUP"
    finally:
        os.close(fd)


def test_extended_flags(here: Path) -> None:  # noqa: F811
    folder = here / "dir"
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY)
    try:
        words = list(struct.unpack("<IIIII8x", fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(28))))
        words[0] |= 0x80
        fcntl.ioctl(fd, FS_IOC_FSSETXATTR, struct.pack("<IIIII8x", *words))
        assert list(struct.unpack("<IIIII8x", fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(28)))) == words
        words[3] = 77       # a project, which this file system does not have
        assert error_of(fcntl.ioctl, fd, FS_IOC_FSSETXATTR, struct.pack("<IIIII8x", *words)) == "ENOTSUP"
    finally:
        os.close(fd)


def test_label(here: Path) -> None:  # noqa: F811
    fd = os.open(here, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_SETFSLABEL, b"new label".ljust(256, b"\0"))
        assert fcntl.ioctl(fd, FS_IOC_GETFSLABEL, bytes(256)).rstrip(b"\0") == b"new label"
        assert error_of(fcntl.ioctl, fd, FS_IOC_SETFSLABEL, b"l" * 17 + bytes(239)) == "EINVAL"
        with user(ALICE, ()):
            assert error_of(fcntl.ioctl, fd, FS_IOC_SETFSLABEL, bytes(256)) == "EPERM"
        assert fcntl.ioctl(fd, FS_IOC_GETFSLABEL, bytes(256)).rstrip(b"\0") == b"new label"
    finally:
        os.close(fd)


def test_version(here: Path) -> None:  # noqa: F811
    """It is part of the checksums' seed: with metadata_csum it stays."""
    fd = os.open(make(here / "file"), os.O_RDONLY)
    try:
        assert error_of(fcntl.ioctl, fd, FS_IOC_SETVERSION, struct.pack("<Q", 5)) == "ENOTTY"
    finally:
        os.close(fd)


def test_immutable_and_append_only_directories(here: Path) -> None:  # noqa: F811
    folder = here / "dir"
    folder.mkdir()
    make(folder / "old", b"x")
    set_flags(folder, IMMUTABLE)
    assert error_of(os.mkdir, folder / "new") == "EPERM"
    assert error_of(os.unlink, folder / "old") == "EPERM"
    assert error_of(os.open, folder / "new", os.O_CREAT | os.O_WRONLY) == "EPERM"
    set_flags(folder, APPEND)
    assert error_of(os.mkdir, folder / "new") == "ok"
    assert error_of(os.unlink, folder / "old") == "EPERM"
    assert error_of(os.rename, folder / "old", folder / "x") == "EPERM"
    set_flags(folder, 0)
    os.unlink(folder / "old")


# --- limits that need a disk of their own -----------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
def test_most_links(driver: str, mounts: None, tmp_path: Path) -> None:
    """The count is one below the limit because debugfs says so: e2fsck would not agree."""
    path = tmp_path / "links.img"
    mke2fs(path, "-t ext4", 16 << 20)
    with MOUNTS[driver](path, "rw") as mount:
        make(mount.root / "file")
        os.mkdir(mount.root / "dir")
    debugfs(path, ["sif /file links_count 64999", "sif /dir links_count 65000"])
    with MOUNTS[driver](path, "rw") as mount:
        os.link(mount.root / "file", mount.root / "one more")
        assert os.stat(mount.root / "file").st_nlink == 65000
        assert error_of(os.link, mount.root / "file", mount.root / "too many") == "EMLINK"
        assert error_of(os.mkdir, mount.root / "dir" / "sub") == "EMLINK"     # it has no index
        os.unlink(mount.root / "one more")
        assert error_of(os.link, mount.root / "file", mount.root / "one more") == "ok"


@pytest.mark.parametrize("driver", DRIVERS)
def test_reserve_of_root(driver: str, mounts: None, tmp_path: Path) -> None:
    """A user fills the disk up to root's share and not beyond; root goes on."""
    with writable(driver, tmp_path / "full.img", "-t ext4 -b 4096 -m 10", size=24 << 20) as made:
        os.chmod(made.root, 0o777)
        with user(ALICE, ()):
            fd = os.open(made.root / "hers", os.O_CREAT | os.O_WRONLY, 0o644)
            assert fill(fd) == "ENOSPC"
            os.close(fd)
        left = os.statvfs(made.root)
        assert left.f_bavail < 16
        assert left.f_bfree >= (24 << 20) // 4096 // 10
        with user(ALICE, ()):
            assert error_of(fill_one, made.root / "hers too") == "ENOSPC"
        assert error_of(fill_one, made.root / "root's") == "ok"


def fill(fd: int) -> str:
    """Write 64 KiB after 64 KiB, each to the disk, until it fails: how."""
    while True:
        try:
            os.write(fd, bytes(65536))
            os.fsync(fd)
        except OSError as error:
            return errno.errorcode[error.errno or 0]


def fill_one(path: Path) -> None:
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        os.write(fd, bytes(4096 * 16))
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("driver", DRIVERS)
def test_version_without_checksums(driver: str, mounts: None, tmp_path: Path) -> None:
    with writable(driver, tmp_path / "version.img", "-t ext4 -O ^metadata_csum", size=16 << 20) as made:
        fd = os.open(make(made.root / "file"), os.O_RDONLY)
        try:
            os.fchown(fd, ALICE, ALICE)
            with user(BOB, ()):
                assert error_of(fcntl.ioctl, fd, FS_IOC_SETVERSION, struct.pack("<Q", 5)) == "EPERM"
            with user(ALICE, ()):
                fcntl.ioctl(fd, FS_IOC_SETVERSION, struct.pack("<Q", 77))
            assert struct.unpack("<I", fcntl.ioctl(fd, FS_IOC_GETVERSION, bytes(8))[:4])[0] == 77
        finally:
            os.close(fd)
