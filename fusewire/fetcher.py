"""Brings blocks into the cache for steps that wait for them: what is resident at once, the rest by worker threads."""

import errno
from collections.abc import Callable

from fusewire.blockdev import BlockDevice, BlockReader, Fetched, Runs
from fusewire.ext4.filesystem import Ext4
from fusewire.waiting import Waiter
from fusewire.workers import Workers


class Fetcher:
    """What is being fetched, and who waits for it; in the loop's thread, but for the reading."""

    def __init__(self, device: BlockDevice, fs: Ext4, scratch: memoryview, workers: Workers,
                 attempt: Callable[..., None], post: Callable[..., None], resume: Callable[[Waiter], None]) -> None:
        """
        Args:
            scratch: a buffer that only the loop's thread uses, and not while it fetches.
            attempt: calls a function with arguments for a request or none, and sees to what it raises.
            post: has the loop's thread call a function with arguments; may be called from any thread.
            resume: goes on with a step that has what it waited for.
        """
        self._device, self._fs, self._workers = device, fs, workers
        self._attempt, self._post, self._resume = attempt, post, resume
        self._reader = BlockReader(device, fs.geometry, scratch)
        self._fetching: dict[int, list[Waiter]] = {}    # block → who waits for it

    def fetch(self, waiter: Waiter, runs: Runs) -> bool:
        """Bring blocks into the cache: False if they are there now, True if the step waits for them."""
        found, missing = self._reader.read_now(runs)
        self._fs.cache.admit(found)
        if not missing:
            return False
        asked: list[tuple[int, int]] = []
        for first, count in missing:
            for block in range(first, first + count):
                self._join(waiter, block, asked)
        if asked:
            self._workers.submit(lambda buffer: self._attempt(None, self._read, asked, buffer))
        return True

    def _join(self, waiter: Waiter, block: int, asked: list[tuple[int, int]]) -> None:
        """Wait for a block; if nobody else does yet, it is added to the runs that are asked for now."""
        waiter.fetches += 1
        others = self._fetching.get(block)
        if others is not None:
            others.append(waiter)
            return
        self._fetching[block] = [waiter]
        self._fs.cache.expect(block)
        if asked and sum(asked[-1]) == block:
            asked[-1] = (asked[-1][0], asked[-1][1] + 1)
        else:
            asked.append((block, 1))

    def _read(self, runs: list[tuple[int, int]], buffer: memoryview) -> None:
        """Read the runs, in a worker thread; whatever happens, those who wait for them go on."""
        blocks = [block for first, count in runs for block in range(first, first + count)]
        found: Fetched = dict.fromkeys(blocks, OSError(errno.EIO, "not read"))
        try:
            found = BlockReader(self._device, self._fs.geometry, buffer).read(runs)
        finally:
            self._post(self._arrived, found)

    def _arrived(self, found: Fetched) -> None:
        """Admit what a thread has read, and go on with the steps that have all they waited for."""
        self._fs.cache.admit_expected(found)
        for block in found:
            for waiter in self._fetching.pop(block, ()):
                waiter.fetches -= 1
                if not waiter.fetches:
                    self._resume(waiter)
