"""Everything a program can ask about a file tree, as sorted text: the differential tests compare two such texts.

One line per name. Fields are ``key=value`` separated by tabs, bytes are escaped, and an error is a value
(``data=errno=ENOKEY``), so two mounts of one image must give the same lines. Nothing is left out here: what a
comparison does not look at is listed with its reason in the test that compares.

Only the first name of a hard-linked inode shows the contents, later ones show ``link=PATH`` beside their attributes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)

AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_STATX_FORCE_SYNC = 0x2000
STATX_BASIC_AND_BTIME = 0xFFF
SYS_GETDENTS64 = {"x86_64": 217, "aarch64": 61}[os.uname().machine]

FS_IOC_GETFLAGS = 0x80086601
FS_IOC_GETVERSION = 0x80087601
FS_IOC_FSGETXATTR = 0x801C581F

ZERO_BLOCK = bytes(4096)
READ_BYTES = 1 << 20
SHOWN_RUNS = 16
DIRENT_TYPES = {0: "?", 1: "p", 2: "c", 4: "d", 6: "b", 8: "f", 10: "l", 12: "s"}

Fields = dict[str, str]


@dataclass(frozen=True)
class Limits:
    """How far a walk goes: hostile images need an end, ordinary ones do not reach it."""

    entries: int = 1 << 22
    names: int = 1 << 20
    depth: int = 200
    file_bytes: int = 1 << 34
    runs: int = 1 << 20


@dataclass
class Walk:
    """The state of one walk: its limits, and which inodes have shown their contents."""

    limits: Limits
    seen: dict[int, str] = field(default_factory=dict)
    entries: int = 0


def escape(name: bytes) -> str:
    """``name`` as printable ASCII without blanks; distinct bytes give distinct text."""
    return "".join(chr(byte) if 0x21 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}" for byte in name)


def errno_name(error: OSError) -> str:
    return f"errno={errno.errorcode.get(error.errno or 0, error.errno)}"


def attempt(query: Callable[[], str]) -> str:
    """The answer of ``query``, or its errno as text."""
    try:
        return query()
    except OSError as error:
        return errno_name(error)


# --- statx, getdents and statfs, which Python does not show whole -----------------------------------------------------


@dataclass(frozen=True)
class Statx:
    """The fields of ``struct statx`` (linux/stat.h) that do not name the mount; times in nanoseconds."""

    mask: int
    blksize: int
    attributes: int
    attributes_mask: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    atime: int
    btime: int
    ctime: int
    mtime: int
    rdev: tuple[int, int]

    @classmethod
    def unpack(cls, raw: bytes) -> Statx:
        mask, blksize, attributes, nlink, uid, gid, mode, ino, size, blocks, attributes_mask = struct.unpack_from(
            "<IIQIIIH2xQQQQ", raw
        )
        times = [sec * 10**9 + nsec for sec, nsec in struct.iter_unpack("<qI4x", raw[64:128])]
        atime, btime, ctime, mtime = times
        rdev = struct.unpack_from("<II", raw, 128)
        common = (mask, blksize, attributes, attributes_mask, nlink, uid, gid, mode, ino, size, blocks)
        return cls(*common, atime, btime, ctime, mtime, rdev)


def statx(
    path: bytes, dir_fd: int = -100, flags: int = AT_SYMLINK_NOFOLLOW, mask: int = STATX_BASIC_AND_BTIME
) -> Statx:
    """What statx(2) says of ``path``; raises OSError."""
    buffer = ctypes.create_string_buffer(256)
    if LIBC.statx(dir_fd, path, flags, mask, buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return Statx.unpack(buffer.raw)


def getdents(fd: int, buffer_bytes: int = 65536) -> list[tuple[int, int, int, bytes]]:
    """The next directory entries of ``fd`` as ``(ino, off, type, name)``; an empty list at the end."""
    buffer = ctypes.create_string_buffer(buffer_bytes)
    count = LIBC.syscall(SYS_GETDENTS64, fd, buffer, buffer_bytes)
    if count < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    entries, raw, position = [], buffer.raw[:count], 0
    while position < count:
        ino, off, length, kind = struct.unpack_from("<QqHB", raw, position)
        entries.append((ino, off, kind, raw[position + 19 : position + length].split(b"\0", 1)[0]))
        position += length
    return entries


def statfs_fields(root: Path) -> Fields:
    """Every field of statfs(2) of the mount at ``root``."""
    buffer = ctypes.create_string_buffer(120)
    if LIBC.statfs(os.fsencode(root), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), root)
    names = ("type", "bsize", "blocks", "bfree", "bavail", "files", "ffree", "fsid", "namelen", "frsize", "flags")
    return {name: str(value) for name, value in zip(names, struct.unpack_from("<qqQQQQQQqqq", buffer.raw), strict=True)}


# --- what one file holds ----------------------------------------------------------------------------------------------


def data_runs(fd: int, size: int, limit: int) -> Iterator[tuple[int, int]]:
    """The ``(start, end)`` ranges that SEEK_DATA and SEEK_HOLE report, at most ``limit`` of them."""
    position = 0
    for _ in range(limit):
        if position >= size:
            return
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        if position <= start:
            raise OSError(errno.ELOOP, "SEEK_HOLE does not advance")
        yield start, position


def hash_range(fd: int, start: int, end: int, digest: hashlib._Hash) -> None:
    """Each 4 KiB of the file in ``[start, end)`` (multiples of 4096) that is not all zero goes into ``digest``."""
    position = start
    while position < end:
        data = os.pread(fd, min(READ_BYTES, end - position), position)
        if not data:
            return
        if data.count(0) != len(data):
            for offset in range(0, len(data), 4096):
                block = data[offset : offset + 4096]
                if block != ZERO_BLOCK[: len(block)]:
                    digest.update(struct.pack("<Q", position + offset) + block)
        position += len(data)


def ranges_to_read(runs: list[tuple[int, int]], size: int, budget: int) -> list[tuple[int, int]]:
    """Ranges in multiples of 4096, in order and apart: the data and both ends of each hole, ``budget`` bytes in all."""
    pieces = runs + [edge for start, end in holes(runs, size) for edge in ((start, start + 1), (end - 1, end))]
    merged: list[tuple[int, int]] = []
    for start, end in sorted((start & -4096, -(-end // 4096) * 4096) for start, end in pieces):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    kept = []
    for start, end in merged:
        kept.append((start, min(end, start + budget)))
        budget -= end - start
        if budget <= 0:
            break
    return kept


def content_fields(fd: int, size: int, limits: Limits) -> Fields:
    """``map``: data ranges, asked first (pages read into an unwritten extent become data to SEEK_DATA of ext4);
    ``data``: hash of what is not zero.
    """
    digest = hashlib.sha256()
    try:
        runs = list(data_runs(fd, size, limits.runs))
        for start, end in ranges_to_read(runs, size, limits.file_bytes):
            hash_range(fd, start, end, digest)
    except OSError as error:
        return {"data": errno_name(error)}
    return {"map": runs_text(runs), "data": digest.hexdigest()[:32]}


def holes(runs: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The ranges of ``[0, size)`` between the data ``runs``."""
    edges = [0, *(edge for run in runs for edge in run), size]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def runs_text(runs: list[tuple[int, int]]) -> str:
    """The ranges themselves, or their number and a hash when there are many."""
    text = ",".join(f"{start}-{end}" for start, end in runs)
    if len(runs) <= SHOWN_RUNS:
        return text
    return f"{len(runs)}runs:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def value_text(value: bytes) -> str:
    return value.hex() if len(value) <= 64 else f"{len(value)}bytes:{hashlib.sha256(value).hexdigest()[:16]}"


