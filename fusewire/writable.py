"""Before the mount: the journal replayed, and a file system made ready to be changed.

    to be written   blocks home, flush ─▶ fast commits, a batch at a time ─▶ journal emptied, flush ─▶ orphans finished
    read-only       the log is laid over the device (``replayed``), fast commits are applied in memory

W1  Nothing is written for a read-only mount.
W2  A replay that is cut off is repeated by the next mount, whoever does that: the journal is emptied only when its
    blocks are durable, and fast commits stay valid until all that they say is.
W3  What the superblock or the journal remember of errors survives the replay.
"""

import errno
import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from fusewire.batchwriter import Log, batch_limit
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
from fusewire.ext4.blocks import BlockMiss
from fusewire.ext4.errors import Check, Corrupt, Unsupported
from fusewire.ext4.fastreplay import FastReplay
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.journal import JournalWriter
from fusewire.ext4.journalfile import JournalFile
from fusewire.ext4.journalsuper import JournalSuperblock
from fusewire.ext4.recovery import Replay
from fusewire.ext4.transaction import CommitFirst, Transaction
from fusewire.replayed import ReplayedDevice
from fusewire.settler import Journaled, Settler, write_home

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


def replay_of(driver: Driver) -> Recovery | None:
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
    if not fs.superblock.needs_recovery and journal.start:
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
    device, geometry, journal = driver.device, driver.fs.geometry, replay.journal
    if replay.transactions or journal.errno:
        _blocks_home(driver, replay)
        device.flush()
        driver = _reopened(driver, reopen)
    if not journal.start and not journal.errno:
        if driver.read(file.place(0)) != journal.raw:   # a void log must not come to count again
            device.write(geometry.byte_of(file.place(0)), [journal.raw])
            device.flush()
        return driver, journal
    if found.has_fast_commits:
        _fast_commits_home(driver, found)
    after = replay.journal_after() if journal.start else journal
    emptied = after.emptied(after.sequence, after.head, forgive=True)
    device.write(geometry.byte_of(file.place(0)), [emptied.raw])
    device.flush()
    return driver, emptied


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
            write_home(driver.device, driver.fs, waiting)
            waiting.clear()
    write_home(driver.device, driver.fs, waiting)


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
    """Apply the fast commits on the device: in one batch, if it takes them all.

    They count as long as the log ends before the transaction that they name.  The last batch is that transaction, so
    everything is there and they are void at once.  Batches before it, alone in the log, are the transaction before that
    one: a crash leaves some whole batches and the records, which we apply again to that.  (The kernel's replay does not
    bear that, names may be there twice then; so a batch may be as large as the log allows.)
    """
    replay, file, fs = found.replay, found.file, driver.fs
    head = replay.head if replay.journal.first <= replay.head < replay.journal.last else replay.journal.first
    idle = replay.journal.changed(sequence=replay.end_sequence, start=head)
    driver.device.write(fs.geometry.byte_of(file.place(0)), [idle.raw])
    driver.device.flush()
    log = Journaled(idle, file, head, consecutive=False)
    settler = Settler(driver.device, fs, log)
    work = _start_fast_replay(driver, replay, replay_limit(log.writer))

    def settle() -> None:
        settler.commit()
        work.claim_again()

    _carry_out(driver, work, settle)
    log.last_one()
    settler.commit()
    work.release()


def replay_limit(writer: JournalWriter) -> int:
    """The most blocks of a batch of changes that fast commits make; closing it adds the superblock."""
    return writer.max_blocks - 1


def apply_in_memory(driver: Driver, found: Recovery) -> None:
    """Apply the fast commits to what is in the cache, where their blocks stay."""
    if not found.has_fast_commits:
        return
    features = driver.fs.superblock.features.keep_from_writing()
    if features:
        raise Unsupported(f"the journal holds fast commits, which cannot be replayed together with "
                          f"{', '.join(features)}; mount it once with the kernel, or see it unreplayed with "
                          f"-o ro,noload")

    def never() -> None:
        raise OSError(errno.ENOSPC, "no room to replay the fast commits of the journal")

    _carry_out(driver, _start_fast_replay(driver, found.replay, UNBOUNDED_BLOCKS), never)
    driver.run(lambda: commit.close(driver.fs, 0))
    driver.fs.writing = None


def _start_fast_replay(driver: Driver, replay: Replay, limit: int) -> FastReplay:
    fs, changes = driver.fs, replay.fast_commits
    assert changes is not None
    driver.run(lambda: commit.start_writing(fs, limit))
    driver.run(lambda: orphan.recall(fs))
    return FastReplay(fs, changes)


def _carry_out(driver: Driver, work: FastReplay, settle: Callable[[], None]) -> None:
    for step in work.steps():
        place: int | None = 0
        while place is not None:
            def take(at: int = place) -> int | None:
                with Transaction(driver.fs) as tx:
                    return step(tx, at)  # noqa: B023 - run at once
            place = _run(driver, take, settle)


def _run(driver: Driver, operation: Callable[[], Result], settle: Callable[[], None]) -> Result:
    """The operation's result, the open batch being made durable when it needs that."""
    while True:
        try:
            return driver.run(operation)
        except CommitFirst:
            assert driver.fs.writing is not None
            if driver.fs.writing.batch.is_empty:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            settle()


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
    driver.run(lambda: commit.start_writing(fs, batch_limit(log)))
    driver.run(lambda: orphan.recall(fs))


def finish_orphans(driver: Driver, file: JournalFile | None, journal: JournalSuperblock | None
                   ) -> tuple[int, JournalSuperblock | None]:
    """Free the orphans without names and finish cutting the others: how many there were, and the journal after it.

    The file system must be changeable already.  What cannot be finished, because it is corrupt, stays an orphan.
    """
    fs, log = driver.fs, None
    assert fs.writing is not None
    found = list(fs.writing.orphans)
    if not found:
        return 0, journal
    if file is not None and journal is not None:
        idle = journal.changed(sequence=journal.sequence or 1)
        log = Journaled(idle, file, _head(idle), consecutive=True)
    settler = Settler(driver.device, fs, log)
    write_home(driver.device, fs, dict([driver.run(lambda: mountstate.being_recovered(fs))]))
    driver.device.flush()
    for number in found:
        try:
            while not _run(driver, lambda: _finish(driver, number), settler.commit):  # noqa: B023 - run at once
                pass
        except Corrupt:
            continue
    settler.commit()
    return len(found), journal if log is None else log.journal


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
