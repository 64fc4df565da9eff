"""The ioctls that fusewire issues or answers: numbers, argument records, typed calls.

Sources: ``asm-generic/ioctl.h`` (encoding), ``linux/fuse.h``, ``linux/fs.h``, ``linux/loop.h``, ``linux/fscrypt.h``,
``linux/fsverity.h``, the kernel's ext4 documentation, and for the fuse iomap extension fuse-iomap.md 0.1, 1.4, 8.

A call raises the kernel's ``OSError``; where "not known to this kernel" (ENOTTY) is an ordinary answer, the docstring
says what is returned instead.
"""

import errno
import fcntl
import os
import platform
from ctypes import CDLL, c_int64, get_errno
from dataclasses import dataclass
from struct import Struct, calcsize

_libc = CDLL(None, use_errno=True)

# Encoding (asm-generic/ioctl.h): direction, size of the argument, magic, number.  A few machines have 13 size bits and
# other direction values (their asm/ioctl.h).
_OTHER = platform.machine().startswith(("mips", "ppc", "sparc", "alpha"))
_SIZE_BITS = 13 if _OTHER else 14
_NONE, _READ, _WRITE = (1, 2, 4) if _OTHER else (0, 2, 1)


def _ioc(direction: int, magic: int, number: int, size_bytes: int) -> int:
    return direction << (16 + _SIZE_BITS) | size_bytes << 16 | magic << 8 | number


def io(magic: int, number: int) -> int:
    """``_IO``: a request without an argument record."""
    return _ioc(_NONE, magic, number, 0)


def ior(magic: int, number: int, size_bytes: int) -> int:
    """``_IOR``: the kernel fills a record of so many bytes."""
    return _ioc(_READ, magic, number, size_bytes)


def iow(magic: int, number: int, size_bytes: int) -> int:
    """``_IOW``: the kernel reads a record of so many bytes."""
    return _ioc(_WRITE, magic, number, size_bytes)


def iowr(magic: int, number: int, size_bytes: int) -> int:
    """``_IOWR``: the kernel reads a record and writes it back."""
    return _ioc(_READ | _WRITE, magic, number, size_bytes)


def size_of(request: int) -> int:
    """Bytes of the argument record that a request's number announces."""
    return request >> 16 & ((1 << _SIZE_BITS) - 1)


def known(fd: int, request: int, argument: bytes | int = 0) -> bytes | int | None:
    """The result of an ioctl, or None where the kernel does not know it (ENOTTY)."""
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            return None
        raise


_INT = Struct("=i")
_U16 = Struct("=H")
_U32 = Struct("=I")
_U64 = Struct("=Q")
_U64_PAIR = Struct("=QQ")
_LONG_BYTES = calcsize("l")


# --- The FUSE device: linux/fuse.h ------------------------------------------------------------------------------------

_FUSE = 229
FUSE_DEV_IOC_CLONE = ior(_FUSE, 0, 4)
FUSE_DEV_IOC_BACKING_OPEN = iow(_FUSE, 1, 16)
FUSE_DEV_IOC_BACKING_CLOSE = iow(_FUSE, 2, 4)
FUSE_DEV_IOC_SYNC_INIT = io(_FUSE, 3)

BACKING_MAP = Struct("=iIQ")    # fuse_backing_map: fd, flags (low byte: BACKING_*), padding 0
BACKING_PASSTHROUGH = 0         # a regular file; the only kind that vanilla kernels know
BACKING_IOMAP = 1               # a block device


def sync_init(fd: int) -> bool:
    """True when the mount of this fd will wait until INIT is answered; False on kernels before 6.18.

    For a fd that is not mounted yet, and the last request to it: read, poll and most ioctls block until it is mounted.
    """
    try:
        fcntl.ioctl(fd, FUSE_DEV_IOC_SYNC_INIT)
    except OSError as error:
        # 5.15 to 6.17 know the magic but not the number: ENOTTY; a few stable trees answered EINVAL.
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return False
        raise
    return True


