"""Before the mount: the journal replayed, and a file system made ready to be changed.

    to be written   blocks home, flush ─▶ fast commits, in one batch ─▶ journal emptied, flush ─▶ orphans finished
    read-only       the log is laid over the device (``replayed``), fast commits are applied in memory

W1  Nothing is written for a read-only mount.
W2  A replay that is cut off is repeated by the next mount, whoever does that: the journal is emptied only when its
    blocks are durable, and fast commits stay valid until all that they say becomes durable at once.
W3  What the superblock or the journal remember of errors survives the replay.
"""

import errno
import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from fusewire import batchwriter
from fusewire.batchwriter import Log
from fusewire.blockdev import BlockDevice, BlockReader
from fusewire.ext4 import (
    checksum,
    commit,
    errorlog,
    inodefree,
    iomapwrite,
    journalfile,
    layout,
    mountstate,
    orphan,
    recovery,
    superstore,
    truncate,
)
from fusewire.ext4.batch import BatchLimits
from fusewire.ext4.blocks import BlockMiss
from fusewire.ext4.errors import Check, Corrupt, Unsupported
from fusewire.ext4.fastreplay import FastReplay, Step
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.journal import JournalWriter
from fusewire.ext4.journalfile import JournalFile
from fusewire.ext4.journalsuper import JournalSuperblock
from fusewire.ext4.recovery import Replay
from fusewire.ext4.transaction import CommitFirst, Transaction
from fusewire.replayed import ReplayedDevice
from fusewire.settler import Settler

SCRATCH_BYTES = 1 << 20
READS_MOST = 100_000
WRITE_AT_ONCE = 256             # blocks of the log on their way home
UNBOUNDED_BLOCKS = 1 << 40      # of a batch that is never closed

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
        raise OSError(errno.EIO, "the file system cannot be read")

    def read(self, block: int) -> bytes:
        """One block as the device has it."""
        return self.device.read(self.fs.geometry.byte_of(block), self.fs.geometry.block_bytes)


# ---- the journal -------------------------------------------------------------------------------------------


class Recovery(NamedTuple):
    """The journal of a file system, and what its replay does."""

    file: JournalFile
    replay: Replay

    @property
    def has_fast_commits(self) -> bool:
        """Whether there are changes that the log's transactions do not hold."""
        fast = self.replay.fast_commits
        return fast is not None and fast.commits > 0

    @property
    def is_empty(self) -> bool:
        """Whether a replay changes nothing."""
        return not self.replay.transactions and not self.has_fast_commits

    def sentence(self) -> str:
        """What was replayed, for people."""
        fast = self.replay.fast_commits
        more = f" and {fast.commits} fast commits" if fast is not None and fast.commits else ""
        return f"replayed {len(self.replay.transactions)} transactions, {len(self.replay)} blocks,{more} of the journal"


def replay_of(driver: Driver, from_copy: bool = False) -> Recovery | None:
    """The journal and what its replay does, None for a file system without one.  ``Corrupt``: it cannot be replayed.

    ``from_copy``: what was read is a copy of the superblock, which does not know whether there is anything to replay.
    """
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
    if not fs.superblock.needs_recovery and not from_copy and journal.start:
        journal = _dropped(journal)
    return Recovery(file, recovery.recover(journal, file, fs.geometry, read))


def _dropped(journal: JournalSuperblock) -> JournalSuperblock:
    """The journal of a file system that needs no recovery: whatever its log holds is void.

    It has a transaction per block at most, so none of them can continue one that is numbered higher than all.
    """
    return journal.emptied(journal.sequence + journal.ring_blocks + 1, journal.first)


def recover_home(driver: Driver, reopen: Callable[[], Driver], found: Recovery) -> tuple[Driver, JournalSuperblock]:
    """Carry the replay out on the device: the file system as it is then, and its empty journal.

    Raises ``Corrupt``, ``Unsupported`` if it cannot be replayed, OSError.
    """
    file, replay = found
    replay.require_sound()
    journal = replay.journal
    if replay.transactions or journal.errno:
        _blocks_home(driver, replay)
        driver.device.flush()
        driver = _reopened(driver, reopen)
    if not journal.start and not journal.errno:
        if driver.read(file.place(0)) != journal.raw:   # a void log must not come to count again
            _write_journal(driver, file, journal)
        return driver, journal
    if found.has_fast_commits:
        _fast_commits_home(driver, found)
    after = replay.journal_after() if journal.start else journal
    emptied = after.emptied(after.sequence, after.head, forgive=True)
    _write_journal(driver, file, emptied)
    return driver, emptied


