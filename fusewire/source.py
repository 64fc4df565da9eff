"""What is mounted: a locked block device or image file, and the file system that begins in it.

C1  The source is locked before its first byte is read.
C2  I/O goes to an image file itself, not to the loop device that the mount shows: its pages are then cached once, and
    RWF_NOWAIT finds them (through the loop device a resident 4 KiB costs the same, one that is not 30 µs more).
"""

import os
import stat
from dataclasses import dataclass
from typing import NamedTuple

from fusewire import ioctl, loopdev, partition, sourcelock, writable
from fusewire.arguments import Failure
from fusewire.batchwriter import Log
from fusewire.blockdev import BlockDevice
from fusewire.ext4.blocks import BlockCache
from fusewire.ext4.errors import Corrupt, Ext4Error
from fusewire.ext4.features import Feature
from fusewire.ext4.filesystem import DEFAULT_CACHE_BYTES, Ext4, Options
from fusewire.ext4.recovery import Replay
from fusewire.ext4.superblock import Superblock
from fusewire.ext4.units import SUPERBLOCK_OFFSET_BYTES
from fusewire.loopdev import LoopDevice, Part
from fusewire.options import MountOptions
from fusewire.sourcelock import SourceLock
from fusewire.writable import Driver

SUPERBLOCK_BYTES = 1024
SUPERBLOCK_COPY_UNIT_BYTES = 1024   # of the option sb=
LOOP_SECTOR_BYTES = 512


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
    """Lock and open a source, for writing if the options say so.  ``Failure`` tells why it cannot be used."""
    path = os.path.realpath(name)
    write = options.writes
    try:
        lock = sourcelock.lock_source(path, write=write)
    except loopdev.SourceError as error:
        raise Failure(_named(str(error), path, name)) from error
    try:
        fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
        start, size = _place(name, fd, options)
        device = BlockDevice(fd, start, size)
    except (OSError, Failure) as error:
        lock.release()
        if isinstance(error, Failure):
            raise
        raise Failure(f"{name}: {loopdev.reason(error)}") from error
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


def attach_loop(source: Source, read_only: bool) -> None:
    """Put an image behind a loop device, for a ``fuseblk`` mount.  ``Failure`` if there is none to be had."""
    device = source.device
    part = Part(device.start_bytes, device.size_bytes - device.size_bytes % LOOP_SECTOR_BYTES, read_only=read_only)
    try:
        source.loop = loopdev.attach(source.lock.fd, source.path, part)
    except loopdev.SourceError as error:
        raise Failure(_named(str(error), source.path, source.name)) from error


class Opened(NamedTuple):
    """A file system ready to be served, and the log of one that may be changed."""

    fs: Ext4
    log: Log | None
    notes: list[str]


def open_file_system(source: Source, options: MountOptions) -> Opened:
    """The file system in a source, replayed if need be, its root directory checked, changeable if it shall be.

    ``Failure`` names the structure that is wrong.
    """
    progress = _Progress()
    try:
        return _open(source, options, progress)
    except (Ext4Error, OSError) as error:
        reason = loopdev.reason(error) if isinstance(error, OSError) else str(error)
        named = isinstance(error, Corrupt | OSError) or progress.structure == "superblock"
        where = f"{progress.structure}: " if named else ""
        hint = _hint_of_partitions(source, options) if isinstance(error, Corrupt) else ""
        raise Failure(f"{source.name}: {where}{reason}{hint}") from error


def _hint_of_partitions(source: Source, options: MountOptions) -> str:
    """What to say where a whole disk was given for a file system."""
    if options.partition or source.device.start_bytes:
        return ""
    try:
        found = partition.list_partitions(source.device.read, source.device.size_bytes)
    except (partition.PartitionError, OSError):
        return ""
    numbers = ", ".join(str(each.number) for each in found)
    return f"; it is a disk with partitions {numbers}: choose one with -o part=N" if numbers else ""


