"""What the test images contain: each function writes one subject into a directory of a writable mount.

Everything is written through the kernel, which decides about blocks, hashes and checksums; names and sizes are chosen
at the edges of the on-disk format.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)

FS_IOC_SETFLAGS = 0x40086602
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16

ACL_USER_OBJ, ACL_USER, ACL_GROUP_OBJ, ACL_GROUP, ACL_MASK, ACL_OTHER = 1, 2, 4, 8, 16, 32
NOBODY_ID = 0xFFFFFFFF

Populate = Callable[[Path], None]


def pattern(seed: str, count: int) -> bytes:
    """``count`` bytes that depend on ``seed``; no two aligned 64-byte pieces are alike."""
    out = b"".join(hashlib.sha512(f"{seed}/{index}".encode()).digest() for index in range(-(-count // 64)))
    return out[:count]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if LIBC.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), f"fallocate mode {mode} at {offset}")


def block_size(root: Path) -> int:
    return os.statvfs(root).f_bsize


def folder(root: Path, name: str) -> Path:
    path = root / name
    path.mkdir()
    return path


def sparse_file(path: Path, pieces: dict[int, bytes], size: int | None = None) -> None:
    """A file with ``pieces`` at their offsets, holes between them, and ``size`` if given."""
    with open(path, "wb") as file:
        for offset, data in pieces.items():
            os.pwrite(file.fileno(), data, offset)
        if size is not None:
            os.ftruncate(file.fileno(), size)


# --- the ordinary tree: part of every image ---------------------------------------------------------------------------


def plain_files(root: Path) -> None:
    """Sizes at the edges of what an inode, a block and a readahead window hold."""
    here = folder(root, "sizes")
    block = block_size(root)
    for size in {0, 1, 59, 60, 61, 100, 159, 160, 161, block - 1, block, block + 1, 5 * block + 7, 150_001}:
        (here / f"{size}").write_bytes(pattern(f"size{size}", size))


def directories(root: Path) -> None:
    """Empty, nested, and long enough for more than one block."""
    here = folder(root, "dirs")
    (here / "empty").mkdir()
    (here / "a/b/c/d/e/f/g/h/i/j").mkdir(parents=True)
    (here / "a/b/c/d/e/f/g/h/i/j/leaf").write_bytes(b"leaf\n")
    many = folder(here, "many")
    for index in range(150):
        (many / f"name-{index:04}-{'x' * (index % 40)}").write_bytes(b"%d" % index)
    for index in range(0, 150, 3):
        (many / f"name-{index:04}-{'x' * (index % 40)}").unlink()


def symlinks(root: Path) -> None:
    """Targets inside the inode (up to 59 bytes) and outside it, up to the longest."""
    here = folder(root, "links")
    longest = min(4095, block_size(root) - 1)
    for length in sorted({1, 59, 60, 61, 255, 1000, longest}):
        os.symlink("t" * length, here / f"to-{length}")
    os.symlink("../sizes/100", here / "relative")
    os.symlink("loop", here / "loop")
    os.symlink(b"\xff\xfe bytes \n", os.fsencode(here / "bytes"))


def names(root: Path) -> None:
    """The longest names, and every byte that a name may hold."""
    here = os.fsencode(folder(root, "names"))
    legal = bytes(byte for byte in range(1, 256) if byte != 0x2F)
    odd = [
        b"n" * 255,
        b"n" * 254,
        b"...",
        b" ",
        b"-rf",
        "gr\u00fc\u00dfe".encode(),
        b"\xff" * 255,
        b"a.b",
        b"a",
        legal[:254],
    ]
    for name in odd:
        with open(here + b"/" + name, "wb") as file:
            file.write(b"named " + name[:20])
    os.mkdir(here + b"/" + b"d" * 255)


def special_files(root: Path) -> None:
    """Fifo, socket, and devices with small and large numbers."""
    here = folder(root, "special")
    os.mkfifo(here / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(os.fspath(here / "socket"))
    for major, minor in ((1, 3), (255, 255), (8, 256), (259, 1 << 19), (4095, (1 << 20) - 1), (0, 0)):
        device = os.makedev(major, minor)
        os.mknod(here / f"char-{major}-{minor}", stat.S_IFCHR | 0o600, device)
        os.mknod(here / f"block-{major}-{minor}", stat.S_IFBLK | 0o660, device)


def hard_links(root: Path) -> None:
    here = folder(root, "hard")
    (here / "first").write_bytes(b"three names\n")
    for name in ("second", "third"):
        os.link(here / "first", here / name)
    os.symlink("first", here / "symlink")
    os.link(here / "symlink", here / "symlink-again", follow_symlinks=False)


def owners_and_modes(root: Path) -> None:
    """Ids of 16 and 32 bits, and every interesting mode."""
    here = folder(root, "owners")
    for uid, gid in ((1000, 1000), (65535, 65535), (65536, 65537), (70_000, 1), (4_294_967_294, 4_294_967_293)):
        path = here / f"{uid}-{gid}"
        path.write_bytes(b"owned")
        os.chown(path, uid, gid)
    for mode in (0o000, 0o001, 0o444, 0o640, 0o777, 0o1777, 0o2755, 0o4711, 0o7777):
        path = here / f"mode-{mode:04o}"
        path.write_bytes(b"mode")
        os.chmod(path, mode)
    sticky = folder(here, "sticky")
    os.chmod(sticky, 0o3777)


def times(root: Path) -> None:
    """Times at the edges of 32, 34 bits and nanoseconds; the kernel clamps what the inode cannot hold."""
    here = folder(root, "times")
    seconds = (-(2**31), -1, 0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**34 - 2**31 - 1, 1_700_000_000)
    for index, second in enumerate(seconds):
        path = here / f"t{second}"
        path.write_bytes(b"t")
        os.utime(path, ns=(second * 10**9 + index, second * 10**9 + 999_999_999))
    os.utime(here, ns=(-5, -6))


def holes(root: Path) -> None:
    """Holes at the begin, in the middle and at the end; preallocation inside and past the end."""
    here = folder(root, "holes")
    block = block_size(root)
    data = pattern("holes", block)
    sparse_file(here / "begin", {8 * block: data})
    sparse_file(here / "middle", {0: data, 20 * block: data})
    sparse_file(here / "end", {0: data}, 30 * block)
    sparse_file(here / "all", {}, 1 << 20)
    sparse_file(here / "odd", {3: b"x", 5 * block + 1: b"y"}, 9 * block + 5)
    sparse_file(here / "far", {5 << 30: data, (3 << 30) + 5: b"z"})


ORDINARY: tuple[Populate, ...] = (
    plain_files,
    directories,
    symlinks,
    names,
    special_files,
    hard_links,
    owners_and_modes,
    times,
    holes,
)


# --- subjects that need a feature -------------------------------------------------------------------------------------


def preallocated(root: Path) -> None:
    """Unwritten extents: whole files, between data, past the end, partly written."""
    here = folder(root, "unwritten")
    block = block_size(root)
    cases: dict[str, tuple[int, int, int, dict[int, bytes]]] = {
        "all": (0, 0, 50 * block, {}),
        "keep-size": (FALLOC_KEEP_SIZE, 0, 50 * block, {0: b"short"}),
        "written-middle": (0, 0, 50 * block, {20 * block: pattern("middle", block)}),
        "written-ends": (0, 0, 50 * block, {0: pattern("0", block), 49 * block: pattern("49", block)}),
        "odd": (0, block + 1, 7 * block, {2 * block + 3: b"odd"}),
    }
    for name, (mode, offset, length, pieces) in cases.items():
        with open(here / name, "wb") as file:
            fallocate(file.fileno(), mode, offset, length)
            for place, data in pieces.items():
                os.pwrite(file.fileno(), data, place)
    for name, mode in (("punched", FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE), ("zeroed", FALLOC_ZERO_RANGE)):
        with open(here / name, "wb") as file:
            file.write(pattern(name, 40 * block))
            os.fsync(file.fileno())
            fallocate(file.fileno(), mode, 10 * block + 1, 9 * block)


def fragmented(count: int) -> Populate:
    """A file of ``count`` one-block extents with holes between them."""

    def write(root: Path) -> None:
        block = block_size(root)
        with open(root / f"fragments-{count}", "wb") as file:
            for index in range(count):
                os.pwrite(file.fileno(), b"%08d" % index * (block // 8), 2 * index * block)

    return write


def indirect_edges(root: Path) -> None:
    """Blocks on both sides of each level of the indirect map, and at the largest size."""
    block = block_size(root)
    per = block // 4
    levels = (12, 12 + per, 12 + per + per**2)
    places = [0, *(edge + step for edge in levels for step in (-1, 0, 1)), levels[1] + 5 * per + 3]
    limit = 12 + per + per**2 + per**3
    sparse_file(root / "levels", {place * block: pattern(f"level{place}", block) for place in places})
    largest = min(limit, 2**32 * 512 // block - per) if block > 1024 else limit
    try:
        sparse_file(root / "largest", {(largest - 2) * block: pattern("last", block)})
    except OSError:
        sparse_file(root / "large", {(levels[2] + 3 * per**2) * block: pattern("last", block)})


def largest_file(root: Path) -> None:
    """The largest size that extents can address, with data at both ends."""
    block = block_size(root)
    sparse_file(root / "largest", {0: b"begin", (2**32 - 2) * block: pattern("last", block - 1)})
    sparse_file(root / "largest-hole", {}, (2**32 - 1) * block)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL as the value of its extended attribute, from ``(tag, permissions, id)``."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def acls(root: Path) -> None:
    """Access and default ACLs, short and long, on files and directories."""
    here = folder(root, "acls")
    users = [(ACL_USER_OBJ, 6, NOBODY_ID), (ACL_USER, 4, 1001)]
    groups = [(ACL_GROUP_OBJ, 4, NOBODY_ID), (ACL_GROUP, 6, 70_000)]
    others = [(ACL_MASK, 6, NOBODY_ID), (ACL_OTHER, 0, NOBODY_ID)]
    short = acl(*users, *groups, *others)
    long = acl(*users, *((ACL_USER, uid % 8, uid) for uid in range(2000, 2030)), *groups, *others)
    (here / "plain").write_bytes(b"no acl")
    (here / "file").write_bytes(b"acl")
    os.setxattr(here / "file", "system.posix_acl_access", short)
    directory = folder(here, "dir")
    os.setxattr(directory, "system.posix_acl_default", short)
    os.setxattr(directory, "system.posix_acl_access", long)
    (directory / "inherits").write_bytes(b"inherited")
    (directory / "inherits-dir").mkdir()


def xattrs(root: Path) -> None:
    """Attributes in the inode and in the attribute block, in all namespaces, on all types of file."""
    here = folder(root, "xattrs")
    for name in ("small", "many", "block", "empty-value", "shared-1", "shared-2"):
        (here / name).write_bytes(name.encode())
    os.setxattr(here / "small", "user.a", b"1")
    os.setxattr(here / "empty-value", "user.empty", b"")
    for index in range(20):
        os.setxattr(here / "many", f"user.attribute-{index:02}", pattern(f"x{index}", index))
    os.setxattr(here / "block", "user.large", pattern("large", min(block_size(root) // 2, 1500)))
    for name in ("shared-1", "shared-2"):
        os.setxattr(here / name, "user.shared", pattern("shared", 600))
    os.setxattr(here / "small", "trusted.t", b"\0\xff")
    os.setxattr(here / "small", "security.s", b"label")
    os.setxattr(here / "small", "security.capability", struct.pack("<IIIII", 0x02000001, 0x2000, 0, 0, 0))
    os.setxattr(here / "small", b"user.\xc3\xa9" + b"n" * 240, b"long name")
    os.symlink("target", here / "symlink")
    os.setxattr(here / "symlink", "trusted.link", b"on a link", follow_symlinks=False)
    os.mkfifo(here / "fifo")
    os.setxattr(here / "fifo", "trusted.fifo", b"on a fifo")
    os.setxattr(here, "user.directory", b"on a directory")


def ea_inodes(root: Path) -> None:
    """Values in inodes of their own, up to the largest; two files share one value."""
    here = folder(root, "ea-inode")
    for size in (3000, 4097, 20_000, 65_536):
        (here / f"v{size}").write_bytes(b"x")
        os.setxattr(here / f"v{size}", "user.value", pattern(f"ea{size}", size))
    for name in ("same-1", "same-2"):
        (here / name).write_bytes(b"x")
        os.setxattr(here / name, "user.same", pattern("same", 9000))
        os.setxattr(here / name, "user.second", pattern(name, 5000))


def inline_data(root: Path) -> None:
    """Files and directories inside the inode, at every size around where they leave it."""
    here = folder(root, "inline")
    for size in (0, 1, 59, 60, 61, 100, 131, 132, 133, 150, 160, 161, 200, 400, 700, 900):
        (here / f"f{size}").write_bytes(pattern(f"inline{size}", size))
    for count in (0, 1, 3, 5, 8, 12, 20):
        directory = folder(here, f"d{count}")
        for index in range(count):
            (directory / f"e{index}").write_bytes(b"")
    directory = folder(here, "subdirs")
    for index in range(3):
        (directory / f"s{index}").mkdir()
    for size in (10, 60, 100):
        path = here / f"with-xattr-{size}"
        path.write_bytes(pattern(f"wx{size}", size))
        os.setxattr(path, "user.beside", b"x" * 40)
        os.setxattr(path, "user.block", b"y" * 300)
    os.symlink("i" * 100, here / "symlink")
    sparse_file(here / "hole", {}, 100)
    sparse_file(here / "hole-then-data", {80: b"x"})


INODE_FLAGS = {
    "secure-delete": 0x1,
    "undelete": 0x2,
    "sync": 0x8,
    "immutable": 0x10,
    "append": 0x20,
    "nodump": 0x40,
    "noatime": 0x80,
    "notail": 0x8000,
    "several": 0x8 | 0x40 | 0x80,
}


def inode_flags(root: Path) -> None:
    """Each flag that chattr can set, on files and on directories."""
    here = folder(root, "flags")
    for name, flags in INODE_FLAGS.items():
        (here / name).write_bytes(name.encode())
        set_flags(here / name, flags)
    for name, flags in {"dir-sync": 0x10000, "dir-top": 0x20000, "dir-append": 0x20, "dir-nodump": 0x40}.items():
        set_flags(folder(here, name), flags)


def set_flags(path: Path, flags: int) -> None:
    """Add ``flags`` to those that the inode has."""
    fd = os.open(path, os.O_RDONLY)
    try:
        (present,) = struct.unpack("<I", fcntl.ioctl(fd, 0x80086601, bytes(4)))
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("<Q", present | flags))
    finally:
        os.close(fd)


def project_files(root: Path) -> None:
    """Files that get project ids from debugfs: a kernel without quota formats cannot write them."""
    here = folder(root, "projects")
    (folder(here, "inherit") / "child").write_bytes(b"inherits")
    for project in PROJECTS:
        (here / f"p{project}").write_bytes(b"p")


PROJECTS = (1, 65536, 4_294_967_294)


def hashed(count: int, length: int = 12) -> Populate:
    """A directory of ``count`` names (links to one file) with ASCII and high bytes: an index of several levels."""

    def write(root: Path) -> None:
        here = os.fsencode(folder(root, f"hashed-{count}"))
        target = here + b"/0"
        with open(target, "wb") as file:
            file.write(b"one file")
        for index in range(1, count):
            stem = b"%x-" % (index * 2654435761 % 2**32)
            name = stem + (b"\xe9\x80" if index % 3 else b"z") * length
            os.link(target, here + b"/" + name[: max(length, len(stem))])

    return write


def deep_directories(root: Path) -> None:
    """A path longer than PATH_MAX, made step by step."""
    fd = os.open(root, os.O_RDONLY)
    for level in range(25):
        name = f"{level:02}" + "d" * 200
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def spread(count: int) -> Populate:
    """``count`` top-level directories, which the allocator puts into different groups, with a file each."""

    def write(root: Path) -> None:
        for index in range(count):
            directory = folder(root, f"spread-{index:03}")
            (directory / "file").write_bytes(pattern(f"spread{index}", 5000))

    return write
