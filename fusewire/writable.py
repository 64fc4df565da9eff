"""Before the mount: the journal replayed, and a file system made ready to be changed.

    superblock says needs_recovery ─▶ recover ─▶ blocks home, flush ─▶ journal emptied, flush ─▶ superblock read again
    read-only                      ─▶ recover ─▶ the same blocks, in memory only

W1  Nothing is written for a read-only mount.
W2  A replay that is cut off is repeated by the next mount: the journal is emptied only when its blocks are durable.
"""

import os
from collections.abc import Callable
from typing import TypeVar

from fusewire.blockdev import BlockDevice, BlockReader
from fusewire.committer import UNJOURNALED_BATCH_BLOCKS, Log
from fusewire.ext4 import commit, inodefree, journalfile, orphan, recovery, truncate
from fusewire.ext4.blocks import BlockMiss
from fusewire.ext4.errors import Check, Corrupt, Unsupported
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.journal import JournalWriter
from fusewire.ext4.journalfile import JournalFile
from fusewire.ext4.journalsuper import JournalSuperblock
from fusewire.ext4.recovery import Replay
from fusewire.ext4.transaction import CommitFirst, Transaction

SCRATCH_BYTES = 1 << 20
READS_MOST = 100_000

Result = TypeVar("Result")


class Driver:
    """Runs operations before the loop does: fetches what they miss, and waits for it."""

    def __init__(self, device: BlockDevice, fs: Ext4) -> None:
        self.device, self.fs = device, fs
        self._reader = BlockReader(device, fs.geometry, memoryview(bytearray(SCRATCH_BYTES)))

    def run(self, operation: Callable[[], Result]) -> Result:
        """The operation's result, with blocks read as it asks for them."""
        for _ in range(READS_MOST):
            try:
                return operation()
            except BlockMiss as miss:
                self.fs.cache.admit(self._reader.read(miss.runs))
        raise OSError(0, "the file system cannot be read")

    def read(self, block: int) -> bytes:
        """One block as the device has it."""
        return self.device.read(self.fs.geometry.byte_of(block), self.fs.geometry.block_bytes)


def replay_of(driver: Driver) -> tuple[JournalFile, Replay] | None:
    """The journal and what its replay does, None for a file system without one.  ``Corrupt``: it cannot be replayed."""
    fs = driver.fs
    file = driver.run(lambda: journalfile.locate(fs))
    if file is None:
        return None

    def read(journal_block: int) -> bytes:
        data = driver.read(file.place(journal_block))
        if len(data) < fs.geometry.block_bytes:
            raise Corrupt(Check.JOURNAL_INODE, journal_block=journal_block)
        return data

    journal = JournalSuperblock.parse(read(0), fs.geometry.block_bytes, file.blocks)
    if not fs.superblock.needs_recovery:
        journal = journal.emptied(journal.sequence, journal.head) if journal.start else journal
    return file, recovery.recover(journal, file, fs.geometry, read)


def replay_home(driver: Driver, file: JournalFile, replay: Replay) -> None:
    """Carry the replay out on the device."""
    fs, device = driver.fs, driver.device
    if replay.fast_commits is not None and any(True for _ in replay.fast_commits):
        raise Unsupported("the journal holds fast commits, which are not replayed yet; mount it once with the kernel")
    for block, data in replay.blocks():
        device.write(fs.geometry.byte_of(block), [data])
    device.flush()
    device.write(fs.geometry.byte_of(file.place(0)), [replay.journal_after().raw])
    device.flush()


def start_log(driver: Driver, file: JournalFile, replay: Replay) -> Log:
    """The journal of a replayed file system, ready for batches."""
    fs = driver.fs
    emptied = replay.journal_after() if replay.journal.start else replay.journal
    journal = emptied.enabled(fs.is_64bit, fs.has_checksums)
    head = journal.head if journal.first <= journal.head < journal.last else journal.first
    return Log(JournalWriter(journal, head, journal.sequence or 1), file)


def start_writing(driver: Driver, log: Log | None) -> None:
    """Make the file system changeable, and take up the orphans that the last mount left."""
    fs = driver.fs
    limit = log.writer.max_blocks // 2 if log is not None else UNJOURNALED_BATCH_BLOCKS
    driver.run(lambda: commit.start_writing(fs, limit))
    driver.run(lambda: orphan.recall(fs))


def finish_orphans(driver: Driver) -> int:
    """Free the orphans without names and finish cutting the others; how many there were.

    The changes are in the open batch, as far as it holds them; the rest stays for the next mount.
    """
    fs = driver.fs
    assert fs.writing is not None
    found = list(fs.writing.orphans)
    for number in found:
        try:
            while not driver.run(lambda: _step(fs, number)):  # noqa: B023 - run at once
                pass
        except CommitFirst:
            break
    return len(found)


def _step(fs: Ext4, number: int) -> bool:
    with Transaction(fs) as tx:
        found = tx.inode(number)
        if found.links:
            return truncate.shrink(tx, found)[1]
        return inodefree.release(tx, found)


def why_read_only(fs: Ext4) -> str | None:
    """Why a file system cannot be written here, None if it can."""
    features = fs.superblock.features.keep_from_writing()
    if features:
        return f"it has features that are read-only here: {', '.join(features)}"
    if fs.geometry.block_bytes > os.sysconf("SC_PAGE_SIZE"):
        return f"its blocks of {fs.geometry.block_bytes} bytes are read-only here"
    return None

