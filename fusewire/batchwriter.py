"""The order in which batches reach the device: through the journal, then home.

    write()        the records into the log, flush ─▶ the commit block, flush: the batch is durable
    checkpoint()   what is durable home, flush ─▶ the log's tail, flush: its room is free again

The first batch of an empty log is written with its commit block, and durable when the journal's superblock, which then
says that the log begins there, is.

B1  File data that operations have written, and the records, are flushed before the sector is written that makes the
    batch durable: a batch that names data is never durable before the data.
B2  A block goes home only after the batch that holds it is durable; the log's tail moves only after that is flushed.
B3  After a failed write nothing more is written but a note of it.
B4  A commit block cannot be torn: its place is zeroed, durably, before it is written, and only its first sector holds
    anything.  What old blocks leave in the others would fail its checksum, and recovery then refuses the whole log.
B5  Only a block whose copy the log holds needs a revocation, and an empty log needs none.  So the size of a batch is
    that of its blocks (``limits``), whatever it frees.
B6  What a durable batch freed is discarded before anybody hears that it is durable, so before it is used again.

A ``BatchWriter`` sees closed batches, the journal's writer and the device, nothing else: it may run in a thread
(``committer``).
"""

import errno
import time
from collections.abc import Callable, Iterable, Mapping

from fusewire import log
from fusewire.blockdev import BlockDevice
from fusewire.ext4.batch import BatchLimits, ClosedBatch
from fusewire.ext4.blocks import CachedBlock
from fusewire.ext4.errors import Refused
from fusewire.ext4.journal import JournalWriter
from fusewire.ext4.journalfile import JournalFile
from fusewire.ext4.units import Geometry

CHECKPOINT_BLOCKS = 8192        # blocks waiting to go home; more would only cost memory
CHECKPOINT_BYTES = 32 << 20     # …and their bytes, where blocks are large
CHECKPOINT_SHARE = 2            # …or this part of the log being in use
WRITE_AT_ONCE = 256             # blocks of one write
BATCH_BLOCKS = 4096             # more in one batch saves no time, and two batches and what waits are in memory
BATCH_BYTES = 16 << 20

Entries = dict[int, CachedBlock]


class Log:
    """The journal of one file system: its writer, and where its blocks lie."""

    def __init__(self, writer: JournalWriter, file: JournalFile) -> None:
        self.writer, self.file = writer, file


