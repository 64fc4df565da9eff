"""Makes batches durable: through the journal, then home, in one thread of its own.

    commit() ─▶ the open batch is closed ─▶ thread: records, flush, commit block, flush ─▶ whoever waited goes on
                                                  when the log fills, or at leisure: checkpoint (home, flush, tail)

K1  At most one batch is on its way; those who ask meanwhile share the next one (group commit).
K2  File data that operations have written, and the records, are flushed before the commit block is written: a batch
    that names data is never durable before the data.
K3  A block goes home only after the batch that holds it is durable; the log's tail moves only after that is flushed.
K4  After a failed write nothing more is written: the file system turns read-only and every waiter hears of it.

Only ``_Writer`` runs in the thread; it sees closed batches, the journal's writer and the device, nothing else.
"""

import errno
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from fusewire import log
from fusewire.blockdev import BlockDevice
from fusewire.ext4 import commit
from fusewire.ext4.batch import ClosedBatch
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.journal import JournalWriter
from fusewire.ext4.journalfile import JournalFile
from fusewire.ext4.units import Geometry

CHECKPOINT_BLOCKS = 8192        # blocks waiting to go home; more would only cost memory
CHECKPOINT_SHARE = 2            # …or this part of the log being in use
WRITE_AT_ONCE = 256             # blocks of one write
UNJOURNALED_BATCH_BLOCKS = 4096

Told = Callable[[OSError | None], None]     # called in the loop's thread: durable, or why not
Post = Callable[..., None]                  # has the loop's thread call something soon


class Log:
    """The journal of one file system: its writer, and where its blocks lie."""

    def __init__(self, writer: JournalWriter, file: JournalFile) -> None:
        self.writer, self.file = writer, file


class _Writer:
    """What runs in the thread: one batch after the other to the device."""

    def __init__(self, device: BlockDevice, geometry: Geometry, journal: Log | None) -> None:
        self._device, self._geometry, self._log = device, geometry, journal
        self._live: deque[tuple[int, ClosedBatch]] = deque()
        self._homeless: dict[int, bytes] = {}   # newest durable content of blocks that are not home yet

    def write(self, batch: ClosedBatch) -> list[ClosedBatch]:
        """Make a batch durable; the batches that came home meanwhile."""
        if self._log is None:
            self._write_home(batch.blocks)
            self._device.flush()
            return [batch]
        if not batch.blocks and not batch.revoked:
            self._device.flush()
            return []
        home = self._make_room(self._log, batch)
        self._write_journal(self._log, batch)
        for block in batch.revoked:
            self._homeless.pop(block, None)
        self._homeless.update(batch.blocks)
        writer = self._log.writer
        crowded = writer.free * CHECKPOINT_SHARE < writer.journal.ring_blocks
        if crowded or len(self._homeless) > CHECKPOINT_BLOCKS:
            home += self.checkpoint()
        return home

    def checkpoint(self) -> list[ClosedBatch]:
        """Write home all that is durable, and give its room in the log back; the batches that came home."""
        if self._log is None or not self._live:
            return []
        self._write_home(self._homeless)
        self._homeless.clear()
        self._device.flush()
        writer, last = self._log.writer, self._live[-1][0]
        move = writer.checkpoint(last)
        if move is not None:
            self._write_superblock(self._log, move.superblock)
            self._device.flush()
            writer.release(move)
        home = [batch for _, batch in self._live]
        self._live.clear()
        return home

    def finish(self, superblock: tuple[int, bytes]) -> None:
        """Everything home, the log empty, and then the file system's superblock that says it is clean."""
        self.checkpoint()
        if self._log is not None:
            self._write_superblock(self._log, self._log.writer.empty())
            self._device.flush()
        self._write_home(dict([superblock]))
        self._device.flush()

    def start(self, superblock: tuple[int, bytes]) -> None:
        """Say on disk that the log is in use, before anything is in it."""
        self._write_home(dict([superblock]))
        self._device.flush()

    def record_abort(self, number: int) -> None:
        """Leave a note of the failure in the journal's superblock, for the next who mounts."""
        if self._log is not None:
            self._write_superblock(self._log, self._log.writer.aborted(number))
            self._device.flush()

    def _make_room(self, journal: Log, batch: ClosedBatch) -> list[ClosedBatch]:
        if journal.writer.fits(len(batch.blocks), len(batch.revoked)):
            return []
        home = self.checkpoint()
        if not journal.writer.fits(len(batch.blocks), len(batch.revoked)):
            raise OSError(errno.ENOSPC, "the journal is too small for this batch")
        return home

    def _write_journal(self, journal: Log, batch: ClosedBatch) -> None:
        writer = journal.writer
        superblock = writer.begin()
        if superblock is not None:
            self._write_superblock(journal, superblock)
        encoded = writer.encode(sorted(batch.blocks.items()), batch.revoked, time.time_ns())
        for first, blocks in encoded.runs():
            self._write_run(journal, first, blocks)
        self._device.flush()
        position, data = encoded.commit
        self._write_run(journal, position, [data])
        self._device.flush()
        self._live.append((encoded.sequence, batch))

    def _write_run(self, journal: Log, position: int, blocks: list[bytes]) -> None:
        done = 0
        for start, count in journal.file.runs(position, len(blocks)):
            self._write_blocks(start, blocks[done:done + count])
            done += count

    def _write_superblock(self, journal: Log, raw: bytes) -> None:
        self._device.write(self._geometry.byte_of(journal.file.place(0)), [raw])

    def _write_home(self, blocks: dict[int, bytes]) -> None:
        run: list[bytes] = []
        first = 0
        for block in sorted(blocks):
            if run and block != first + len(run):
                self._write_blocks(first, run)
                run = []
            if not run:
                first = block
            run.append(blocks[block])
        self._write_blocks(first, run)

    def _write_blocks(self, first: int, blocks: list[bytes]) -> None:
        for at in range(0, len(blocks), WRITE_AT_ONCE):
            self._device.write(self._geometry.byte_of(first + at), blocks[at:at + WRITE_AT_ONCE])