def xattr_text(path: bytes) -> str:
    """All extended attributes of ``path``, sorted, with short values whole."""
    names = sorted(os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False))
    return ",".join(f"{escape(name)}:{attempt(partial(xattr_value, path, name))}" for name in names)


def xattr_value(path: bytes, name: bytes) -> str:
    return value_text(os.getxattr(path, name, follow_symlinks=False))


def acl_text(path: bytes, name: str) -> str:
    """A POSIX ACL asked for by name (a list of names need not show it), or ``-``."""
    try:
        return xattr_value(path, name.encode())
    except OSError as error:
        return "-" if error.errno in (errno.ENODATA, errno.EOPNOTSUPP) else errno_name(error)


def ioctl_fields(fd: int) -> Fields:
    """Inode flags, generation, and the words of ``struct fsxattr``."""

    def ask(number: int, size: int, layout: str) -> str:
        return attempt(
            lambda: ",".join(f"{word:x}" for word in struct.unpack(layout, fcntl.ioctl(fd, number, bytes(size))))
        )

    return {
        "flags": ask(FS_IOC_GETFLAGS, 4, "<I"),
        "generation": ask(FS_IOC_GETVERSION, 4, "<I"),
        "fsxattr": ask(FS_IOC_FSGETXATTR, 28, "<IIIII8x"),
    }


