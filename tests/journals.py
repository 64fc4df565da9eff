"""Journals for tests: in memory, in images, and images that the kernel left dirty."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fusewire.ext4 import blocks, checksum, journalfile, journallayout, recovery
from fusewire.ext4.filesystem import Ext4, Options
from fusewire.ext4.journal import Encoded, JournalWriter
from fusewire.ext4.journalfile import Extent, JournalFile
from fusewire.ext4.journalsuper import CRC32C, MAGIC, Checksums, JournalFeature, JournalSuperblock
from fusewire.ext4.recovery import Replay
from fusewire.ext4.superblock import Superblock
from fusewire.ext4.units import Geometry
from tests.mounting import mount_point, run

EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
RECOVER = 0x4
JOURNAL_UUID = bytes(range(0x11, 0x21))
Result = TypeVar("Result")

_BITS = {Checksums.NONE: (0, 0), Checksums.V1: (1, 0), Checksums.V2: (0, 8), Checksums.V3: (0, 16)}


def geometry(block_bytes: int = 1024, count: int = 8192) -> Geometry:
    """A plausible geometry without a file system around it."""
    return Geometry(block_bytes, block_bytes.bit_length() - 1, count, int(block_bytes == 1024), count, 1, 1024, 1024,
                    256, 32, 1)


def with_format(raw: bytes, kind: Checksums, wide: bool, more_incompat: int = 0) -> bytes:
    """Block 0 of a journal with another log format, revocations on."""
    head = bytearray(raw[:1024])
    compat, incompat = _BITS[kind]
    incompat |= JournalFeature.REVOKE.mask | (JournalFeature.BIT64.mask if wide else 0) | more_incompat
    offsets = journallayout.SUPERBLOCK.offsets
    struct.pack_into(">II", head, offsets["feature_compat"], compat, incompat)
    head[offsets["checksum_type"]] = CRC32C if kind in (Checksums.V2, Checksums.V3) else 0
    checksum.seal_journal_superblock(head)
    return bytes(head) + raw[1024:]


class MemoryJournal:
    """A journal of ``maxlen`` blocks in a dictionary; blocks never written are zeroes."""

    def __init__(self, kind: Checksums = Checksums.V3, wide: bool = True, block_bytes: int = 1024, maxlen: int = 1024,
                 more_incompat: int = 0, fc_blocks: int = 0, start: int = 0) -> None:
        raw = bytearray(block_bytes)
        struct.pack_into(">9I", raw, 0, MAGIC, 4, 0, block_bytes, maxlen, 1, 7, start, 0)
        raw[0x30:0x40] = JOURNAL_UUID
        struct.pack_into(">I", raw, 0x54, fc_blocks)
        self.blocks = {0: with_format(bytes(raw), kind, wide, more_incompat)}
        self.block_bytes, self.maxlen = block_bytes, maxlen
        self.geometry = geometry(block_bytes)
        self.file = JournalFile([Extent(0, 4000, maxlen)])

    @property
    def journal(self) -> JournalSuperblock:
        return JournalSuperblock.parse(self.blocks[0], self.block_bytes, self.maxlen)

    def read(self, block: int) -> bytes:
        assert 0 <= block < self.maxlen
        return self.blocks.get(block, bytes(self.block_bytes))

    def write(self, block: int, data: bytes) -> None:
        assert 0 <= block < self.maxlen and len(data) == self.block_bytes
        self.blocks[block] = data

    def writer(self) -> JournalWriter:
        """A writer for the empty journal, begun."""
        writer = JournalWriter(self.journal, self.journal.first, self.journal.sequence)
        begin = writer.begin()
        assert begin is not None
        self.write(0, begin)
        return writer

    def commit(self, encoded: Encoded) -> None:
        for position, data in (*encoded.records, encoded.commit):
            self.write(position, data)

    def recover(self) -> Replay:
        return recovery.recover(self.journal, self.file, self.geometry, self.read)


class Disk:
    """An image file with a journal, driven without a mount."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.fs = self._open()
        self.block_bytes, self.geometry = self.fs.geometry.block_bytes, self.fs.geometry
        found = self.run(journalfile.locate, self.fs)
        assert found is not None
        self.file = found

    def close(self) -> None:
        os.close(self.descriptor)

    def _open(self, overlay: Replay | None = None) -> Ext4:
        raw = bytearray(os.pread(self.descriptor, 1024, 1024))
        superblock = Superblock.parse(bytes(raw), os.fstat(self.descriptor).st_size)
        cache = blocks.BlockCache(superblock.geometry.block_bytes, superblock.geometry.blocks, 64 << 20)
        if overlay is not None:
            for block, data in overlay.blocks():
                cache.pin(block, blocks.CachedBlock(data))
        return Ext4(superblock, cache, Options(noload=True))

    def replayed(self, replay: Replay) -> Ext4:
        """The file system with the replay laid over it in memory."""
        return self._open(replay)

    def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """The result of a function of the core; blocks that it misses are fetched."""
        while True:
            try:
                return function(*arguments)
            except blocks.BlockMiss as miss:
                wanted = {first + index for first, count in miss.runs for index in range(count)}
                caches = {id(item.cache): item.cache for item in (self.fs, *arguments) if isinstance(item, Ext4)}
                for cache in caches.values():
                    cache.admit({block: self.read_home(block) for block in wanted})

    def read_home(self, block: int) -> bytes:
        return os.pread(self.descriptor, self.block_bytes, block * self.block_bytes)

    def write_home(self, block: int, data: bytes) -> None:
        assert len(data) == self.block_bytes and not self.file.owns(block)
        os.pwrite(self.descriptor, data, block * self.block_bytes)

    def read(self, journal_block: int) -> bytes:
        return self.read_home(self.file.place(journal_block))

    def write(self, journal_block: int, data: bytes) -> None:
        assert len(data) == self.block_bytes
        os.pwrite(self.descriptor, data, self.file.place(journal_block) * self.block_bytes)

    @property
    def journal(self) -> JournalSuperblock:
        return JournalSuperblock.parse(self.read(0), self.block_bytes, self.file.blocks)

    def recover(self) -> Replay:
        return recovery.recover(self.journal, self.file, self.geometry, self.read)

    def writer(self) -> JournalWriter:
        """A writer for the empty journal."""
        journal = self.journal
        return JournalWriter(journal, journal.head or journal.first, journal.sequence)

    def set_needs_recovery(self, needs: bool) -> None:
        raw = bytearray(os.pread(self.descriptor, 1024, 1024))
        incompat = struct.unpack_from("<I", raw, 0x60)[0]
        struct.pack_into("<I", raw, 0x60, incompat | RECOVER if needs else incompat & ~RECOVER)
        checksum.seal_superblock(raw)
        os.pwrite(self.descriptor, raw, 1024)

    def replay_home(self, replay: Replay) -> None:
        """What a writable mount does: blocks home, journal emptied, the superblock's flag cleared."""
        for block, data in replay.blocks():
            self.write_home(block, data)
        self.write(0, replay.journal_after().raw)
        self.set_needs_recovery(False)


@contextmanager
def opened(path: Path) -> Iterator[Disk]:
    """The image as a ``Disk``, closed at the end."""
    disk = Disk(path)
    try:
        yield disk
    finally:
        disk.close()


def left_dirty(path: Path, options: str, workload: Iterable[Callable[[Path], None]]) -> None:
    """Mount with the kernel, run the workload, and shut the file system down without writing its log back."""
    with mount_point() as target:
        run("mount", "-t", "ext4", "-o", f"loop,{options}", path, target)
        try:
            for step in workload:
                step(target)
            root = os.open(target, os.O_RDONLY)
            fcntl.ioctl(root, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
            os.close(root)
        finally:
            run("umount", target)
