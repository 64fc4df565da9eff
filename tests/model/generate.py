"""Random sequences of operations from a seed.

A sketch of the tree is kept while a sequence is made, only to hit what probably exists more often than not.
"""

from __future__ import annotations

import os
import random
import stat
import struct

from tests.model.side import Operation

NAMES = [b"a", b"b", b"c", b"file-%d" % 17, b"\xc3\xa4\xff", b"n" * 40, b"long-" + b"x" * 200, b"y" * 255]
SLOTS = 5
USERS = (1000, 1001)
GROUPS = (0, 100, 1000, 1001)
PERMISSIONS = (0o644, 0o600, 0o666, 0o755, 0o777, 0o700, 0o4755, 0o2755, 0o6777, 0o2644, 0o1777, 0o2777, 0o000)
KINDS = (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFREG)
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT = 1, 2, 8, 16, 32
FALLOCATE_MODES = (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE)
XATTRS = (b"user.a", b"user.b", b"user.a-longer-name", b"trusted.t", b"security.s", b"user.", b"bad.x")
VALUE_LENGTHS = (0, 1, 3, 4, 20, 40, 60, 100, 300, 900, 2000, 3900, 4100)
OLD_TIMES = (0, 1, 10**9 + 5, 123456789_987654321, 2**31 * 10**9 - 1, 2**31 * 10**9 + 7, -1, -(2**31) * 10**9,
             2**33 * 10**9 + 123, 15032385535 * 10**9)
ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An access control list as setxattr(2) takes it, of (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
ACLS = (
    acl((1, 6, NOBODY), (4, 4, NOBODY), (32, 0, NOBODY)),
    acl((1, 7, NOBODY), (2, 6, 1000), (4, 5, NOBODY), (16, 7, NOBODY), (32, 1, NOBODY)),
    acl((1, 7, NOBODY), (2, 0, 1001), (4, 0, NOBODY), (8, 7, 100), (16, 3, NOBODY), (32, 5, NOBODY)),
    acl((1, 7, NOBODY), (2, 7, 1000), (2, 5, 1001), (4, 7, NOBODY), (8, 4, 1000), (16, 6, NOBODY), (32, 0, NOBODY)),
)


class Generator:
    """Makes operations; ``reach`` is about how large files become, in bytes."""

    def __init__(self, seed: int, reach: int = 300_000, weights: dict[str, int] | None = None) -> None:
        self.random = random.Random(seed)
        self.reach = reach
        self.folders: list[bytes] = [b""]
        self.files: list[bytes] = []
        table: dict[str, int] = WEIGHTS | (weights or {})
        self.kinds = [name for name, weight in table.items() if weight]
        self.weights = [table[name] for name in self.kinds]

    def sequence(self, length: int) -> list[Operation]:
        return [self.operation() for _ in range(length)]

    def operation(self) -> Operation:
        kind = self.random.choices(self.kinds, self.weights)[0]
        made: Operation = getattr(self, "make_" + kind)()
        return made

    # --- choices ------------------------------------------------------------------------------------------------------

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def new_path(self) -> bytes:
        folder = self.random.choice(self.folders)
        if folder.count(b"/") > 3:
            folder = b""
        name = self.random.choice(NAMES) + (b"%d" % self.random.randrange(6) if self.chance(0.6) else b"")
        return (folder + b"/" + name if folder else name) if len(name) < 256 or self.chance(0.1) else b"q"

    def folder(self) -> bytes:
        return self.random.choice(self.folders) or b"."

    def file(self) -> bytes:
        if self.files and self.chance(0.9):
            return self.random.choice(self.files)
        return self.new_path()

    def anything(self) -> bytes:
        return self.folder() if self.chance(0.25) else self.file()

    def slot(self) -> int:
        return self.random.randrange(SLOTS)

    def mode(self) -> int:
        return self.random.choice(PERMISSIONS)

    def seed(self) -> int:
        return self.random.randrange(1 << 16)

    def offset(self) -> int:
        """Mostly inside the usual reach, often at the edge of a block, now and then far away."""
        choice = self.random.random()
        if choice < 0.08:
            return self.random.choice((1 << 20, (12 << 12) + 5, (1 << 28) - 3, (1 << 32) - 1, 1 << 33))
        if choice < 0.5:
            edge = self.random.randrange(self.reach // 1024 + 1) * 1024
            return max(edge + self.random.choice((-1, 0, 0, 0, 1, 512)), 0)
        return self.random.randrange(self.reach)

    def length(self) -> int:
        return self.random.choice((1, 10, 511, 512, 1024, 4096, 4097, 8192, 20_000, self.random.randrange(1, 70_000)))

    def known(self, path: bytes, folder: bool = False) -> bytes:
        (self.folders if folder else self.files).append(path)
        if len(self.files) > 40:
            self.files.pop(self.random.randrange(len(self.files)))
        if len(self.folders) > 12:
            self.folders.pop(self.random.randrange(1, len(self.folders)))
        return path

    # --- names --------------------------------------------------------------------------------------------------------

    def make_create(self) -> Operation:
        return "create", self.known(self.new_path()), self.mode()

    def make_burst(self) -> Operation:
        prefix = self.random.choice((b"burst-", b"l" * 120 + b"-"))
        return "create_many", self.folder(), prefix, self.random.randrange(10, 80)

    def make_thin(self) -> Operation:
        prefix = self.random.choice((b"burst-", b"l" * 120 + b"-"))
        return "unlink_many", self.folder(), prefix, 80, self.random.choice((1, 1, 2, 3))

    def make_mkdir(self) -> Operation:
        return "mkdir", self.known(self.new_path(), folder=True), self.mode()

    def make_rmdir(self) -> Operation:
        return "rmdir", self.random.choice(self.folders[1:] or [self.new_path()]) if self.chance(0.8) else self.file()

    def make_mknod(self) -> Operation:
        numbers = (self.random.choice((0, 1, 255, 256, 4095)), self.random.choice((0, 3, 255, 256, 1048575)))
        return "mknod", self.known(self.new_path()), self.random.choice(KINDS) | self.mode() & 0o777, *numbers

    def make_symlink(self) -> Operation:
        length = self.random.choice((1, 5, 30, 59, 60, 61, 200, 1000, 1023, 1024, 2047, 4095))
        return "symlink", self.known(self.new_path()), b"t" * length

    def make_readlink(self) -> Operation:
        return "readlink", self.file()

    def make_link(self) -> Operation:
        return "link", self.anything(), self.known(self.new_path())

    def make_unlink(self) -> Operation:
        return "unlink", self.file() if self.chance(0.95) else self.folder()

    def make_rename(self) -> Operation:
        flags = self.random.choice((0, 0, 0, 0, 1, 2, 2, 4, 3, 5))
        old = self.anything()
        new = self.anything() if self.chance(0.5) else self.new_path()
        if old in self.folders:
            self.known(new, folder=True)
        else:
            self.known(new)
        return "rename", old, new, flags

    def make_listdir(self) -> Operation:
        return "listdir", self.folder()

    def make_stat(self) -> Operation:
        return "stat", self.anything()

    # --- open files ---------------------------------------------------------------------------------------------------

    def make_open(self) -> Operation:
        flags = self.random.choice((os.O_RDWR, os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_TRUNC,
                                    os.O_RDWR | os.O_CREAT | os.O_APPEND, os.O_RDONLY, os.O_WRONLY | os.O_CREAT,
                                    os.O_RDWR | os.O_CREAT | os.O_EXCL, os.O_RDWR | os.O_SYNC | os.O_CREAT))
        path = self.file()
        return "open", self.slot(), self.known(path) if flags & os.O_CREAT else path, flags, self.mode() | 0o600

    def make_tmpfile(self) -> Operation:
        return "tmpfile", self.slot(), self.folder(), self.mode()

    def make_close(self) -> Operation:
        return "close", self.slot()

    def make_link_slot(self) -> Operation:
        return "link_slot", self.slot(), self.known(self.new_path())

    def make_fstat(self) -> Operation:
        return "fstat", self.slot()

    def make_write(self) -> Operation:
        return "write", self.slot(), self.length(), self.seed()

    def make_pwrite(self) -> Operation:
        return "pwrite", self.slot(), self.offset(), self.length(), self.seed()

    def make_pread(self) -> Operation:
        return "pread", self.slot(), self.offset(), self.length()

    def make_map_write(self) -> Operation:
        return "map_write", self.slot(), self.random.randrange(self.reach), self.length(), self.seed()

    def make_ftruncate(self) -> Operation:
        return "ftruncate", self.slot(), self.offset()

    def make_fallocate(self) -> Operation:
        mode = self.random.choice(FALLOCATE_MODES) if self.chance(0.95) else self.random.randrange(64)
        offset = self.random.randrange(self.reach) if not mode & PUNCH_HOLE else self.offset()
        length = self.length() if self.chance(0.7) else self.random.randrange(self.reach)
        if mode & (COLLAPSE | INSERT):  # not with FUSE; where ext4 can do it, the answers must differ
            offset, length, mode = offset | 1, length | 1, mode & ~(COLLAPSE | INSERT) | 64
        return "fallocate", self.slot(), mode, offset, length

    def make_copy_range(self) -> Operation:
        return "copy_range", self.slot(), self.slot(), self.offset(), self.offset(), self.length()

    def make_fsync(self) -> Operation:
        return self.random.choice(("fsync", "fdatasync", "forget_pages")), self.slot()

    def make_syncfs(self) -> Operation:
        return ("syncfs",)

    # --- files by name ------------------------------------------------------------------------------------------------

    def make_write_file(self) -> Operation:
        return "write_file", self.file(), self.offset(), self.length(), self.seed()

    def make_fill_file(self) -> Operation:
        length = self.random.choice((3000, 50_000, 300_000, 1_000_000, 3_000_000))
        return "fill_file", self.file(), self.random.choice((0, 0, 4096, 100_000, 1_000_000)), length, self.seed() % 8

    def make_fill_room(self) -> Operation:
        """Without KEEP_SIZE: ext4 gives up what is reserved behind the end of a file when a write does not fit."""
        length = self.random.choice((5000, 300_000, 2_000_000, 6_000_000, 50_000_000))
        return "fill_room", self.file(), 0, self.random.randrange(2_000_000), length

    def make_write_direct(self) -> Operation:
        return "write_direct", self.file(), self.offset() // 4096, self.random.randrange(1, 20), self.seed()

    def make_read_file(self) -> Operation:
        return "read_file", self.file()

    def make_runs(self) -> Operation:
        return "runs", self.file()

    def make_truncate(self) -> Operation:
        return "truncate", self.file(), self.offset()

    # --- attributes ---------------------------------------------------------------------------------------------------

    def make_chmod(self) -> Operation:
        return "chmod", self.anything(), self.mode()

    def make_chown(self) -> Operation:
        owner = self.random.choice((-1, 0, *USERS, 70000))
        return "chown", self.anything(), owner, self.random.choice((-1, *GROUPS, 99999))

    def make_utimens(self) -> Operation:
        return "utimens", self.anything(), self.random.choice(OLD_TIMES), self.random.choice(OLD_TIMES)

    def make_touch(self) -> Operation:
        return "touch", self.anything()

    def make_setxattr(self) -> Operation:
        flags = self.random.choice((0, 0, 0, os.XATTR_CREATE, os.XATTR_REPLACE))
        length = self.random.choice(VALUE_LENGTHS)
        return "setxattr", self.anything(), self.random.choice(XATTRS), length, self.random.randrange(4), flags

    def make_removexattr(self) -> Operation:
        return "removexattr", self.anything(), self.random.choice((*XATTRS, ACCESS, DEFAULT))

    def make_getxattr(self) -> Operation:
        return "getxattr", self.anything(), self.random.choice((*XATTRS, ACCESS, DEFAULT))

    def make_listxattr(self) -> Operation:
        return "listxattr", self.anything()

    def make_setacl(self) -> Operation:
        path = self.folder() if self.chance(0.5) else self.file()
        return "setacl", path, self.random.choice((ACCESS, DEFAULT)), self.random.choice(ACLS)

    def make_umask(self) -> Operation:
        return "umask", self.random.choice((0, 0o022, 0o077))

    def make_by(self) -> Operation:
        made = self.operation()
        while made[0] in ("by", "umask", "syncfs", "create_many", "unlink_many", "chattr"):
            made = self.operation()
        return "by", self.random.choice(USERS), made


WEIGHTS = {
    "create": 6, "burst": 2, "thin": 1, "mkdir": 5, "rmdir": 2, "mknod": 2, "symlink": 4, "readlink": 1, "link": 4,
    "unlink": 6, "rename": 8, "listdir": 3, "stat": 4,
    "open": 10, "tmpfile": 2, "close": 4, "link_slot": 2, "fstat": 3, "write": 4, "pwrite": 8, "pread": 5,
    "map_write": 4, "ftruncate": 3, "fallocate": 7, "copy_range": 3, "fsync": 3, "syncfs": 1,
    "write_file": 3, "fill_file": 0, "fill_room": 0, "write_direct": 3, "read_file": 4, "runs": 2, "truncate": 3,
    "chmod": 3, "chown": 3, "utimens": 2, "touch": 1, "setxattr": 5, "removexattr": 2, "getxattr": 1, "listxattr": 2,
    "setacl": 3, "umask": 1, "by": 8,
}
"""How often each kind of operation comes."""


def without(*kinds: str) -> dict[str, int]:
    """Weights that leave kinds out."""
    return dict.fromkeys(kinds, 0)


def only(weights: dict[str, int]) -> dict[str, int]:
    """Weights that leave everything else out."""
    return dict.fromkeys(WEIGHTS, 0) | weights