def limits(journal: Log | None, block_bytes: int) -> BatchLimits:
    """How large batches may become; closing one adds the superblock to it."""
    collected = min(BATCH_BLOCKS, BATCH_BYTES // block_bytes)
    if journal is None:
        return BatchLimits(collected)
    return BatchLimits(min(collected, journal.writer.max_blocks - 1), journal.writer.most_blocks - 1)


def freed_ranges(geometry: Geometry, freed: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, length) in bytes of freed clusters (first, count), neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for first, count in sorted(freed):
        start = geometry.byte_of(geometry.first_data_block + first * geometry.cluster_blocks)
        length = geometry.byte_of(count * geometry.cluster_blocks)
        if ranges and sum(ranges[-1]) == start:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
        else:
            ranges.append((start, length))
    end = geometry.byte_of(geometry.blocks)     # the last cluster may reach beyond
    return [(start, min(length, end - start)) for start, length in ranges]


class BatchWriter:
    """The device's side: writes one batch after the other, and waits for each."""

    def __init__(self, device: BlockDevice, geometry: Geometry, journal: Log | None, discard: bool = False) -> None:
        """``discard``: tell the device what batches free."""
        assert journal is None or not journal.writer.in_log(), "what the log holds is brought home before"
        self._device, self._geometry, self._log = device, geometry, journal
        self._homeless: Entries = {}    # the newest durable content of blocks whose copies are in the log only
        self.failure: OSError | None = None
        self.discards = discard

    def attempt(self, job: Callable[[], Entries]) -> tuple[Entries, OSError | None]:
        """What a job returns, and None; or why it failed, or one before it (B3)."""
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

    def write(self, batch: ClosedBatch, superblock: tuple[int, bytes] | None = None) -> Entries:
        """Make a batch durable; the blocks that came home meanwhile.

        ``superblock`` is written before, if the one on disk says that the file system is not in use (``finish``).
        """
        if superblock is not None:
            self._write_super(superblock)
        home = self._write_through(self._log, batch) if self._log is not None else self._write_unjournaled(batch)
        if self.discards:
            self._discard(batch)
        return home

    def _write_unjournaled(self, batch: ClosedBatch) -> Entries:
        if batch.wrote_data:
            self._device.flush()
        self._write_home(batch.entries)
        self._device.flush()
        return batch.entries

    def _write_through(self, journal: Log, batch: ClosedBatch) -> Entries:
        if not batch.blocks:
            self._device.flush()
            return {}
        home = self._make_room(journal, batch)
        self._write_log(journal, batch)
        for block in batch.revoked:
            self._homeless.pop(block, None)
        self._homeless.update(batch.entries)
        return home

    def flush(self) -> Entries:
        """Make the file data durable that operations have written, and nothing else; no block came home."""
        self._device.flush()
        return {}

    @property
    def is_crowded(self) -> bool:
        """Whether a checkpoint is due.  To be asked while no job runs."""
        if self._log is None:
            return False
        writer = self._log.writer
        return writer.free * CHECKPOINT_SHARE < writer.journal.ring_blocks or self._are_many()

    def _are_many(self) -> bool:
        """Whether blocks that wait to go home take more memory than they should."""
        return len(self._homeless) > min(CHECKPOINT_BLOCKS, CHECKPOINT_BYTES // self._geometry.block_bytes)

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

    def _discard(self, batch: ClosedBatch) -> None:
        """Tell the device what a durable batch freed (B6); one that does not want to know is not told again."""
        try:
            for offset, length in freed_ranges(self._geometry, batch.freed):
                self._device.discard(offset, length)
        except (Refused, OSError) as error:
            self.discards = False
            log.warning("discard_turned_off", reason=error.strerror if isinstance(error, OSError) else str(error))

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
        if journal.writer.fits(len(batch.blocks), len(self._revocations(batch))) and not self._are_many():
            return {}
        home = self.checkpoint()
        if not journal.writer.fits(len(batch.blocks)):
            raise OSError(errno.ENOSPC, "the journal is too small for this batch")
        return home

    def _revocations(self, batch: ClosedBatch) -> list[int]:
        """The freed blocks that a replay would write otherwise (B5)."""
        return [block for block in batch.revoked if block in self._homeless]

    def _write_log(self, journal: Log, batch: ClosedBatch) -> None:
        writer = journal.writer
        encoded = writer.encode(sorted(batch.blocks.items()), self._revocations(batch), time.time_ns())
        position, data = encoded.commit
        end = bytes(len(data)) if writer.begun else data
        for first, blocks in encoded._replace(records=[*encoded.records, (position, end)]).runs():
            self._write_run(journal, first, blocks)
        self._device.flush()
        if writer.begun:
            self._write_run(journal, position, [data])
        else:
            self._write_journal_super(journal, writer.begin())
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
        write_home(self._device, self._geometry, {block: entry.data for block, entry in entries.items()})

    def _write_blocks(self, first: int, blocks: list[bytes]) -> None:
        for at in range(0, len(blocks), WRITE_AT_ONCE):
            self._device.write(self._geometry.byte_of(first + at), blocks[at:at + WRITE_AT_ONCE])


def write_home(device: BlockDevice, geometry: Geometry, blocks: Mapping[int, bytes]) -> None:
    """Write blocks to their places, neighbours together.  OSError."""
    run: list[bytes] = []
    for block in sorted(blocks):
        run.append(blocks[block])
        if len(run) == WRITE_AT_ONCE or block + 1 not in blocks:
            device.write(geometry.byte_of(block - len(run) + 1), run)
            run = []