# --- the walk ---------------------------------------------------------------------------------------------------------


def stat_fields(found: Statx) -> Fields:
    """The fields of an inode that statx knows, as text."""
    return {
        "mode": f"{found.mode:o}",
        "ino": str(found.ino),
        "nlink": str(found.nlink),
        "uid": str(found.uid),
        "gid": str(found.gid),
        "size": str(found.size),
        "blocks": str(found.blocks),
        "blksize": str(found.blksize),
        "rdev": "{}:{}".format(*found.rdev),
        "atime": str(found.atime),
        "mtime": str(found.mtime),
        "ctime": str(found.ctime),
        "btime": str(found.btime) if found.mask & 0x800 else "-",
        "mask": f"{found.mask & STATX_BASIC_AND_BTIME:x}",
        "attributes": f"{found.attributes & ~0x2000:x}/{found.attributes_mask:x}",  # 0x2000: is a mount point
    }


def inode_fields(path: bytes, found: Statx, limits: Limits) -> Fields:
    """Everything about an inode that is not in its statx: xattrs, link target, flags, contents."""
    fields = {"xattrs": attempt(lambda: xattr_text(path))}
    for name in ("access", "default"):
        fields["acl_" + name] = acl_text(path, "system.posix_acl_" + name)
    if stat.S_ISLNK(found.mode):
        fields["target"] = attempt(lambda: escape(os.readlink(path)))
    if stat.S_ISREG(found.mode) or stat.S_ISDIR(found.mode):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            return fields | {"open": errno_name(error)}
        try:
            fields |= ioctl_fields(fd)
            if stat.S_ISREG(found.mode):
                fields |= content_fields(fd, found.size, limits)
        finally:
            os.close(fd)
    return fields


def entry_fields(state: Walk, path: bytes, shown: str) -> tuple[Fields, bool]:
    """All fields of the name at ``path``, and whether it is a directory to be walked."""
    try:
        found = statx(path)
    except OSError as error:
        return {"stat": errno_name(error)}, False
    fields = stat_fields(found)
    first = state.seen.setdefault(found.ino, shown)
    if first != shown:
        return fields | {"link": first}, False
    return fields | inode_fields(path, found, state.limits), stat.S_ISDIR(found.mode)


def read_directory(fd: int, limit: int) -> tuple[dict[bytes, tuple[int, int]], str]:
    """Names with their ``(ino, type)``, and ``ok``, or what went wrong after them."""
    found: dict[bytes, tuple[int, int]] = {}
    try:
        while entries := getdents(fd):
            for ino, _, kind, name in entries:
                if name in found:
                    return found, f"duplicate:{escape(name)}"
                found[name] = (ino, kind)
            if len(found) > limit:
                return found, "limit"
    except OSError as error:
        return found, errno_name(error)
    return found, "ok"


