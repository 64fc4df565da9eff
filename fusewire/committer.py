"""Makes batches durable: through the journal, then home, in one thread of its own.

    commit() ─▶ the open batch is closed ─▶ thread: records, flush, commit block, flush ─▶ whoever waited goes on
                                                  at leisure, or when the log fills: checkpoint (home, flush, tail)

K1  At most one batch is on its way; those who ask meanwhile share the next one (group commit).
K2  File data that operations have written, and the records, are flushed before the commit block is written: a batch
    that names data is never durable before the data.
K3  A block goes home only after the batch that holds it is durable; the log's tail moves only after that is flushed.
K4  After a failed write nothing more is written but a note of it: the file system turns read-only, every waiter hears
    of it, and so does whoever asks later.
K5  Whoever asks is told exactly once.
K6  A commit block cannot be torn: its place is zeroed, durably, before it is written, and only its first sector holds
    anything.  What old blocks leave in the others would fail its checksum, and recovery then refuses the whole log.
K7  Only a block whose copy the log holds needs a revocation, and an empty log needs none.  So the size of a batch is
    that of its blocks (``batch_limit``), whatever it frees.

Only ``_Writer`` runs in the thread; it sees closed batches, the journal's writer and the device, nothing else.
"""

import errno
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from fusewire import log
from fusewire.blockdev import BlockDevice
from fusewire.ext4 import commit
from fusewire.ext4.batch import ClosedBatch
from fusewire.ext4.blocks import CachedBlock
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.journal import JournalWriter
from fusewire.ext4.journalfile import JournalFile
from fusewire.ext4.units import Geometry

CHECKPOINT_BLOCKS = 8192        # blocks waiting to go home; more would only cost memory
CHECKPOINT_SHARE = 2            # …or this part of the log being in use
WRITE_AT_ONCE = 256             # blocks of one write
BATCH_BLOCKS = 4096             # more in one batch saves no time, and two batches and what waits are in memory
UNJOURNALED_BATCH_BLOCKS = BATCH_BLOCKS

Entries = dict[int, CachedBlock]
Told = Callable[[OSError | None], None]     # called in the loop's thread: durable, or why not; must not raise
Post = Callable[..., None]                  # has the loop's thread call something soon


class Log:
    """The journal of one file system: its writer, and where its blocks lie."""

    def __init__(self, writer: JournalWriter, file: JournalFile) -> None:
        self.writer, self.file = writer, file


def batch_limit(journal: Log | None) -> int:
    """The most blocks that a batch may collect before it is closed, which adds the superblock to it."""
    return BATCH_BLOCKS if journal is None else min(BATCH_BLOCKS, journal.writer.max_blocks - 1)


