"""Makes batches durable in a thread of its own, and tells those who wait for it.

    commit() ─▶ the open batch is closed ─▶ thread: ``BatchWriter.write`` ─▶ whoever waited goes on
                                                  at leisure, or when the log fills: ``BatchWriter.checkpoint``

K1  At most one batch is on its way; those who ask meanwhile share the next one (group commit).
K2  After a failed write the file system turns read-only, every waiter hears of it, and so does whoever asks later.
K3  Whoever asks is told exactly once.
K4  Who needs no more than data, and finds nothing changed but times, gets a flush; the batch stays open.
K5  On disk the file system is marked as in use before the first change is.  While it is at ``rest``, that is: while the
    kernel has it mounted read-only, everything is home and it is marked clean.
"""

import errno
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

from fusewire import log
from fusewire.batchwriter import BatchWriter, Entries, Log
from fusewire.blockdev import BlockDevice
from fusewire.ext4 import commit, mountstate
from fusewire.ext4.batch import ClosedBatch
from fusewire.ext4.filesystem import Ext4
from fusewire.options import DEFAULT_COMMIT_SECONDS

Told = Callable[[OSError | None], None]     # called in the loop's thread: durable, or why not; must not raise
Post = Callable[..., None]                  # has the loop's thread call something soon
Answer = Callable[[], None]                 # called in the committer's thread: durable; must not raise

BATCH_SHARE = 2         # a batch is sent off when it has this part of what the journal takes


class Asked(NamedTuple):
    """Who waits: how they are told, whether they can do without times, and what spares them a hop between threads."""

    told: Told
    only_data: bool = False
    answer: Answer | None = None


class Committer:
    """The loop's side: who waits for what, and when a batch is closed."""

    def __init__(self, fs: Ext4, device: BlockDevice, journal: Log | None, post: Post,
                 commit_seconds: int = DEFAULT_COMMIT_SECONDS, discard: bool = False) -> None:
        """
        Args:
            journal: of a file system whose log holds nothing; None if it has none.
            post: has the loop's thread call a function with arguments; may be called from any thread.
            commit_seconds: how long a change may wait until it is durable, if nobody asks.
            discard: whether the device is told what became free.
        """
        self._fs = fs
        self._post = post
        self._writer = BatchWriter(device, fs.geometry, journal, discard)
        self._commit_seconds = commit_seconds
        self._aging, self._age = 0, 0   # the open batch when it was last looked at, and how many seconds ago
        self._resting = False           # nothing is to be changed, as far as the kernel is concerned
        self._awake: tuple[int, bytes] | None = None    # what marks the file system as in use, when it is marked clean
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._waiting: list[Asked] = []
        self._busy = False              # a job is in the thread, or its end on the way to the loop
        self.failure: OSError | None = None
        self.on_failure: Callable[[OSError], None] | None = None
        self.on_durable: Callable[[ClosedBatch], object] = partial(commit.durable, fs)

    def start(self, superblock: tuple[int, bytes]) -> None:
        """Write the superblock of a file system in use (block, bytes), and begin.  Waits.  OSError if it fails."""
        self._writer.start(superblock)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way to the device."""
        return not self._busy and not self._waiting

    def commit(self, told: Told, only_data: bool = False, answer: Answer | None = None) -> None:
        """Make everything that was done until now durable, and say so; at once if it is so already.

        With ``only_data`` the times of files are not needed.  ``answer`` is called before ``told``, as soon as the
        thread has done it: not if that fails, nor if there is nothing to do.
        """
        if self.failure is not None:
            told(self.failure)
            return
        self._waiting.append(Asked(told, only_data, answer))
        if not self._busy:
            self._next()

    def tick(self) -> None:
        """Once a second: a batch that is old enough becomes durable."""
        writing = self._fs.writing
        assert writing is not None
        if writing.batch.is_empty or writing.batch.number != self._aging:
            self._aging, self._age = writing.batch.number, 0
        elif self._age + 1 < self._commit_seconds and not self._resting:
            self._age += 1
        else:
            self.commit(_nobody)

    def send_if_large(self) -> None:
        """Send off a batch that has grown large, if nothing is on its way."""
        writing = self._fs.writing
        if writing is not None and len(writing.batch.blocks) * BATCH_SHARE > writing.limits.collected \
                and self.is_idle:
            self.commit(_nobody)

    def rest(self, resting: bool) -> None:
        """The kernel has the file system mounted read-only now, or no longer (K5)."""
        self._resting = resting
        if resting:
            self.commit(lambda _failure: self._lie_down())

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
        """Close the open batch and send it off, for all who wait; or what they need of it (K4)."""
        asked, self._waiting = self._waiting, []
        writing = self._fs.writing
        assert writing is not None
        batch = writing.batch
        light = batch.only_times and all(each.only_data for each in asked)
        if batch.is_empty or (light and not batch.wrote_data):
            _tell(asked, None)
            return
        if light:
            batch.wrote_data = False    # what is written from now on sets it again
            self._run(self._writer.flush, None, asked)
            return
        try:
            closed = commit.close(self._fs, int(time.time()))
        except Exception as error:  # what the batch held is lost, so nothing may be written on top of it
            self._run(partial(_raise, error), None, asked)
            return
        awake, self._awake = self._awake, None
        self._run(partial(self._writer.write, closed, awake), closed, asked)

    def _lie_down(self) -> None:
        """Have the file system marked clean, if it is at rest and is not so marked (K5).

        What the cache has of the superblock says that it is in use, so every later batch does.
        """
        writing = self._fs.writing
        if not self._resting or self._busy or self._waiting or self._awake is not None or self.failure is not None \
                or writing is None or not writing.batch.is_empty:
            return
        clean = mountstate.put_away(self._fs, int(time.time()))
        self._awake = mountstate.being_changed(self._fs)
        self._run(partial(self._writer.finish, clean), None, [])

    def _run(self, job: Callable[[], Entries], closed: ClosedBatch | None, asked: list[Asked]) -> None:
        self._busy = True

        def work() -> None:
            home, failure = self._writer.attempt(job)
            if failure is None:
                _call([each.answer for each in asked if each.answer is not None])
            self._post(self._done, closed, home, failure, asked)

        self._jobs.put(work)

    def _done(self, closed: ClosedBatch | None, home: Entries, failure: OSError | None, asked: list[Asked]) -> None:
        self._busy = False
        if failure is not None:
            self._abort(failure)
        else:
            self._settle(closed, home)
        _tell(asked, failure)
        self._go_on()

    def _settle(self, closed: ClosedBatch | None, home: Entries) -> None:
        """Let the core know what is durable and what is home; if that fails, what is in memory is not to be trusted."""
        try:
            if closed is not None:
                self.on_durable(closed)
            commit.home(self._fs, home)
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
        self._lie_down()

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


def _nobody(_failure: OSError | None) -> None:
    """Nobody waits for this batch; a failure is logged and turns the file system read-only."""


def _tell(asked: list[Asked], failure: OSError | None) -> None:
    _call([each.told for each in asked], failure)


def _call(those: Sequence[Callable[..., None]], *arguments: OSError | None) -> None:
    for each in those:
        try:
            each(*arguments)
        except Exception as error:  # the others must hear of it, too
            log.bug("commit_answer_failed", error)


def _raise(error: Exception) -> Entries:
    raise error
