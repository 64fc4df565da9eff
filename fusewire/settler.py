"""Makes batches durable while nobody else does anything: before the loop and the committer run."""

import time

from fusewire.batchwriter import BatchWriter, Log
from fusewire.blockdev import BlockDevice
from fusewire.ext4 import commit
from fusewire.ext4.filesystem import Ext4


class Settler:
    """Commits the open batch of a file system, and returns when it is durable.

    OSError if the device fails: the next mount goes on from there.
    """

    def __init__(self, device: BlockDevice, fs: Ext4, log: Log | None) -> None:
        """``log`` holds nothing; it is None for a file system without a journal, whose batches go home at once."""
        self._fs, self._writer = fs, BatchWriter(device, fs.geometry, log)

    def commit(self) -> None:
        """Make all that was done until now durable."""
        closed = commit.close(self._fs, int(time.time()))
        home = self._writer.write(closed)
        commit.durable(self._fs, closed)
        commit.home(self._fs, home)

    def finish(self) -> None:
        """Commit, and bring everything home: the log holds nothing then."""
        self.commit()
        commit.home(self._fs, self._writer.checkpoint())
