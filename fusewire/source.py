"""What is mounted: a locked block device or image file, and the file system that begins in it.

C1  The source is locked before its first byte is read.
C2  I/O goes to an image file itself, not to the loop device that the mount shows: its pages are then cached once, and
    RWF_NOWAIT finds them (through the loop device a resident 4 KiB costs the same, one that is not 30 µs more).
"""

import os
import stat
from dataclasses import dataclass

from fusewire import ioctl, loopdev, partition, sourcelock
from fusewire.arguments import Failure
from fusewire.blockdev import BlockDevice, BlockReader
from fusewire.ext4.blocks import BlockCache, BlockMiss
from fusewire.ext4.errors import Corrupt, Ext4Error
from fusewire.ext4.filesystem import DEFAULT_CACHE_BYTES, Ext4, Options
from fusewire.ext4.superblock import Superblock
from fusewire.ext4.units import SUPERBLOCK_OFFSET_BYTES
from fusewire.loopdev import LoopDevice, Part
from fusewire.options import MountOptions
from fusewire.sourcelock import SourceLock

SUPERBLOCK_BYTES = 1024
SUPERBLOCK_COPY_UNIT_BYTES = 1024   # of the option sb=
SCRATCH_BYTES = 1 << 20
LOOP_SECTOR_BYTES = 512
MOUNT_READS_MOST = 1000             # waits for blocks before the mount; a sound file system needs three


@dataclass(slots=True)
class Source:
    """A source ready to be served."""

    name: str               # as the user gave it
    path: str               # absolute, links resolved
    lock: SourceLock
    device: BlockDevice
    is_device: bool
    loop: LoopDevice | None = None

    @property
    def mount_name(self) -> str:
        """What the mount table shall show, and what a ``fuseblk`` mount claims."""
        return self.loop.path if self.loop is not None else self.path

    def close(self) -> None:
        """Give everything back.  May be called again."""
        if self.loop is not None:
            self.loop.close()
        self.device.close()
        self.lock.release()


def open_source(name: str, options: MountOptions) -> Source:
    """Lock and open a source.  ``Failure`` says in one line why it cannot be used."""
    path = os.path.realpath(name)
    try:
        lock = sourcelock.lock_source(path, write=False)
    except loopdev.SourceError as error:
        raise Failure(_named(str(error), path, name)) from error
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        start, size = _place(name, fd, options)
        device = BlockDevice(fd, start, size)
    except OSError as error:
        lock.release()
        raise Failure(f"{name}: {loopdev.reason(error)}") from error
    except BaseException:
        lock.release()
        raise
    return Source(name, path, lock, device, lock.is_device)


def _named(text: str, path: str, name: str) -> str:
    """An error about a path with the name that the user knows."""
    return name + text.removeprefix(path) if text.startswith(path) else f"{name}: {text}"


def _place(name: str, fd: int, options: MountOptions) -> tuple[int, int]:
    """(start, size or 0) of the file system in the source, in bytes."""
    if not options.partition:
        return options.offset_bytes, options.sizelimit_bytes
    whole = BlockDevice(fd)
    sector = ioctl.logical_sector_bytes(fd) if stat.S_ISBLK(os.fstat(fd).st_mode) else 0
    try:
        found = partition.find_partition(whole.read, whole.size_bytes, options.partition, sector)
    except partition.PartitionError as error:
        raise Failure(f"{name}: {error}") from error
    limit = options.sizelimit_bytes
    return found.offset_bytes, min(found.size_bytes, limit) if limit else found.size_bytes


def attach_loop(source: Source) -> None:
    """Put an image behind a loop device, for a ``fuseblk`` mount.  ``Failure`` if there is none to be had."""
    device = source.device
    part = Part(device.start_bytes, device.size_bytes - device.size_bytes % LOOP_SECTOR_BYTES, read_only=True)
    try:
        source.loop = loopdev.attach(source.lock.fd, source.path, part)
    except loopdev.SourceError as error:
        raise Failure(_named(str(error), source.path, source.name)) from error


def open_file_system(source: Source, options: MountOptions) -> Ext4:
    """The file system in a source, its root directory checked.  ``Failure`` names the structure that is wrong."""
    structure = "superblock"
    try:
        superblock = Superblock.parse(_read_superblock(source.device, options), source.device.size_bytes)
        geometry = superblock.geometry
        limit = options.cache_bytes or DEFAULT_CACHE_BYTES
        fs = Ext4(superblock, BlockCache(geometry.block_bytes, geometry.blocks, limit),
                  Options(options.noload, options.minixdf, options.user_xattr, options.acl))
        structure = "root directory"
        _check(fs, source.device)
    except (Ext4Error, OSError) as error:
        reason = loopdev.reason(error) if isinstance(error, OSError) else str(error)
        where = f"{structure}: " if isinstance(error, Corrupt | OSError) or structure == "superblock" else ""
        raise Failure(f"{source.name}: {where}{reason}") from error
    return fs


def _read_superblock(device: BlockDevice, options: MountOptions) -> bytes:
    at = SUPERBLOCK_OFFSET_BYTES if options.superblock == 1 else options.superblock * SUPERBLOCK_COPY_UNIT_BYTES
    return device.read(at, SUPERBLOCK_BYTES)


def _check(fs: Ext4, device: BlockDevice) -> None:
    """``fs.check`` with blocks read as it asks for them."""
    reader = BlockReader(device, fs.geometry, memoryview(bytearray(SCRATCH_BYTES)))
    for _ in range(MOUNT_READS_MOST):
        try:
            fs.check()
        except BlockMiss as miss:
            fs.cache.admit(reader.read(miss.runs))
        else:
            return
    raise OSError(0, "the root directory cannot be read")


def can_be_fuseblk(source: Source, options: MountOptions, is_root: bool) -> bool:
    """Whether the mount can be a ``fuseblk``, for which unmount waits: root, and a device or a loop device."""
    return is_root and (source.is_device or options.loop)