class _Progress:
    """What is being read, for the message of an error."""

    structure = "superblock"


def _open(source: Source, options: MountOptions, progress: _Progress) -> Opened:
    driver = _driver(source.device, options)
    if options.writes:
        return _open_for_writing(source, options, driver, progress)
    notes: list[str] = []
    from_copy = options.superblock != 1
    if (driver.fs.superblock.needs_recovery or from_copy) and not options.noload:
        progress.structure = "journal"
        found = writable.replay_of(driver, from_copy)
        if found is not None:
            driver = writable.lay_over(driver, lambda device: _driver(device, options), found)
            source.device = driver.device
            notes += [] if found.is_empty else [f"{found.sentence()}, in memory"]
            notes += _notes_of_errors(found.replay)
    progress.structure = "root directory"
    driver.run(driver.fs.check)
    return Opened(driver.fs, None, notes)


def _open_for_writing(source: Source, options: MountOptions, driver: Driver, progress: _Progress) -> Opened:
    _refuse_writing(source, options, driver)
    progress.structure = "journal"
    found, notes, log = writable.replay_of(driver), list[str](), None
    if found is not None:
        driver, journal = writable.recover_home(driver, lambda: _driver(source.device, options), found)
        log = writable.start_log(driver, found.file, journal)
        notes += [] if found.is_empty else [found.sentence()]
        notes += _notes_of_errors(found.replay)
    progress.structure = "root directory"
    driver.run(driver.fs.check)
    progress.structure = "groups"
    writable.start_writing(driver, log)
    progress.structure = "orphans"
    count = writable.finish_orphans(driver, log)
    notes += [f"finished {count} deleted or shortened files that the last mount had left"] if count else []
    if log is None:
        notes.append("there is no journal: after a crash the file system must be checked with e2fsck")
    return Opened(driver.fs, log, notes)


def _refuse_writing(source: Source, options: MountOptions, driver: Driver) -> None:
    why_not = writable.why_read_only(driver.fs)
    if why_not is None and options.noload and Feature.HAS_JOURNAL in driver.fs.superblock.features:
        why_not = "the option noload, which leaves its journal alone, needs ro"
    if why_not is None and options.superblock != 1:
        why_not = "the option sb, which reads a copy of the superblock, needs ro"
    if why_not is not None:
        raise Failure(f"{source.name}: cannot be written: {why_not}; mount with -o ro")


def _notes_of_errors(replay: Replay) -> list[str]:
    return [f"the journal was given up because of an error ({os.strerror(replay.journal.errno).lower()}); check the "
            f"file system with e2fsck"] if replay.journal.errno else []


def _driver(device: BlockDevice, options: MountOptions) -> Driver:
    """The file system as it stands on the device."""
    superblock = Superblock.parse(_read_superblock(device, options), device.size_bytes)
    geometry = superblock.geometry
    limit = options.cache_bytes or DEFAULT_CACHE_BYTES
    options.obey_superblock(superblock.fields["default_mount_opts"], superblock.fields["mount_opts"])
    fs = Ext4(superblock, BlockCache(geometry.block_bytes, geometry.blocks, limit),
              Options(noload=True, minixdf=options.minixdf, user_xattr=options.user_xattr, acl=options.acl,
                      grpid=bool(options.grpid), resuid=options.reserve_uid, resgid=options.reserve_gid,
                      max_dir_size_kb=options.directory_kib))
    return Driver(device, fs)


def _read_superblock(device: BlockDevice, options: MountOptions) -> bytes:
    at = SUPERBLOCK_OFFSET_BYTES if options.superblock == 1 else options.superblock * SUPERBLOCK_COPY_UNIT_BYTES
    return device.read(at, SUPERBLOCK_BYTES)


def can_be_fuseblk(source: Source, options: MountOptions, is_root: bool) -> bool:
    """Whether the mount can be a ``fuseblk``, for which unmount waits: root, and a device or a loop device."""
    return is_root and (source.is_device or options.loop)