class Committer:
    """The loop's side: who waits for what, and when a batch is closed."""

    def __init__(self, fs: Ext4, device: BlockDevice, journal: Log | None, post: Post) -> None:
        self._fs = fs
        self._post = post
        self._writer = _Writer(device, fs.geometry, journal)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._waiting: list[Told] = []
        self._busy = False
        self.failure: OSError | None = None
        self.on_failure: Callable[[OSError], None] | None = None
        self.opened = 0.0               # when the open batch got its first change (monotonic seconds), 0: it is empty

    def start(self, superblock: tuple[int, bytes]) -> None:
        """Write the superblock of a file system in use (block, bytes), and begin.  Waits.  OSError if it fails."""
        self._writer.start(superblock)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way to the device."""
        return not self._busy and not self._waiting

    def commit(self, told: Told) -> None:
        """Make everything that was done until now durable, and say so."""
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
        """After the last commit: bring everything home and mark the file system.  Waits.  OSError if it fails."""
        assert self.is_idle
        self._jobs.put(None)
        self._thread.join()
        if self.failure is None:
            self._writer.finish(superblock)

    def _next(self) -> None:
        """Close the open batch and send it off, for all who wait."""
        told, self._waiting = self._waiting, []
        writing = self._fs.writing
        assert writing is not None
        if writing.batch.is_empty:
            for each in told:
                each(None)
            return
        closed = commit.close(self._fs, int(time.time()))
        self._run(lambda: self._writer.write(closed), closed, told)

    def _run(self, job: Callable[[], list[ClosedBatch]], closed: ClosedBatch | None, told: list[Told]) -> None:
        self._busy = True

        def work() -> None:
            failure, home = None, []
            try:
                home = job()
            except OSError as error:
                failure = error
            self._post(self._done, closed, home, failure, told)

        self._jobs.put(work)

    def _done(self, closed: ClosedBatch | None, home: list[ClosedBatch], failure: OSError | None,
              told: list[Told]) -> None:
        self._busy = False
        if failure is not None:
            self._abort(failure)
        else:
            if closed is not None:
                commit.durable(self._fs, closed)
            for batch in home:
                commit.home(self._fs, batch)
        for each in told:
            each(failure)
        if self._waiting:
            if self.failure is not None:
                waiting, self._waiting = self._waiting, []
                for each in waiting:
                    each(self.failure)
            else:
                self._next()

    def _abort(self, failure: OSError) -> None:
        self.failure = failure
        log.error("journal_aborted", error=str(failure), consequence="the file system is read-only now")
        number = failure.errno or errno.EIO
        self._jobs.put(lambda: self._record(number))
        if self.on_failure is not None:
            self.on_failure(failure)

    def _record(self, number: int) -> None:
        try:
            self._writer.record_abort(number)
        except OSError as error:
            log.error("abort_not_recorded", error=str(error))

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            job()
            del job
