"""Makes batches durable one at a time, waiting for each: for what is done before the loop and the committer run.

The log holds no more than one batch, and that is written before the journal's superblock says that it is there:

    idle ─▶ batch into the log, flush ─▶ superblock: the log begins here, flush ─▶ blocks home, flush ─▶ idle, flush

An *idle* superblock says that there is nothing to replay, or, while fast commits are being applied, that a log which
holds nothing ends before the transaction that they name: so they stay valid.  The last batch is that transaction, which
makes them void in the moment in which it becomes durable:

    idle ─▶ records into the log, flush ─▶ commit block, flush (durable, fast commits void) ─▶ blocks home, flush
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fusewire.ext4 import commit
from fusewire.ext4.journal import JournalWriter
from fusewire.ext4.journalsuper import SEQUENCES, JournalSuperblock

if TYPE_CHECKING:
    from fusewire.blockdev import BlockDevice
    from fusewire.ext4.filesystem import Ext4
    from fusewire.ext4.journalfile import JournalFile

WRITE_AT_ONCE = 256     # blocks


class Journaled:
    """Where batches go: the journal's idle superblock, and the number and place of the one batch in the log.

    ``consecutive``: each batch has the next number; otherwise all have the one before that of the fast commits.
    """

    def __init__(self, journal: JournalSuperblock, file: "JournalFile", head: int, *, consecutive: bool) -> None:
        self.file, self.head, self.consecutive = file, head, consecutive
        self.sequence = (journal.sequence - (0 if consecutive else 1)) % SEQUENCES
        self.journal = journal      # idle
        self.is_last = False
        self._form = journal.changed(start=head)

    @property
    def writer(self) -> JournalWriter:
        """The writer for the next batch, to which the whole log belongs."""
        return JournalWriter(self._form, self.head, self.sequence)

    def last_one(self) -> None:
        """The next batch is the transaction that fast commits name; the idle superblock must point at its place."""
        assert not self.consecutive and self.journal.start == self.head
        self.is_last, self.sequence = True, self.journal.sequence

    def begun(self) -> bytes:
        """The superblock for a log with this batch in it."""
        return self._form.patched(sequence=self.sequence, start=self.head)

    def came_home(self) -> bytes:
        """The idle superblock after it."""
        if self.consecutive:
            self.sequence = (self.sequence + 1) % SEQUENCES
            self.journal = self.journal.changed(sequence=self.sequence)
        return self.journal.raw


class Settler:
    """Commits the open batch of a file system, and returns when it is at home."""

    def __init__(self, device: "BlockDevice", fs: "Ext4", log: Journaled | None) -> None:
        """``log`` is None for a file system without a journal, whose batches go home at once."""
        self._device, self._fs, self._log = device, fs, log

    def commit(self) -> None:
        """Make all that was done until now durable.  OSError if the device fails: the next mount goes on from there."""
        closed = commit.close(self._fs, int(time.time()))
        if self._log is not None:
            self._write_log(self._log, closed.blocks)
        write_home(self._device, self._fs, closed.blocks)
        self._device.flush()
        if self._log is not None and not self._log.is_last:
            self._write_superblock(self._log, self._log.came_home())
        commit.durable(self._fs, closed)
        commit.home(self._fs, closed.entries)

    def _write_log(self, log: Journaled, blocks: Mapping[int, bytes]) -> None:
        """No revocations: older copies of blocks are not in the log any more."""
        encoded = log.writer.encode(sorted(blocks.items()), (), time.time_ns())
        position, data = encoded.commit
        records = [*encoded.records, (position, bytes(len(data)) if log.is_last else data)]
        for place, record in records:
            self._device.write(self._fs.geometry.byte_of(log.file.place(place)), [record])
        self._device.flush()
        if log.is_last:
            self._device.write(self._fs.geometry.byte_of(log.file.place(position)), [data])
            self._device.flush()
        else:
            self._write_superblock(log, log.begun())

    def _write_superblock(self, log: Journaled, raw: bytes) -> None:
        self._device.write(self._fs.geometry.byte_of(log.file.place(0)), [raw])
        self._device.flush()


def write_home(device: "BlockDevice", fs: "Ext4", blocks: Mapping[int, bytes]) -> None:
    """Write blocks to their places, neighbours together.  OSError."""
    run: list[bytes] = []
    for block in sorted(blocks):
        run.append(blocks[block])
        if len(run) == WRITE_AT_ONCE or block + 1 not in blocks:
            device.write(fs.geometry.byte_of(block - len(run) + 1), run)
            run = []
