"""Threads that wait for the backing device in place of the loop.

Measured (random 4 KiB reads at depth 16, nothing resident, two cores, with the requests and replies of FUSE): 4 threads
18,000 a second, 8 as many, 16 threads 14,000 (they fight for the interpreter); the kernel's ext4 on a loop device does
12,000.  Eight keep a disk busy that needs a deeper queue, since reading was begun for all that is waiting
(``BlockDevice.read_into_now``), whoever waits for the end of it.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue

from fusewire import fileio

THREADS = 8

Job = Callable[[memoryview], None]


class Workers:
    """A fixed number of threads, made at the first job, that carry out jobs in order, each with its own buffer."""

    def __init__(self, threads: int = THREADS) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._wanted = threads
        self._threads: list[threading.Thread] = []

    def submit(self, job: Job) -> None:
        """Have a thread call ``job`` with its buffer, of ``fileio.BUFFER_BYTES``.  The job must not raise."""
        if not self._threads:
            self._threads = [threading.Thread(target=self._work, name=f"worker-{number}", daemon=True)
                             for number in range(self._wanted)]
            for thread in self._threads:
                thread.start()
        self._jobs.put(job)

    def stop(self, seconds: float) -> bool:
        """Whether all threads ended within so long; one that a dead device holds does not."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(seconds)
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        buffer = fileio.buffer()
        while True:
            job = self._jobs.get()
            if job is None:
                return
            job(buffer)
            del job  # it holds the request and the plan, which the next job may be long in replacing