def clone(fresh_fd: int, mounted_fd: int) -> None:
    """Attach a newly opened ``/dev/fuse`` to the connection of a mounted one: a further queue of pending replies."""
    fcntl.ioctl(fresh_fd, FUSE_DEV_IOC_CLONE, _U32.pack(mounted_fd))


def backing_open(fd: int, backing_fd: int, kind: int = BACKING_PASSTHROUGH) -> int:
    """The id (≥ 1) under which the kernel does I/O to ``backing_fd`` itself."""
    argument = bytearray(BACKING_MAP.pack(backing_fd, kind, 0))
    return int(fcntl.ioctl(fd, FUSE_DEV_IOC_BACKING_OPEN, argument))


def backing_close(fd: int, backing_id: int) -> None:
    """Give back an id of ``backing_open``.  EBUSY for iomap devices in use."""
    fcntl.ioctl(fd, FUSE_DEV_IOC_BACKING_CLOSE, _U32.pack(backing_id))


# --- The FUSE device: the iomap extension (fuse-iomap.md 1.4; generation G6 numbers where they differ, 0.1) -----------

FUSE_DEV_IOC_IOMAP_SUPPORT = ior(_FUSE, 99, 16)
FUSE_DEV_IOC_SET_NOFS = iow(_FUSE, 100, 4)
FUSE_DEV_IOC_ADD_IOMAP = io(_FUSE, 101)
FUSE_DEV_IOC_ADD_IOMAP_G6 = io(_FUSE, 99)
FUSE_DEV_IOC_IOMAP_SET_BLOCKSIZE = iow(_FUSE, 102, 8)
FUSE_DEV_IOC_IOMAP_SET_BLOCKSIZE_G6 = iow(_FUSE, 99, 8)
FUSE_DEV_IOC_IOMAP_STRIPE_CONFIG = iow(_FUSE, 103, 16)     # GL's striping branch only; header, strips follow

IOMAP_SUPPORT_FILEIO = 1    # the whole of file I/O through iomap is allowed
IOMAP_SUPPORT_ATOMIC = 2    # untorn writes too


def iomap_support(fd: int) -> int | None:
    """The ``IOMAP_SUPPORT_*`` bits allowed here; 0: the kernel has iomap but not for us; None: it has none (ENOTTY)."""
    answer = known(fd, FUSE_DEV_IOC_IOMAP_SUPPORT, bytes(_U64_PAIR.size))
    return int(_U64_PAIR.unpack(answer)[0]) if isinstance(answer, bytes) else None


def add_iomap(fd: int) -> bool:
    """True when iomap was delegated to this not yet mounted fd; False where unknown.  EPERM without CAP_SYS_RAWIO."""
    return any(known(fd, request) is not None for request in (FUSE_DEV_IOC_ADD_IOMAP, FUSE_DEV_IOC_ADD_IOMAP_G6))


def set_nofs(fd: int, enabled: bool = True) -> bool:
    """True when the calling thread's allocations no longer recurse into file systems; False where unknown."""
    return known(fd, FUSE_DEV_IOC_SET_NOFS, _U32.pack(enabled)) is not None


def iomap_set_blocksize(fd: int, backing_id: int, block_bytes: int) -> bool:
    """True when the registered device's soft block size was set; False where unknown (generations differ in number)."""
    argument = _U32.pack(backing_id) + _U32.pack(block_bytes)
    requests = (FUSE_DEV_IOC_IOMAP_SET_BLOCKSIZE, FUSE_DEV_IOC_IOMAP_SET_BLOCKSIZE_G6)
    return any(known(fd, request, argument) is not None for request in requests)


# --- Block devices: linux/fs.h.  Several are declared with size_t although the argument is an int or u64 --------------