class _Writer:
    """What runs in the thread: one batch after the other to the device."""

    def __init__(self, device: BlockDevice, geometry: Geometry, journal: Log | None) -> None:
        assert journal is None or not journal.writer.in_log(), "what the log holds is brought home before"
        self._device, self._geometry, self._log = device, geometry, journal
        self._homeless: Entries = {}    # the newest durable content of blocks whose copies are in the log only
        self.failure: OSError | None = None

    def attempt(self, job: Callable[[], Entries]) -> tuple[Entries, OSError | None]:
        """What a job returns, and None; or why it failed, or one before it (K4)."""
        if self.failure is None:
            try:
                return job(), None
            except OSError as error:
                self._fail(error)
            except Exception as error:  # those who wait must hear of it, too
                log.bug("journal_failed", error)
                self._fail(OSError(errno.EIO, f"{type(error).__name__}: {error}"))
        return {}, self.failure

    def start(self, superblock: tuple[int, bytes]) -> None:
        """Say on disk that the log is in use, before anything is in it."""
        self._write_super(superblock)

    def write(self, batch: ClosedBatch) -> Entries:
        """Make a batch durable; the blocks that came home meanwhile."""
        if self._log is None:
            if batch.wrote_data:
                self._device.flush()
            self._write_home(batch.entries)
            self._device.flush()
            return batch.entries
        if not batch.blocks:
            self._device.flush()
            return {}
        home = self._make_room(self._log, batch)
        self._write_log(self._log, batch)
        for block in batch.revoked:
            self._homeless.pop(block, None)
        self._homeless.update(batch.entries)
        return home

    @property
    def is_crowded(self) -> bool:
        """Whether a checkpoint is due.  To be asked while no job runs."""
        if self._log is None:
            return False
        writer = self._log.writer
        return writer.free * CHECKPOINT_SHARE < writer.journal.ring_blocks or len(self._homeless) > CHECKPOINT_BLOCKS

    def checkpoint(self) -> Entries:
        """Write home all that is durable, and give its room in the log back; the blocks that came home."""
        if self._log is None or not self._log.writer.in_log():
            return {}
        home, writer = self._homeless, self._log.writer
        self._write_home(home)
        self._device.flush()
        move = writer.checkpoint(writer.in_log()[-1])
        assert move is not None
        self._write_journal_super(self._log, move.superblock)
        self._device.flush()
        writer.release(move)
        self._homeless = {}
        return home

    def finish(self, superblock: tuple[int, bytes]) -> Entries:
        """Everything home, the log empty, and then the file system's superblock that says it is clean."""
        home = self.checkpoint()
        if self._log is not None:
            self._write_journal_super(self._log, self._log.writer.empty())
            self._device.flush()
        self._write_super(superblock)
        return home

    def _fail(self, error: OSError) -> None:
        """Leave a note of a failure in the journal's superblock, for the next who mounts; the last that is written."""
        self.failure = error
        if self._log is None:
            return
        try:
            self._write_journal_super(self._log, self._log.writer.aborted(error.errno or errno.EIO))
            self._device.flush()
        except OSError as further:
            log.error("abort_not_recorded", error=str(further))

    def _make_room(self, journal: Log, batch: ClosedBatch) -> Entries:
        """A checkpoint, if the batch does not fit without; the blocks that came home."""
        if journal.writer.fits(len(batch.blocks), len(self._revocations(batch))) \
                and len(self._homeless) <= CHECKPOINT_BLOCKS:
            return {}
        home = self.checkpoint()
        if not journal.writer.fits(len(batch.blocks)):
            raise OSError(errno.ENOSPC, "the journal is too small for this batch")
        return home

    def _revocations(self, batch: ClosedBatch) -> list[int]:
        """The freed blocks that a replay would write otherwise (K7)."""
        return [block for block in batch.revoked if block in self._homeless]

    def _write_log(self, journal: Log, batch: ClosedBatch) -> None:
        writer = journal.writer
        superblock = writer.begin()
        if superblock is not None:
            self._write_journal_super(journal, superblock)
        encoded = writer.encode(sorted(batch.blocks.items()), self._revocations(batch), time.time_ns())
        position, data = encoded.commit
        for first, blocks in encoded._replace(records=[*encoded.records, (position, bytes(len(data)))]).runs():
            self._write_run(journal, first, blocks)
        self._device.flush()
        self._write_run(journal, position, [data])
        self._device.flush()

    def _write_run(self, journal: Log, position: int, blocks: list[bytes]) -> None:
        done = 0
        for start, count in journal.file.runs(position, len(blocks)):
            self._write_blocks(start, blocks[done:done + count])
            done += count

    def _write_journal_super(self, journal: Log, raw: bytes) -> None:
        self._write_blocks(journal.file.place(0), [raw])

    def _write_super(self, superblock: tuple[int, bytes]) -> None:
        block, data = superblock
        self._write_blocks(block, [data])
        self._device.flush()

    def _write_home(self, entries: Entries) -> None:
        run: list[bytes] = []
        first = 0
        for block in sorted(entries):
            if run and block != first + len(run):
                self._write_blocks(first, run)
                run = []
            if not run:
                first = block
            run.append(entries[block].data)
        self._write_blocks(first, run)

    def _write_blocks(self, first: int, blocks: list[bytes]) -> None:
        for at in range(0, len(blocks), WRITE_AT_ONCE):
            self._device.write(self._geometry.byte_of(first + at), blocks[at:at + WRITE_AT_ONCE])


