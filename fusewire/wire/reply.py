"""Values → reply bytes. Source: <linux/fuse.h>.

A reply is one writev: a 16-byte header, then the body. What is small is packed together with its header by one Struct;
data follow as a buffer of their own and are never copied. Fixed-size replies must have exactly the size that the kernel
expects, or the caller gets EIO; the functions here can make no other.

Attributes are packed once, by `pack_attr` (88 bytes), and may be kept beside the inode; the replies take those bytes.
Validity is given as whole seconds and nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

from fusewire import uapi

Buffer = bytes | bytearray | memoryview
Pieces = tuple[Buffer, ...]
"""What one writev sends."""

Packer = Callable[..., bytes]

HEADER_SIZE: Final[int] = uapi.out_header.size
FOREVER: Final = (1 << 32) - 1
"""Seconds of validity that outlast every mount (136 years), and no arithmetic in the kernel."""

_HEADER: Final = uapi.out_header.struct.format
_EIO: Final = 5


def _with_header(layout: str) -> Struct:
    """Header and body in one Struct. Every record of the protocol is naturally aligned, so '=' adds nothing."""
    return Struct(_HEADER + layout.removeprefix("="))


_pack_header: Packer = uapi.out_header.struct.pack

_ENTRY_HEAD = "QQQQII"  # nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec
_ATTR_SIZE: Final[int] = uapi.attr.size
_ENTRY_SIZE: Final[int] = uapi.entry_out.size

pack_attr: Packer = uapi.attr.struct.pack
"""fuse_attr (88 bytes) from all its fields in order: ino, size, blocks [512 B], atime, mtime, ctime [s], atimensec,
mtimensec, ctimensec, mode, nlink, uid, gid, rdev (as the kernel's new_encode_dev), blksize, flags."""

pack_statx: Packer = uapi.statx.struct.pack
"""fuse_statx (256 bytes) from its fields without spares, as `uapi.statx.fields` lists them."""

pack_entry_reply = _with_header(uapi.entry_out.struct.format).pack
"""A whole LOOKUP reply from all of its fields at once: 144, 0, unique, six of the entry, sixteen of the attributes."""

pack_attr_reply = _with_header(uapi.attr_out.struct.format).pack
"""A whole GETATTR reply likewise: 120, 0, unique, attr_valid, attr_valid_nsec, sixteen of the attributes."""

_pack_entry = Struct(f"={_ENTRY_HEAD}{_ATTR_SIZE}s").pack
_pack_reply_entry = _with_header(f"{_ENTRY_HEAD}{_ATTR_SIZE}s").pack
_pack_reply_attr = _with_header(f"QI4x{_ATTR_SIZE}s").pack
_pack_reply_create = _with_header(f"{_ENTRY_SIZE}s" + uapi.open_out.struct.format.removeprefix("=")).pack
_pack_reply_open = _with_header(uapi.open_out.struct.format).pack
_pack_reply_write = _with_header(uapi.write_out.struct.format).pack
_pack_reply_statfs = _with_header(uapi.statfs_out.struct.format).pack
_pack_reply_xattr_size = _with_header(uapi.getxattr_out.struct.format).pack
_pack_reply_lseek = _with_header(uapi.lseek_out.struct.format).pack
_pack_reply_statx = _with_header(f"QII16x{uapi.statx.size}s").pack
_pack_reply_ioctl = _with_header(uapi.ioctl_out.struct.format).pack
_pack_reply_poll = _with_header(uapi.poll_out.struct.format).pack
_pack_reply_lock = _with_header(uapi.lk_out.struct.format).pack

_NO_ATTR: Final = bytes(_ATTR_SIZE)


def header(unique: int, length: int, error: int = 0) -> bytes:
    """The header of a reply with `length` bytes of body. `error` is 0 or a negative errno."""
    return _pack_header(HEADER_SIZE + length, error, unique)


def reply_empty(unique: int) -> bytes:
    """Success without a body."""
    return _pack_header(HEADER_SIZE, 0, unique)


def reply_error(unique: int, errno: int) -> bytes:
    """Failure with this (positive) errno. One that the kernel would refuse to take becomes EIO."""
    # Refused means that the request stays pending and its caller hangs: -512 and beyond are the kernel's own codes.
    if not 0 < errno < 512:
        errno = _EIO
    return _pack_header(HEADER_SIZE, -errno, unique)


def reply_data(unique: int, data: Buffer) -> Pieces:
    """READ, READLINK, READDIR, GETXATTR, LISTXATTR: the bytes, uncopied."""
    return (_pack_header(HEADER_SIZE + len(data), 0, unique), data)


def pack_entry(
    nodeid: int, generation: int, entry_valid: int, entry_nsec: int, attr_valid: int, attr_nsec: int, attr: Buffer
) -> bytes:
    """fuse_entry_out (128 bytes): the beginning of a CREATE reply and of a READDIRPLUS entry."""
    return _pack_entry(nodeid, generation, entry_valid, attr_valid, entry_nsec, attr_nsec, attr)


def reply_entry(
    unique: int,
    nodeid: int,
    generation: int,
    entry_valid: int,
    entry_nsec: int,
    attr_valid: int,
    attr_nsec: int,
    attr: Buffer,
) -> bytes:
    """LOOKUP, MKNOD, MKDIR, SYMLINK, LINK: the node, which the kernel now holds once more."""
    return _pack_reply_entry(144, 0, unique, nodeid, generation, entry_valid, attr_valid, entry_nsec, attr_nsec, attr)


def reply_negative(unique: int, entry_valid: int, entry_nsec: int = 0) -> bytes:
    """LOOKUP: there is no such name, and the kernel may remember that for so long."""
    return _pack_reply_entry(144, 0, unique, 0, 0, entry_valid, 0, entry_nsec, 0, _NO_ATTR)


def reply_attr(unique: int, attr_valid: int, attr_nsec: int, attr: Buffer) -> bytes:
    """GETATTR, SETATTR."""
    return _pack_reply_attr(120, 0, unique, attr_valid, attr_nsec, attr)


def reply_statx(unique: int, attr_valid: int, attr_nsec: int, statx: Buffer, flags: int = 0) -> bytes:
    """STATX; `statx` is what `pack_statx` made."""
    return _pack_reply_statx(304, 0, unique, attr_valid, attr_nsec, flags, statx)


def reply_create(unique: int, entry: Buffer, fh: int, open_flags: int, backing_id: int = 0) -> bytes:
    """CREATE, TMPFILE; `entry` is what `pack_entry` made."""
    return _pack_reply_create(160, 0, unique, entry, fh, open_flags, backing_id)


def reply_open(unique: int, fh: int, open_flags: int, backing_id: int = 0) -> bytes:
    """OPEN, OPENDIR; flags are FOPEN_*."""
    return _pack_reply_open(32, 0, unique, fh, open_flags, backing_id)


def reply_write(unique: int, size: int) -> bytes:
    """WRITE, COPY_FILE_RANGE: so many bytes were written."""
    return _pack_reply_write(24, 0, unique, size)


def reply_statfs(
    unique: int,
    blocks: int,
    bfree: int,
    bavail: int,
    files: int,
    ffree: int,
    bsize: int,
    namelen: int,
    frsize: int,
) -> bytes:
    """STATFS: counts in units of `frsize` bytes."""
    return _pack_reply_statfs(96, 0, unique, blocks, bfree, bavail, files, ffree, bsize, namelen, frsize)


def reply_xattr_size(unique: int, size: int) -> bytes:
    """GETXATTR, LISTXATTR that asked with size 0: the bytes needed."""
    return _pack_reply_xattr_size(24, 0, unique, size)


def reply_lseek(unique: int, offset: int) -> bytes:
    """LSEEK: the byte offset found. BMAP and COPY_FILE_RANGE_64 have the same reply."""
    return _pack_reply_lseek(24, 0, unique, offset)


reply_block = reply_lseek
"""BMAP: the device block, 0 for a hole."""

reply_copied = reply_lseek
"""COPY_FILE_RANGE_64: so many bytes were copied."""


def reply_ioctl(unique: int, result: int, data: Buffer = b"", flags: int = 0) -> Pieces:
    """IOCTL: the call's result and what it writes to the caller's memory. A retry has its iovecs in `data`."""
    head = _pack_reply_ioctl(HEADER_SIZE + uapi.ioctl_out.size + len(data), 0, unique, result, flags, 0, 0)
    return (head, data) if data else (head,)


def reply_poll(unique: int, revents: int) -> bytes:
    """POLL."""
    return _pack_reply_poll(24, 0, unique, revents)


def reply_lock(unique: int, start: int, end: int, type_: int, pid: int) -> bytes:
    """GETLK: the lock in the way, or type F_UNLCK."""
    return _pack_reply_lock(40, 0, unique, start, end, type_, pid)


# ---- directory entries ------------------------------------------------------------------------------------------

_pack_dirent: Packer = uapi.dirent.struct.pack
_pack_direntplus = Struct(f"={_ENTRY_SIZE}s" + uapi.dirent.struct.format.removeprefix("=")).pack
_PAD: Final = tuple(bytes(-length % 8) for length in range(8))

DIRENT_SIZE: Final[int] = uapi.dirent.size
DIRENTPLUS_SIZE: Final[int] = uapi.direntplus.size


def dirent(ino: int, next_offset: int, name: bytes, type_: int) -> bytes:
    """One READDIR entry, padded to 8 bytes. `next_offset` resumes behind it; `type_` is DT_*."""
    length = len(name)
    return _pack_dirent(ino, next_offset, length, type_) + name + _PAD[length & 7]


def direntplus(entry: Buffer, ino: int, next_offset: int, name: bytes, type_: int) -> bytes:
    """One READDIRPLUS entry. With node 0 in `entry` the kernel takes no reference, as for "." and ".."."""
    length = len(name)
    return _pack_direntplus(entry, ino, next_offset, length, type_) + name + _PAD[length & 7]


NO_ENTRY: Final = bytes(_ENTRY_SIZE)
"""The `entry` of a READDIRPLUS entry that gives a name only."""


def dirent_size(name_length: int) -> int:
    """Bytes that `dirent` takes for a name of so many."""
    return DIRENT_SIZE + name_length + (-name_length % 8)


def direntplus_size(name_length: int) -> int:
    """Bytes that `direntplus` takes for a name of so many."""
    return DIRENTPLUS_SIZE + name_length + (-name_length % 8)