def _write_journal(driver: Driver, file: JournalFile, journal: JournalSuperblock) -> None:
    """Write the journal's superblock, durably."""
    driver.device.write(driver.fs.geometry.byte_of(file.place(0)), [journal.raw])
    driver.device.flush()


def _reopened(driver: Driver, reopen: Callable[[], Driver]) -> Driver:
    """The file system with the superblock as it is after the log's transactions; ``Corrupt`` if it is another's."""
    fresh, before = reopen(), driver.fs.geometry
    if fresh.fs.geometry.block_bytes != before.block_bytes:
        raise Corrupt(Check.SUPER_GEOMETRY, block_bytes=fresh.fs.geometry.block_bytes, before=before.block_bytes)
    return fresh


def _blocks_home(driver: Driver, replay: Replay) -> None:
    """Write all that the log holds to its places; the superblock keeps what it knows of errors (W3)."""
    home, offset = superstore.place(driver.fs)
    before = driver.read(home)
    waiting = {home: _with_errors(driver.fs, before, replay.content(home) or before, offset, replay.journal.errno)}
    for block, data in replay.blocks():
        if block != home:
            waiting[block] = data
        if len(waiting) >= WRITE_AT_ONCE:
            batchwriter.write_home(driver.device, driver.fs.geometry, waiting)
            waiting.clear()
    batchwriter.write_home(driver.device, driver.fs.geometry, waiting)


def _with_errors(fs: Ext4, before: bytes, after: bytes, offset: int, journal_errno: int) -> bytes:
    end = offset + layout.SUPERBLOCK.size
    record = bytearray(errorlog.carry_over(before[offset:end], after[offset:end], journal_errno))
    if fs.has_checksums and record != after[offset:end]:
        checksum.seal_superblock(record)
    return after[:offset] + record + after[end:]


def start_log(driver: Driver, file: JournalFile, journal: JournalSuperblock) -> Log:
    """The log of a recovered file system, ready for batches."""
    fs = driver.fs
    ready = journal.enabled(fs.is_64bit, fs.has_checksums)
    return Log(JournalWriter(ready, _head(ready), ready.sequence or 1), file)


def _head(journal: JournalSuperblock) -> int:
    """Where the next transaction goes in an empty log."""
    return journal.head if journal.first <= journal.head < journal.last else journal.first


# ---- fast commits ------------------------------------------------------------------------------------------


def _fast_commits_home(driver: Driver, found: Recovery) -> None:
    """Apply the fast commits on the device, all at once, because no replay may find them applied in part.

    They count as long as the log ends before the transaction that they name.  That is what our batch becomes, written
    where the log does not lead.  One superblock lets it begin there and ends the fast commits, also for e2fsck 1.47.0,
    which fails where a log holds transactions and stale fast commits.
    """
    file, replay, journal = found.file, found.replay, found.replay.journal
    spare = journal.last - 1
    after = journal.emptied(replay.end_sequence)
    log = Log(JournalWriter(after, after.first, replay.end_sequence), file)
    _apply_fast_commits(driver, replay, BatchLimits(log.writer.blocks_in(spare - after.first) - 1))
    end = replay.head if journal.first <= replay.head < journal.last else journal.first
    _write_journal(driver, file, journal.changed(sequence=replay.end_sequence, start=end))
    driver.device.write(driver.fs.geometry.byte_of(file.place(spare)), [bytes(driver.fs.geometry.block_bytes)])
    driver.device.flush()
    _write_journal(driver, file, journal.changed(sequence=replay.end_sequence, start=spare))
    Settler(driver.device, driver.fs, log).finish()


def apply_in_memory(driver: Driver, found: Recovery) -> None:
    """Apply the fast commits to what is in the cache, where their blocks stay."""
    if not found.has_fast_commits:
        return
    features = driver.fs.superblock.features.keep_from_writing()
    if features:
        raise Unsupported(f"the journal holds fast commits, which cannot be replayed together with "
                          f"{', '.join(features)}; mount it once with the kernel, or see it unreplayed with "
                          f"-o ro,noload")

    _apply_fast_commits(driver, found.replay, BatchLimits(UNBOUNDED_BLOCKS))
    driver.run(lambda: commit.close(driver.fs, 0))
    driver.fs.writing = None