class Committer:
    """The loop's side: who waits for what, and when a batch is closed."""

    def __init__(self, fs: Ext4, device: BlockDevice, journal: Log | None, post: Post) -> None:
        """
        Args:
            journal: of a file system whose log is empty; None if it has none.
            post: has the loop's thread call a function with arguments; may be called from any thread.
        """
        self._fs = fs
        self._post = post
        self._writer = _Writer(device, fs.geometry, journal)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._waiting: list[Told] = []
        self._busy = False              # a job is in the thread, or its end on the way to the loop
        self.failure: OSError | None = None
        self.on_failure: Callable[[OSError], None] | None = None
        self.on_durable: Callable[[ClosedBatch], None] = partial(commit.durable, fs)

    def start(self, superblock: tuple[int, bytes]) -> None:
        """Write the superblock of a file system in use (block, bytes), and begin.  Waits.  OSError if it fails."""
        self._writer.start(superblock)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way to the device."""
        return not self._busy and not self._waiting

    def commit(self, told: Told) -> None:
        """Make everything that was done until now durable, and say so; at once if it is so already."""
        if self.failure is not None:
            told(self.failure)
            return
        self._waiting.append(told)
        if not self._busy:
            self._next()

    def checkpoint(self) -> None:
        """At leisure: bring home what is durable."""
        if not self._busy and self.failure is None:
            self._run(self._writer.checkpoint, None, [])

    def finish(self, superblock: tuple[int, bytes]) -> None:
        """After the last commit: bring everything home and mark the file system.  Waits, also for what is on its way.

        Raises OSError if that fails, or anything before it; the file system is not marked then.  Nothing can be
        committed afterwards.
        """
        writing = self._fs.writing
        if self._waiting or not (writing is None or writing.batch.is_empty):
            raise OSError(errno.EBUSY, "changed after the last commit")
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        if self.failure is not None:
            raise self.failure
        _, failure = self._writer.attempt(partial(self._writer.finish, superblock))
        if failure is not None:
            self._abort(failure)
            raise failure
        self.failure = OSError(errno.ESHUTDOWN, "the file system was put away")

    def _next(self) -> None:
        """Close the open batch and send it off, for all who wait."""
        told, self._waiting = self._waiting, []
        writing = self._fs.writing
        assert writing is not None
        if writing.batch.is_empty:
            _tell(told, None)
            return
        try:
            closed = commit.close(self._fs, int(time.time()))
        except Exception as error:  # what the batch held is lost, so nothing may be written on top of it
            self._run(partial(_raise, error), None, told)
            return
        self._run(partial(self._writer.write, closed), closed, told)

    def _run(self, job: Callable[[], Entries], closed: ClosedBatch | None, told: list[Told]) -> None:
        self._busy = True

        def work() -> None:
            home, failure = self._writer.attempt(job)
            self._post(self._done, closed, home, failure, told)

        self._jobs.put(work)

    def _done(self, closed: ClosedBatch | None, home: Entries, failure: OSError | None, told: list[Told]) -> None:
        self._busy = False
        if failure is not None:
            self._abort(failure)
        else:
            self._settle(closed, home)
        _tell(told, failure)
        self._go_on()

    def _settle(self, closed: ClosedBatch | None, home: Entries) -> None:
        """Let the core know what is durable and what is home; if that fails, what is in memory is not to be trusted."""
        try:
            if closed is not None:
                self.on_durable(closed)
            commit.home(self._fs, _arrived(home))
        except Exception as error:
            log.bug("batch_not_settled", error)
            self._abort(OSError(errno.EIO, f"{type(error).__name__}: {error}"))

    def _go_on(self) -> None:
        """What is next, unless one of those who were told has begun it already."""
        if self.failure is not None:
            waiting, self._waiting = self._waiting, []
            _tell(waiting, self.failure)
            return
        if self._waiting and not self._busy:
            self._next()
        if not self._busy and self._writer.is_crowded:
            self.checkpoint()

    def _abort(self, failure: OSError) -> None:
        if self.failure is not None:
            return
        self.failure = failure
        log.error("journal_aborted", error=str(failure), consequence="the file system is read-only now")
        if self.on_failure is not None:
            self.on_failure(failure)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            job()
            del job


def _tell(told: list[Told], failure: OSError | None) -> None:
    for each in told:
        try:
            each(failure)
        except Exception as error:  # the others must hear of it, too
            log.bug("commit_answer_failed", error)


def _raise(error: Exception) -> Entries:
    raise error


def _arrived(entries: Entries) -> ClosedBatch:
    """Blocks of several batches that came home, as ``commit.home`` takes them."""
    return ClosedBatch(0, {}, entries, frozenset(), (), False)
