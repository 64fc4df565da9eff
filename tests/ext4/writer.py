"""Images written through the ext4 core as a library, without a daemon or a journal, and judged by e2fsck.

``Writer`` copies an image, runs operations in transactions (fetching what they miss, closing the batch when they ask
for it), writes closed batches home at once, and has e2fsck look at the result.

    with Writer(image("-t ext4")) as writer:
        writer.change(lambda tx: namestore.mkdir(tx, writer.inode(2), b"d", 0o755, ROOT))
        writer.check()
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fusewire.ext4 import commit, iomapwrite, truncate
from fusewire.ext4.batch import BatchLimits, ClosedBatch
from fusewire.ext4.blocks import BlockMiss
from fusewire.ext4.filesystem import Options
from fusewire.ext4.transaction import CommitFirst, Transaction
from tests.ext4.driver import ENVIRONMENT, RESTARTS_MOST, Core, Livelock, new_path

Result = TypeVar("Result")

BATCH_BLOCKS = 1000
START = 1_600_000_000


class Writer(Core):
    """A copy of an image (or the image itself, with ``copy=False``) that operations change.

    ``clock`` is the time that the next transaction is stamped with, None for the real one; ``closed`` counts batches.
    """

    def __init__(self, image: Path, options: Options | None = None, batch_blocks: int = BATCH_BLOCKS,
                 cache_bytes: int | None = None, *, copy: bool = True) -> None:
        self.path = Path(shutil.copy(image, new_path())) if copy else image
        super().__init__(self.path, options, cache_bytes)
        self._out = os.open(self.path, os.O_RDWR)
        self.clock: tuple[int, int] | None = None
        self.privileged, self.closed = True, 0
        self.last: ClosedBatch | None = None
        self.run(commit.start_writing, BatchLimits(batch_blocks))

    def close(self) -> None:
        if self._out >= 0:
            os.close(self._out)
            self._out = -1
        super().close()

    def change(self, operation: Callable[..., Result], *arguments: object) -> Result:
        """What ``operation(tx, *arguments)`` returns or raises, as one transaction."""
        for _ in range(RESTARTS_MOST):
            try:
                with Transaction(self.fs, self.clock, self.privileged) as tx:
                    result = operation(tx, *arguments)
            except BlockMiss as miss:
                self.fs.cache.admit(self.fetch(miss.runs))
            except CommitFirst:
                assert self.fs.writing is not None
                assert not self.fs.writing.batch.is_empty or self.fs.writing.held.count, "nothing to commit first"
                self.commit()
            else:
                return result
        raise Livelock(f"{operation} {arguments} started again {RESTARTS_MOST} times")

    def commit(self) -> None:
        """Close the open batch and write it home."""
        closed = commit.close(self.fs, START)
        for block, data in closed.blocks.items():
            os.pwrite(self._out, data, block * self.block_bytes)
        due = commit.durable(self.fs, closed)
        commit.home(self.fs, closed.entries)
        self.closed, self.last = self.closed + 1, closed
        for number in due:
            self.change(self._clear, number)

    def _clear(self, tx: Transaction, number: int) -> None:
        """Zeroes behind the end of a file whose cut is durable."""
        tail = iomapwrite.tail_to_clear(tx, tx.inode(number))
        if tail is not None:
            os.pwrite(self._out, bytes(tail[1]), tail[0])
        truncate.cleared(tx, tx.inode(number))

    def settle(self) -> None:
        """Commit, until nothing is left to do."""
        self.commit()
        assert self.fs.writing is not None
        while not self.fs.writing.batch.is_empty:
            self.commit()

    def check(self) -> None:
        """Commit, and let e2fsck look: it must find nothing."""
        self.settle()
        self.check_only()

    def check_only(self) -> None:
        """Let e2fsck look at the image as it is."""
        done = subprocess.run(["e2fsck", "-fn", str(self.path)], capture_output=True, env=ENVIRONMENT, check=False)
        text = done.stdout.decode("latin-1")
        assert done.returncode == 0, text
        assert not re.search(r"FIXED|\? no$|ERRORS", text, re.MULTILINE), text

    def reopened(self) -> Writer:
        """The same image, opened anew after a commit: nothing remembered but what the disk holds."""
        self.settle()
        self.close()
        return Writer(self.path, self.fs.options, copy=False)