BLKROSET = io(0x12, 93)
BLKROGET = io(0x12, 94)
BLKRRPART = io(0x12, 95)
BLKFLSBUF = io(0x12, 97)
BLKRASET = io(0x12, 98)
BLKRAGET = io(0x12, 99)
BLKSSZGET = io(0x12, 104)
BLKBSZGET = ior(0x12, 112, _LONG_BYTES)
BLKBSZSET = iow(0x12, 113, _LONG_BYTES)
BLKGETSIZE64 = ior(0x12, 114, _LONG_BYTES)
BLKDISCARD = io(0x12, 119)
BLKIOMIN = io(0x12, 120)
BLKIOOPT = io(0x12, 121)
BLKALIGNOFF = io(0x12, 122)
BLKPBSZGET = io(0x12, 123)
BLKSECDISCARD = io(0x12, 125)
BLKROTATIONAL = io(0x12, 126)
BLKZEROOUT = io(0x12, 127)
BLKGETDISKSEQ = ior(0x12, 128, 8)


def _get(fd: int, request: int, record: Struct) -> int:
    return int(record.unpack(fcntl.ioctl(fd, request, bytes(record.size)))[0])


def device_bytes(fd: int) -> int:
    """Size of a block device in bytes (BLKGETSIZE64)."""
    return _get(fd, BLKGETSIZE64, _U64)


def logical_sector_bytes(fd: int) -> int:
    """Smallest unit that the device can address (BLKSSZGET): the alignment of direct I/O."""
    return _get(fd, BLKSSZGET, _INT)


def physical_sector_bytes(fd: int) -> int:
    """Unit that the device writes without reading first (BLKPBSZGET)."""
    return _get(fd, BLKPBSZGET, _U32)


def is_read_only(fd: int) -> bool:
    """Whether the device refuses writes (BLKROGET)."""
    return _get(fd, BLKROGET, _INT) != 0


def is_rotational(fd: int) -> bool:
    """Whether seeks cost time (BLKROTATIONAL)."""
    return _get(fd, BLKROTATIONAL, _U16) != 0


def soft_block_bytes(fd: int) -> int:
    """Block size of the device's page cache (BLKBSZGET)."""
    return _get(fd, BLKBSZGET, _INT)


def set_soft_block_bytes(fd: int, block_bytes: int) -> None:
    """Set the page cache's block size (BLKBSZSET).  EINVAL: no power of two between sector and page; EBUSY: claimed."""
    fcntl.ioctl(fd, BLKBSZSET, _INT.pack(block_bytes).ljust(_LONG_BYTES, b"\0"))


def disk_sequence(fd: int) -> int | None:
    """A number that no other disk in this slot gets until reboot (BLKGETDISKSEQ, kernel 5.15); None where unknown."""
    answer = known(fd, BLKGETDISKSEQ, bytes(8))
    return int(_U64.unpack(answer)[0]) if isinstance(answer, bytes) else None


def flush_buffers(fd: int) -> None:
    """Write and drop the device's page cache (BLKFLSBUF).  Needs CAP_SYS_ADMIN."""
    fcntl.ioctl(fd, BLKFLSBUF, 0)


