"""The core and the real committer on a recorded device, in lockstep: everything that happens follows from a seed.

The committer's thread stops before each of its writes and flushes until ``step`` lets it go on, so what else happens at
that moment is the caller's choice and the same each time.  What the thread posts is called in ``step`` as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from fusewire.batchwriter import Log, limits
from fusewire.committer import Committer
from fusewire.ext4 import commit, journalfile, mountstate, orphan
from fusewire.ext4.blocks import BlockMiss
from fusewire.ext4.filesystem import Ext4, Options
from fusewire.ext4.journal import JournalWriter
from fusewire.ext4.journalsuper import JournalFeature, JournalSuperblock
from fusewire.ext4.superblock import Superblock
from fusewire.ext4.transaction import CommitFirst, Transaction
from tests.crash.recorder import Recorder

START = 1_600_000_000
RESTARTS_MOST = 500

Result = TypeVar("Result")


class Answer(NamedTuple):
    """What a waiter was told: after how many events, about everything up to which batch, and the failure if any."""

    at: int
    batch: int
    failure: OSError | None


class Aborted(Exception):
    """An operation could not go on: the committer has failed."""


class Machine:
    """A file system mounted for writing on a ``Recorder``.

    ``closed[number]`` is what ``snapshot`` gave when a batch was closed, and after how many events that was.
    """

    def __init__(self, recorder: Recorder, head: int | None = None, sequence: int | None = None,
                 limit: int | None = None, discard: bool = False, commit_seconds: int = 5) -> None:
        """
        Args:
            head, sequence: where in its log the journal's next transaction goes, and its number; by default as on disk.
            limit: blocks of a batch; by default as many as the journal takes.
            discard: what is freed becomes unreadable once that is durable.
            commit_seconds: after how many ticks a batch is sent off.
        """
        self.device = recorder
        self.fs = Ext4(Superblock.parse(recorder.read(1024, 1024), recorder.size_bytes), None, Options(noload=True))
        self.log = self._log(head, sequence)
        most = limits(self.log, self.fs.geometry.block_bytes)
        self.run(commit.start_writing, self.fs, most._replace(collected=min(limit or most.collected, most.collected)))
        self.run(orphan.recall, self.fs)
        self.writing = self.fs.writing
        assert self.writing is not None
        self.committer = Committer(self.fs, recorder, self.log, self._post,  # type: ignore[arg-type]
                                   commit_seconds, discard)
        self.snapshot: Callable[[], Any] = lambda: None
        self.closed: dict[int, tuple[Any, int]] = {}
        self.asked: list[int] = []
        self.answers: list[Answer] = []
        self.due: list[int] = []        # files whose tails are to be cleared
        self.committer.on_durable = lambda closed: self.due.extend(commit.durable(self.fs, closed))
        self.clock = START
        self._items: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._next: tuple[Any, ...] | None = None
        self._go = threading.Semaphore(0)
        self._free = False
        self._home = threading.get_ident()
        recorder.before_call = self._before_call

    def _log(self, head: int | None, sequence: int | None) -> Log | None:
        file = self.run(journalfile.locate, self.fs)
        if file is None:
            return None
        block_bytes = self.fs.geometry.block_bytes
        raw = self.device.read(self.fs.geometry.byte_of(file.place(0)), block_bytes)
        journal = JournalSuperblock.parse(raw, block_bytes, file.blocks)
        assert not journal.start
        if JournalFeature.REVOKE not in journal:    # as mke2fs leaves it; a format that a test chose stays
            journal = journal.enabled(self.fs.is_64bit, self.fs.has_checksums)
        return Log(JournalWriter(journal, head or journal.head or journal.first,
                                 journal.sequence if sequence is None else sequence), file)

    # ---- operations

    def run(self, operation: Callable[..., Result], *arguments: object) -> Result:
        """What a reading operation returns or raises once its blocks are in memory."""
        for _ in range(RESTARTS_MOST):
            try:
                return operation(*arguments)
            except BlockMiss as miss:
                self._fetch(miss)
        raise AssertionError(f"{operation} started again {RESTARTS_MOST} times")

    def change(self, operation: Callable[..., Result], *arguments: object) -> Result:
        """What ``operation(tx, *arguments)`` returns or raises, as one transaction."""
        self.clock += 1
        for _ in range(RESTARTS_MOST):
            if self.committer.failure is not None:
                raise Aborted
            try:
                with Transaction(self.fs, (self.clock, 0)) as tx:
                    result = operation(tx, *arguments)
            except BlockMiss as miss:
                self._fetch(miss)
            except CommitFirst:
                self.sync()
            else:
                return result
        raise AssertionError(f"{operation} started again {RESTARTS_MOST} times")

    def _fetch(self, miss: BlockMiss) -> None:
        found: dict[int, bytes | OSError] = {}
        geometry = self.fs.geometry
        for first, count in miss.runs:
            for block in range(first, first + count):
                found[block] = self.device.read(geometry.byte_of(block), geometry.block_bytes)
        self.fs.cache.admit(found)

    # ---- the committer

    def start(self) -> None:
        """Mark the file system as in use, and begin."""
        superblock = self.run(mountstate.in_use, self.fs, self.clock, b"/crash")
        self.committer.start(superblock)

    def ask(self) -> None:
        """Ask for everything until now to become durable; ``answers`` will tell."""
        assert self.writing is not None
        batch = self.writing.batch.number - (1 if self.writing.batch.is_empty else 0)
        self.asked.append(batch)
        self.committer.commit(lambda failure: self._told(batch, failure))
        self._note_closed()

    def sync(self) -> None:
        """Make everything durable, and wait for it.  Raises ``Aborted``."""
        self.ask()
        while len(self.answers) < len(self.asked):
            assert self.step(), "nothing is on its way, and somebody waits"
        if self.answers[-1].failure is not None:
            raise Aborted

    def step(self) -> bool:
        """Let the thread go on to its next write or flush, or call what it has posted; False if there is nothing."""
        if self.committer.is_idle:
            return False
        item = self._items.get() if self._next is None else self._next
        self._next = None
        if item:
            item[0](*item[1:])
            self._note_closed()
        else:
            self._go.release()
            self._next = self._items.get()
        return True

    def settle(self) -> None:
        """Until nothing is on its way."""
        while self.step():
            pass

    def rest(self, resting: bool) -> None:
        """The file system is remounted read-only, or for writing."""
        self.committer.rest(resting)
        self._note_closed()

    def finish(self) -> None:
        """Put the file system away; no file is ``due`` any more.  Raises OSError."""
        self.sync()
        assert not self.due
        self.settle()
        self.committer.finish(self.run(mountstate.put_away, self.fs, self.clock))

    def stop(self) -> None:
        """Let the thread end, whatever is open."""
        self._free = True
        if self._next == ():
            self._next = None
            self._go.release()
        self.device.before_call = None
        self._go.release(1000)
        self.committer._jobs.put(None)
        if self.committer._thread.is_alive():
            self.committer._thread.join()

    def _told(self, batch: int, failure: OSError | None) -> None:
        self.answers.append(Answer(len(self.device.events), batch, failure))

    def _note_closed(self) -> None:
        assert self.writing is not None
        number = self.writing.batch.number - 1
        if number and number not in self.closed:
            self.closed[number] = self.snapshot(), len(self.device.events)

    def _post(self, *call: Any) -> None:
        self._items.put(call)

    def _before_call(self) -> None:
        if threading.get_ident() != self._home and not self._free:
            self._items.put(())
            self._go.acquire()