def _apply_fast_commits(driver: Driver, replay: Replay, limits: BatchLimits) -> None:
    """Apply them to what is in memory, as one batch, which stays open.

    Nothing of it is written before all of it can be.  So what it has freed it may use again when nothing else is left,
    as the kernel could, who freed it in an earlier commit.
    """
    fs, changes = driver.fs, replay.fast_commits
    assert changes is not None
    writing = driver.run(lambda: commit.start_writing(fs, limits))
    driver.run(lambda: orphan.recall(fs))
    work = FastReplay(fs, changes)

    def reuse() -> None:
        if not writing.batch.freed:
            raise Unsupported("there is no room, in the journal or among the free blocks, to replay its fast commits; "
                              "let e2fsck or the kernel do that")
        commit.allow_reuse(fs, writing.batch)
        work.claim_again()

    for step in work.steps():
        _carry_out(driver, step, reuse)
    work.release()


def _carry_out(driver: Driver, step: Step, reuse: Callable[[], None]) -> None:
    place: int | None = 0
    while place is not None:
        def take(at: int = place) -> int | None:
            with Transaction(driver.fs) as tx:
                return step(tx, at)
        place = _run(driver, take, reuse)


def _run(driver: Driver, operation: Callable[[], Result], make_room: Callable[[], None]) -> Result:
    """The operation's result; where it needs that, room is made for it by ``make_room``, which raises if it cannot."""
    while True:
        try:
            return driver.run(operation)
        except CommitFirst:
            make_room()


def lay_over(driver: Driver, reopen: Callable[[BlockDevice], Driver], found: Recovery) -> Driver:
    """The file system as it would be after the replay, without a byte written (W1)."""
    if found.is_empty:
        found.replay.require_sound()
        return driver
    device = ReplayedDevice(driver.device, driver.fs.geometry, found.file, found.replay)
    replayed = _reopened(driver, lambda: reopen(device))
    apply_in_memory(replayed, found)
    return replayed


# ---- making it writable ------------------------------------------------------------------------------------


def start_writing(driver: Driver, log: Log | None) -> None:
    """Make the file system changeable, and take up the orphans that the last mount left."""
    fs = driver.fs
    driver.run(lambda: commit.start_writing(fs, batchwriter.limits(log, fs.geometry.block_bytes)))
    driver.run(lambda: orphan.recall(fs))


def finish_orphans(driver: Driver, log: Log | None) -> int:
    """Free the orphans without names and finish cutting the others, durably: how many there were.

    The file system must be changeable already.  What cannot be finished, because it is corrupt, stays an orphan.
    """
    fs = driver.fs
    assert fs.writing is not None
    found = list(fs.writing.orphans)
    if not found:
        return 0
    settler = Settler(driver.device, fs, log)

    def settle() -> None:
        if fs.writing is None or fs.writing.batch.is_empty:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        settler.commit()

    block, data = driver.run(lambda: mountstate.being_changed(fs))
    driver.device.write(fs.geometry.byte_of(block), [data])
    driver.device.flush()
    for number in found:
        try:
            while not _run(driver, lambda: _finish(driver, number), settle):  # noqa: B023 - run at once
                pass
        except Corrupt:
            continue
    settler.finish()
    return len(found)


def _finish(driver: Driver, number: int) -> bool:
    """A step of finishing an orphan; what stands behind the end of a cut file in its last block becomes zero."""
    fs = driver.fs
    with Transaction(fs) as tx:
        found = tx.inode(number)
        if not found.links:
            return inodefree.release(tx, found)
        tail = iomapwrite.tail_to_clear(tx, found) if found.is_regular else None
        if tail is not None:
            driver.device.write(tail[0], [bytes(tail[1])])
            tx.wrote_data = True
        return truncate.shrink(tx, found)[1]


def why_read_only(fs: Ext4) -> str | None:
    """Why a file system cannot be written here, None if it can."""
    features = fs.superblock.features.keep_from_writing()
    if features:
        return f"it has features that are read-only here: {', '.join(features)}"
    if fs.geometry.block_bytes > os.sysconf("SC_PAGE_SIZE"):
        return f"its blocks of {fs.geometry.block_bytes} bytes are read-only here"
    return None