def discard(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Tell the device that a range holds nothing (BLKDISCARD).  EOPNOTSUPP where it cannot; multiples of a sector."""
    fcntl.ioctl(fd, BLKDISCARD, _U64_PAIR.pack(offset_bytes, length_bytes))


FS_IOC_UNRESVSP64 = iow(ord("X"), 43, 48)
_SPACE_RESERVATION = Struct("=hh4xqqiI16x")     # space_resv: type, whence, start, length, not used


def punch(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Free a range of a regular file, which reads as zeroes then (FS_IOC_UNRESVSP64).  EOPNOTSUPP where it cannot."""
    fcntl.ioctl(fd, FS_IOC_UNRESVSP64, _SPACE_RESERVATION.pack(0, os.SEEK_SET, offset_bytes, length_bytes, 0, 0))


_SYNC_FILE_RANGE = 1 | 2 | 4     # wait for what is on its way, write what is dirty, wait for that


def write_out(fd: int) -> None:
    """Wait until the device has got all that is in the page cache; its own cache stays (sync_file_range(2))."""
    if _libc.sync_file_range(fd, c_int64(0), c_int64(0), _SYNC_FILE_RANGE):
        number = get_errno()
        raise OSError(number, os.strerror(number))


def zero_out(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Zero a range of the device, by command where it has one (BLKZEROOUT); multiples of a sector."""
    fcntl.ioctl(fd, BLKZEROOUT, _U64_PAIR.pack(offset_bytes, length_bytes))


# --- Loop devices: linux/loop.h ---------------------------------------------------------------------------------------

LOOP_CLR_FD = 0x4C01
LOOP_SET_STATUS64 = 0x4C04
LOOP_GET_STATUS64 = 0x4C05
LOOP_CHANGE_FD = 0x4C06
LOOP_SET_CAPACITY = 0x4C07
LOOP_SET_DIRECT_IO = 0x4C08
LOOP_SET_BLOCK_SIZE = 0x4C09
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_ADD = 0x4C80
LOOP_CTL_REMOVE = 0x4C81
LOOP_CTL_GET_FREE = 0x4C82

LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4      # detached when the last opener closes the device
LO_FLAGS_PARTSCAN = 8
LO_FLAGS_DIRECT_IO = 16
LO_NAME_BYTES = 64

# loop_info64: device, inode, rdevice, offset, sizelimit [bytes]; number, two encryption words (unused), flags;
# file name, crypt name, key, two initial words.
LOOP_INFO64 = Struct(f"=5Q4I{LO_NAME_BYTES}s{LO_NAME_BYTES}s32s2Q")
_LOOP_CONFIG_HEAD = Struct("=II")                                   # backing fd, block size [bytes, 0: 512]
LOOP_CONFIG_BYTES = _LOOP_CONFIG_HEAD.size + LOOP_INFO64.size + 64  # loop_config: head, loop_info64, reserved


@dataclass(frozen=True, slots=True)
class LoopInfo:
    """What an attached loop device is made of."""

    device: int             # st_dev of the backing file's file system, in the kernel's encoding (see ``kernel_dev``)
    inode: int
    offset_bytes: int
    sizelimit_bytes: int    # 0: to the end of the file
    number: int
    flags: int              # LO_FLAGS_*
    file_name: bytes        # as its creator gave it, cut to 63 bytes; not to be trusted


def kernel_dev(st_dev: int) -> int:
    """A ``st_dev`` in the encoding that LOOP_GET_STATUS64 reports (``huge_encode_dev``, the same as ours on Linux)."""
    major, minor = os.major(st_dev), os.minor(st_dev)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def loop_get_free(control_fd: int) -> int:
    """The number of a loop device that is free now, made if there is none; somebody else may take it first."""
    return fcntl.ioctl(control_fd, LOOP_CTL_GET_FREE)


def loop_configure(
    fd: int, backing_fd: int, *, offset_bytes: int, sizelimit_bytes: int, flags: int, block_bytes: int, name: bytes
) -> None:
    """Attach a file to the loop device ``fd`` (kernel 5.8).  EBUSY: it is taken meanwhile."""
    info = LOOP_INFO64.pack(
        0, 0, 0, offset_bytes, sizelimit_bytes, 0, 0, 0, flags, name[: LO_NAME_BYTES - 1], b"", b"", 0, 0
    )
    config = _LOOP_CONFIG_HEAD.pack(backing_fd, block_bytes) + info
    fcntl.ioctl(fd, LOOP_CONFIGURE, config.ljust(LOOP_CONFIG_BYTES, b"\0"))


def loop_status(fd: int) -> LoopInfo | None:
    """What is attached to the loop device ``fd``; None if nothing is."""
    try:
        answer = LOOP_INFO64.unpack(fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(LOOP_INFO64.size)))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    device, inode, _, offset, sizelimit, number, _, _, flags, name, *_ = answer
    return LoopInfo(device, inode, offset, sizelimit, number, flags, name.split(b"\0", 1)[0])


def loop_clear(fd: int) -> None:
    """Detach the loop device: at once, or at its last close if others have it open.  ENXIO: nothing is attached."""
    fcntl.ioctl(fd, LOOP_CLR_FD)


def loop_set_capacity(fd: int) -> None:
    """Take over a changed size of the backing file."""
    fcntl.ioctl(fd, LOOP_SET_CAPACITY)


def loop_set_direct_io(fd: int, enabled: bool) -> None:
    """Bypass the backing file's page cache.  EINVAL where its file system or the alignment does not allow it."""
    fcntl.ioctl(fd, LOOP_SET_DIRECT_IO, int(enabled))


# --- Whole file systems: linux/fs.h -----------------------------------------------------------------------------------

FIBMAP = io(0x00, 1)
FIGETBSZ = io(0x00, 2)
FIFREEZE = iowr(ord("X"), 119, 4)
FITHAW = iowr(ord("X"), 120, 4)
FITRIM = iowr(ord("X"), 121, 24)
FSTRIM_RANGE = Struct("=QQQ")   # fstrim_range: start, length, shortest extent [bytes]; length returns what was trimmed


def freeze(fd: int) -> None:
    """Stop changes to the mounted file system that ``fd`` is on, and make it consistent.  EBUSY: it is frozen."""
    fcntl.ioctl(fd, FIFREEZE, _INT.pack(0))


def thaw(fd: int) -> None:
    """Undo ``freeze``."""
    fcntl.ioctl(fd, FITHAW, _INT.pack(0))


def trim(fd: int, start_bytes: int = 0, length_bytes: int = (1 << 64) - 1, shortest_bytes: int = 0) -> int:
    """Bytes discarded: free space of the mounted file system that ``fd`` is on."""
    argument = FSTRIM_RANGE.pack(start_bytes, length_bytes, shortest_bytes)
    return int(FSTRIM_RANGE.unpack(fcntl.ioctl(fd, FITRIM, argument))[1])


def argument_of(pid: int, address: int, size_bytes: int) -> bytes | None:
    """What a process (or thread) has at an address of its memory; None where that cannot be read."""
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    except OSError:
        return None
    try:
        found = os.pread(memory, size_bytes, address)
    except (OSError, OverflowError):
        return None
    finally:
        os.close(memory)
    return found if len(found) == size_bytes else None


# --- Answered by the daemon: FUSE_IOCTL carries these numbers ---------------------------------------------------------
# The flag and version requests are declared with long, yet everybody transfers an int (linux/fs.h, comment there).

FS_IOC_GETFLAGS = ior(ord("f"), 1, _LONG_BYTES)
FS_IOC_SETFLAGS = iow(ord("f"), 2, _LONG_BYTES)
FS_IOC_GETVERSION = ior(ord("v"), 1, _LONG_BYTES)
FS_IOC_SETVERSION = iow(ord("v"), 2, _LONG_BYTES)
FS_IOC32_GETFLAGS = ior(ord("f"), 1, 4)
FS_IOC32_SETFLAGS = iow(ord("f"), 2, 4)
FS_IOC32_GETVERSION = ior(ord("v"), 1, 4)
FS_IOC32_SETVERSION = iow(ord("v"), 2, 4)
FS_IOC_FIEMAP = iowr(ord("f"), 11, 32)

FSXATTR = Struct("=IIIII8x")    # fsxattr: xflags, extent size hint [bytes], extents, project id, CoW extent size hint
FS_IOC_FSGETXATTR = ior(ord("X"), 31, FSXATTR.size)
FS_IOC_FSSETXATTR = iow(ord("X"), 32, FSXATTR.size)

FSLABEL_BYTES = 256             # FSLABEL_MAX
FS_IOC_GETFSLABEL = ior(0x94, 49, FSLABEL_BYTES)
FS_IOC_SETFSLABEL = iow(0x94, 50, FSLABEL_BYTES)
FSUUID2 = Struct("=B16s")       # fsuuid2: length, uuid
FS_IOC_GETFSUUID = ior(0x15, 0, FSUUID2.size)
FS_SYSFS_PATH = Struct("=B128s")
FS_IOC_GETFSSYSFSPATH = ior(0x15, 1, FS_SYSFS_PATH.size)

FS_IOC_SET_ENCRYPTION_POLICY = ior(ord("f"), 19, 12)
FS_IOC_GET_ENCRYPTION_PWSALT = iow(ord("f"), 20, 16)
FS_IOC_GET_ENCRYPTION_POLICY = iow(ord("f"), 21, 12)
FS_IOC_GET_ENCRYPTION_POLICY_EX = iowr(ord("f"), 22, 9)
FS_IOC_ADD_ENCRYPTION_KEY = iowr(ord("f"), 23, 80)
FS_IOC_REMOVE_ENCRYPTION_KEY = iowr(ord("f"), 24, 64)
FS_IOC_REMOVE_ENCRYPTION_KEY_ALL_USERS = iowr(ord("f"), 25, 64)
FS_IOC_GET_ENCRYPTION_KEY_STATUS = iowr(ord("f"), 26, 128)
FS_IOC_GET_ENCRYPTION_NONCE = ior(ord("f"), 27, 16)
FS_IOC_ENABLE_VERITY = iow(ord("f"), 133, 128)
FS_IOC_MEASURE_VERITY = iowr(ord("f"), 134, 4)
FS_IOC_READ_VERITY_METADATA = iowr(ord("f"), 135, 40)

# ext4's own (kernel documentation, ext4, "Ioctls"; uapi/linux/ext4.h since 6.1)
EXT4_IOC_GETVERSION = ior(ord("f"), 3, _LONG_BYTES)
EXT4_IOC_SETVERSION = iow(ord("f"), 4, _LONG_BYTES)
EXT4_IOC_GETRSVSZ = ior(ord("f"), 5, _LONG_BYTES)
EXT4_IOC_SETRSVSZ = iow(ord("f"), 6, _LONG_BYTES)
EXT4_IOC_GROUP_EXTEND = iow(ord("f"), 7, _LONG_BYTES)
EXT4_IOC_GROUP_ADD = iow(ord("f"), 8, 40)
EXT4_IOC_MIGRATE = io(ord("f"), 9)
EXT4_IOC_ALLOC_DA_BLKS = io(ord("f"), 12)
EXT4_IOC_MOVE_EXT = iowr(ord("f"), 15, 40)
EXT4_IOC_RESIZE_FS = iow(ord("f"), 16, 8)
EXT4_IOC_SWAP_BOOT = io(ord("f"), 17)
EXT4_IOC_PRECACHE_EXTENTS = io(ord("f"), 18)
EXT4_IOC_CLEAR_ES_CACHE = io(ord("f"), 40)
EXT4_IOC_GETSTATE = iow(ord("f"), 41, 4)
EXT4_IOC_GET_ES_CACHE = iowr(ord("f"), 42, 32)
EXT4_IOC_CHECKPOINT = iow(ord("f"), 43, 4)
EXT4_FSUUID = Struct("=II")     # fsuuid: length [bytes] of the uuid that follows, flags 0
EXT4_IOC_GETFSUUID = ior(ord("f"), 44, EXT4_FSUUID.size)
EXT4_IOC_SETFSUUID = iow(ord("f"), 44, EXT4_FSUUID.size)
EXT4_IOC_SHUTDOWN = ior(ord("X"), 125, 4)