def entries(root: Path, limits: Limits = Limits()) -> Iterator[tuple[str, Fields]]:
    """``(path, fields)`` of each name below ``root``, itself first as ``.``, every directory in name order."""
    state = Walk(limits)
    fields, _ = entry_fields(state, os.fsencode(root), ".")
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield ".", fields
        yield from below(state, fd, b"", 0)
    finally:
        os.close(fd)


def below(state: Walk, fd: int, prefix: bytes, depth: int) -> Iterator[tuple[str, Fields]]:
    """The entries of the open directory ``fd`` and, each after its own line, of the directories in it."""
    names, outcome = read_directory(fd, state.limits.names)
    yield escape(prefix) + "/", {"names": str(len(names)), "listing": outcome, "dots": dots_text(names, depth)}
    for name in sorted(names.keys() - {b".", b".."}):
        state.entries += 1
        if state.entries > state.limits.entries:
            return
        ino, kind = names[name]
        shown = escape(prefix + b"/" + name)
        fields, is_directory = entry_fields(state, b"/proc/self/fd/%d/%b" % (fd, name), shown)
        yield shown, {"d_ino": str(ino), "d_type": DIRENT_TYPES.get(kind, str(kind))} | fields
        if is_directory and depth < state.limits.depth and "open" not in fields:
            yield from enter(state, fd, prefix, name, depth)


def enter(state: Walk, parent_fd: int, prefix: bytes, name: bytes, depth: int) -> Iterator[tuple[str, Fields]]:
    """What is below directory ``name``, or one line that says why it cannot be opened."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_fd)
    except OSError as error:
        yield escape(prefix + b"/" + name) + "/", {"listing": errno_name(error)}
        return
    try:
        yield from below(state, fd, prefix + b"/" + name, depth + 1)
    finally:
        os.close(fd)


def dots_text(names: Mapping[bytes, tuple[int, int]], depth: int) -> str:
    """Inode numbers that the listing gives for ``.`` and ``..``; the ``..`` of the root is the mount's own affair."""
    own, parent = names.get(b".", (0, 0)), names.get(b"..", (0, 0))
    return f"{own[0]}{DIRENT_TYPES.get(own[1])}," + (f"{parent[0]}{DIRENT_TYPES.get(parent[1])}" if depth else "root")


def line(path: str, fields: Mapping[str, str]) -> str:
    return "\t".join([path, *(f"{key}={value}" for key, value in fields.items())])


def walk(root: Path, limits: Limits = Limits()) -> Iterator[str]:
    """The tree at ``root`` as text, one line per name; the last line is its statfs."""
    for path, fields in entries(root, limits):
        yield line(path, fields)
    yield line("statfs", statfs_fields(root))


def differences(
    expected: Iterable[tuple[str, Fields]], found: Iterable[tuple[str, Fields]], ignored: Mapping[str, str]
) -> list[str]:
    """One line per name and field that differs; ``ignored`` maps each field not compared to the reason."""
    left, right = dict(expected), dict(found)
    lines = [f"missing: {path}" for path in left.keys() - right.keys()]
    lines += [f"unexpected: {path}" for path in right.keys() - left.keys()]
    for path in left.keys() & right.keys():
        for key in left[path].keys() | right[path].keys():
            wanted, got = left[path].get(key), right[path].get(key)
            if wanted != got and key not in ignored:
                lines.append(f"{path}: {key}: expected {wanted}, found {got}")
    return sorted(lines)


def main() -> None:
    """Print the walk of each directory named on the command line."""
    import sys  # noqa: PLC0415 - only for the command

    for root in sys.argv[1:]:
        for text in walk(Path(root)):
            print(text)


if __name__ == "__main__":
    main()
