"""The committer's rules one by one: who is told, what is written in which order, what fits, what is kept in memory."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest

from fusewire import batchwriter as subject
from fusewire.batchwriter import Log, limits
from fusewire.committer import Committer
from fusewire.ext4 import alloc, commit, inodestore, mountstate
from fusewire.ext4.errors import Refused
from fusewire.ext4.journal import JournalWriter
from fusewire.ext4.journalsuper import Checksums, JournalSuperblock
from fusewire.ext4.superblock import Superblock
from fusewire.ext4.transaction import Transaction
from fusewire.ext4.units import ROOT_INODE
from tests.crash.bases import base
from tests.crash.machine import Machine
from tests.crash.recorder import Fault, Flush, Recorder, Write
from tests.crash.sweep import e2fsck, image_file
from tests.journals import MemoryJournal

Told = list[OSError | None]


@pytest.fixture
def machine() -> Iterator[Machine]:
    found = Machine(Recorder(base("v3-64")))
    found.start()
    yield found
    found.stop()


def touch(machine: Machine) -> None:
    """The smallest change."""
    machine.change(lambda tx: inodestore.change(tx, tx.inode(ROOT_INODE), mtime=tx.now))


def fill(machine: Machine, first: int, count: int) -> None:
    """Change so many blocks: free ones, which become metadata."""
    def operation(tx: Transaction) -> None:
        for block in range(first, first + count):
            tx.create(block)[:4] = block.to_bytes(4, "little")

    machine.change(operation)


def revoke(machine: Machine, first: int, count: int) -> None:
    def operation(tx: Transaction) -> None:
        for block in range(first, first + count):
            tx.revoke(block)

    machine.change(operation)


def home_writes(machine: Machine, block: int, since: int = 0) -> int:
    size = machine.fs.geometry.block_bytes
    return sum(event.offset <= block * size < event.offset + len(event.data)
               for event in machine.device.events[since:] if isinstance(event, Write))


# ---- who is told ---------------------------------------------------------------------------------------------------

def test_those_who_ask_meanwhile_share_the_next_batch(machine: Machine) -> None:
    touch(machine)
    told: list[str] = []
    machine.committer.commit(lambda _: told.append("first"))
    touch(machine)
    for name in "abc":
        machine.committer.commit(lambda _, name=name: told.append(name))  # type: ignore[misc]
    machine.settle()
    assert told == ["first", "a", "b", "c"]
    assert machine.writing is not None and machine.writing.batch.number == 3


def test_nothing_to_do_is_told_at_once_but_not_before_what_is_on_its_way(machine: Machine) -> None:
    told: Told = []
    machine.committer.commit(told.append)
    assert told == [None]
    touch(machine)
    machine.committer.commit(told.append)
    machine.committer.commit(told.append)
    assert told == [None]
    machine.settle()
    assert told == [None] * 3


def test_asking_again_while_being_told_never_sends_two_batches_at_once(machine: Machine) -> None:
    told: list[int] = []

    def again(index: int) -> Callable[[OSError | None], None]:
        def answer(_: OSError | None) -> None:
            touch(machine)
            machine.committer.commit(lambda _: told.append(index))
            assert machine.committer._jobs.qsize() <= 1
        return answer

    touch(machine)
    for index in range(3):
        machine.committer.commit(again(index))
    machine.settle()
    assert sorted(told) == [0, 1, 2] and machine.committer.is_idle


def test_a_waiter_that_raises_keeps_nobody_else_from_hearing(machine: Machine) -> None:
    def broken(_: OSError | None) -> None:
        raise ZeroDivisionError

    told: Told = []
    touch(machine)
    machine.committer.commit(broken)
    machine.committer.commit(told.append)
    machine.settle()
    assert told == [None] and machine.committer.failure is None


def test_a_failure_reaches_all_who_wait_and_all_who_ask_later_once(machine: Machine) -> None:
    told: Told = []
    seen: list[OSError] = []
    machine.committer.on_failure = seen.append
    touch(machine)
    machine.device.faults[machine.device.calls] = Fault(errno.EIO)
    for _ in range(2):
        machine.committer.commit(told.append)
    touch(machine)
    machine.committer.commit(told.append)
    machine.settle()
    failure = machine.committer.failure
    assert failure is not None and told == [failure] * 3 and seen == [failure]
    machine.committer.commit(told.append)
    machine.committer.checkpoint()
    assert told == [failure] * 4 and machine.committer.is_idle


@pytest.mark.parametrize("where", ["close", "durable", "home"])
def test_a_bug_in_the_core_is_a_failure_and_no_silence(machine: Machine, monkeypatch: pytest.MonkeyPatch,
                                                       where: str) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    if where == "durable":
        machine.committer.on_durable = broken
    else:
        monkeypatch.setattr(commit, where, broken)
    told: Told = []
    touch(machine)
    machine.committer.commit(told.append)
    machine.settle()
    assert len(told) == 1 and machine.committer.failure is not None
    assert machine.committer.failure.errno == errno.EIO
    events = len(machine.device.events)
    machine.committer.commit(told.append)
    assert told[1] is machine.committer.failure and len(machine.device.events) == events


def test_a_bug_in_the_thread_is_a_failure_and_no_silence(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(JournalWriter, "encode", broken)
    told: Told = []
    touch(machine)
    machine.committer.commit(told.append)
    machine.settle()
    assert told == [machine.committer.failure] and told[0] is not None and told[0].errno == errno.EIO


# ---- data alone ----------------------------------------------------------------------------------------------------

def stamp(machine: Machine) -> None:
    def operation(tx: Transaction) -> None:
        tx.only_times = True
        inodestore.change(tx, tx.inode(ROOT_INODE), mtime=tx.now)

    machine.change(operation)


def write_data(machine: Machine) -> None:
    assert machine.writing is not None
    machine.writing.batch.wrote_data = True


def events_of(machine: Machine, action: Callable[[], None]) -> str:
    """What reaches the device until nothing is on its way: writes and flushes."""
    start = len(machine.device.events)
    action()
    machine.settle()
    return "".join("F" if isinstance(event, Flush) else "W" for event in machine.device.events[start:])


def test_who_needs_data_alone_gets_a_flush_and_the_times_wait(machine: Machine) -> None:
    told: Told = []
    stamp(machine)
    assert events_of(machine, lambda: machine.committer.commit(told.append, only_data=True)) == ""
    write_data(machine)
    assert events_of(machine, lambda: machine.committer.commit(told.append, only_data=True)) == "F"
    assert events_of(machine, lambda: machine.committer.commit(told.append, only_data=True)) == ""
    assert machine.writing is not None and not machine.writing.batch.is_empty and told == [None] * 3
    assert events_of(machine, lambda: machine.committer.commit(told.append)) == "WFWF"
    assert machine.writing.batch.is_empty and told == [None] * 4


def test_who_needs_data_alone_gets_all_where_more_than_times_was_changed(machine: Machine) -> None:
    told: Told = []
    stamp(machine)
    touch(machine)
    stamp(machine)
    assert events_of(machine, lambda: machine.committer.commit(told.append, only_data=True)) == "WFWF"
    assert told == [None]


def test_who_needs_data_alone_waits_for_what_is_on_its_way(machine: Machine) -> None:
    told: list[str] = []
    touch(machine)
    machine.committer.commit(lambda _: told.append("all"))
    write_data(machine)

    def ask() -> None:
        machine.committer.commit(lambda _: told.append("data"), only_data=True)
        assert told == []

    assert events_of(machine, ask) == "WFWFF"
    assert told == ["all", "data"]


def test_a_flush_that_fails_is_told(machine: Machine) -> None:
    told: Told = []
    write_data(machine)
    machine.device.faults[machine.device.calls] = Fault(errno.EIO)
    machine.committer.commit(told.append, only_data=True)
    machine.settle()
    assert told == [machine.committer.failure] and told != [None]


def test_the_thread_answers_first_and_only_if_it_succeeds(machine: Machine) -> None:
    told: list[str] = []

    def commit() -> None:
        machine.committer.commit(lambda failure: told.append("failed" if failure else "told"),
                                 answer=lambda: told.append(threading.current_thread().name))

    commit()
    assert told == ["told"]     # there was nothing to do
    touch(machine)
    commit()
    machine.settle()
    assert told == ["told", "journal", "told"]
    touch(machine)
    machine.device.faults[machine.device.calls] = Fault(errno.EIO)
    commit()
    machine.settle()
    assert told == ["told", "journal", "told", "failed"]


# ---- order ---------------------------------------------------------------------------------------------------------

def test_a_commit_is_records_flush_and_what_makes_it_count_flush(machine: Machine) -> None:
    start = len(machine.device.events)
    touch(machine)
    machine.sync()
    kinds = ["F" if isinstance(event, Flush) else "W" for event in machine.device.events[start:]]
    assert "".join(kinds) == "WFWF"     # all of it; the journal's superblock
    start = len(machine.device.events)
    touch(machine)
    machine.sync()
    assert [isinstance(event, Flush) for event in machine.device.events[start:]] == [False, True, False, True]


def test_a_freed_block_is_not_written_home_any_more(machine: Machine) -> None:
    fill(machine, 1500, 3)
    machine.sync()
    revoke(machine, 1501, 1)
    machine.sync()
    machine.committer.checkpoint()
    machine.settle()
    assert [home_writes(machine, block) for block in (1500, 1501, 1502)] == [1, 0, 1]


def test_only_what_the_log_holds_is_revoked(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    revoked: list[list[int]] = []
    encode = JournalWriter.encode

    def watched(self: JournalWriter, blocks: object, revocations: list[int], at: int) -> object:
        revoked.append(sorted(revocations))
        return encode(self, blocks, revocations, at)    # type: ignore[arg-type]

    monkeypatch.setattr(JournalWriter, "encode", watched)
    fill(machine, 1500, 3)
    machine.sync()
    touch(machine)
    revoke(machine, 1501, 5)
    machine.sync()
    machine.committer.checkpoint()
    machine.settle()
    touch(machine)
    revoke(machine, 1500, 1)
    machine.sync()
    assert revoked == [[], [1501, 1502], []]


# ---- sizes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", Checksums)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("block_bytes", [1024, 2048, 4096])
@pytest.mark.parametrize("maxlen", [1024, 1025, 5000, 262_144])
def test_the_largest_batch_and_its_superblock_fit_an_empty_log(kind: Checksums, wide: bool, block_bytes: int,
                                                               maxlen: int) -> None:
    store = MemoryJournal(kind, wide, block_bytes, maxlen)
    log = Log(store.writer(), store.file)
    collected, single = limits(log, block_bytes)
    assert single is not None and 200 < collected <= subject.BATCH_BLOCKS and log.writer.fits(collected + 1)
    assert collected < single and log.writer.fits(single + 1) and log.writer.need(single + 4) > log.writer.free


def test_the_largest_batches_pass_through_the_smallest_journal_whatever_they_free(machine: Machine) -> None:
    assert machine.log is not None
    limit = limits(machine.log, 1024).collected
    for first in (1300, 1600, 1300, 1600):
        fill(machine, first, limit)
        machine.sync()
        touch(machine)
        revoke(machine, first, limit)
        revoke(machine, 100_000, 20_000)     # more than a batch of the log could name
        machine.sync()
    assert machine.committer.failure is None


def test_one_operation_may_fill_the_log_and_a_larger_one_fails_alone(machine: Machine) -> None:
    assert machine.log is not None
    _, single = limits(machine.log, 1024)
    assert single is not None and single > 900
    for first in (1300, 1400):
        fill(machine, first, single)
        with pytest.raises(Refused) as refused:
            fill(machine, first, single + 1)
        assert refused.value.errno == errno.ENOSPC
        machine.sync()
        touch(machine)
        revoke(machine, first, single)
        machine.sync()
    assert machine.committer.failure is None


def test_memory_holds_each_block_once_however_often_it_was_logged(machine: Machine) -> None:
    fill(machine, 1500, 10)
    machine.sync()
    held = len(machine.committer._writer._homeless)
    for _ in range(20):
        fill(machine, 1500, 10)
        machine.sync()
    assert len(machine.committer._writer._homeless) == held


def test_many_blocks_without_a_home_are_brought_home(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "CHECKPOINT_BLOCKS", 20)
    for round_ in range(6):
        fill(machine, 1500 + round_ * 15, 15)
        machine.sync()
        assert len(machine.committer._writer._homeless) <= 20 + 16
    machine.settle()
    assert len(machine.fs.cache._pinned) <= 20 + 16


# ---- the end -------------------------------------------------------------------------------------------------------

def test_the_end_waits_for_what_is_on_its_way(machine: Machine) -> None:
    """A checkpoint is in the thread when the file system is put away."""
    fill(machine, 1500, 3)
    machine.sync()
    machine.settle()
    machine.device.before_call = None
    machine.committer.checkpoint()
    machine.committer.finish((1, bytes(machine.fs.cache.entry(1).data)))
    assert home_writes(machine, 1500) == 1
    told: Told = []
    machine.committer.commit(told.append)
    assert len(told) == 1 and told[0] is not None and told[0].errno == errno.ESHUTDOWN


def test_what_was_not_committed_is_not_put_away(machine: Machine) -> None:
    touch(machine)
    events = len(machine.device.events)
    with pytest.raises((AssertionError, OSError)):
        machine.committer.finish((1, bytes(1024)))
    assert len(machine.device.events) == events


def test_after_a_failure_the_file_system_is_not_marked_clean(machine: Machine) -> None:
    touch(machine)
    machine.device.faults[machine.device.calls] = Fault(errno.ENOSPC)
    told: Told = []
    machine.committer.commit(told.append)
    machine.settle()
    events = len(machine.device.events)
    with pytest.raises(OSError, match="injected"):
        machine.committer.finish((1, bytes(1024)))
    assert len(machine.device.events) == events


# ---- at rest -------------------------------------------------------------------------------------------------------

def marks(machine: Machine) -> tuple[bool, bool]:
    """Whether the device says that the journal may hold something, and what it holds."""
    image = bytes(machine.device.data)
    log = machine.log
    assert log is not None
    size = machine.fs.geometry.block_bytes
    at = log.file.place(0) * size
    fields = Superblock.parse(image[1024:2048], len(image))
    return fields.needs_recovery, bool(JournalSuperblock.parse(image[at:at + size], size, log.file.blocks).start)


def test_at_rest_the_device_is_clean_and_the_next_change_is_announced_first(machine: Machine) -> None:
    touch(machine)
    machine.rest(True)
    machine.settle()
    assert marks(machine) == (False, False)
    with image_file(machine.device.data) as path:
        assert e2fsck("-fn", path).returncode == 0
    for _ in range(2):      # the second time nothing is left to do
        events = len(machine.device.events)
        machine.committer.rest(False)
        assert len(machine.device.events) == events
    touch(machine)
    machine.ask()
    machine.step()
    machine.step()
    first, second = machine.device.events[events:events + 2]
    assert isinstance(first, Write) and first.offset == 1024 and isinstance(second, Flush)
    machine.settle()
    assert marks(machine) == (True, True)


def test_what_is_changed_at_rest_is_followed_by_rest(machine: Machine) -> None:
    """The kernel may still forget inodes, which are freed then."""
    machine.rest(True)
    machine.settle()
    for _ in range(2):
        touch(machine)
        machine.committer.tick()    # sees it
        machine.committer.tick()
        machine.settle()
        assert marks(machine) == (False, False)
        assert not machine.fs.writing.batch.blocks  # type: ignore[union-attr]
    machine.committer.finish(mountstate.put_away(machine.fs, 5))
    assert marks(machine) == (False, False)


def test_a_file_system_that_cannot_be_marked_turns_read_only(machine: Machine) -> None:
    failed: list[OSError] = []
    machine.committer.on_failure = failed.append
    machine.device.faults = dict.fromkeys(range(machine.device.calls, machine.device.calls + 100), Fault(errno.EIO))
    machine.rest(True)
    machine.settle()
    assert len(failed) == 1 and machine.committer.failure is failed[0]


# ---- options -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds", [1, 3, 5])
def test_a_change_becomes_durable_after_so_many_seconds(seconds: int) -> None:
    machine = Machine(Recorder(base("v3-64")), commit_seconds=seconds)
    machine.start()
    try:
        touch(machine)
        for _ in range(seconds):
            machine.committer.tick()
            assert machine.committer.is_idle
        machine.committer.tick()
        assert not machine.committer.is_idle
        machine.settle()
        assert machine.writing is not None and machine.writing.batch.is_empty
    finally:
        machine.stop()


def free_some(machine: Machine) -> list[tuple[int, int]]:
    """Make and remove a file with two runs of blocks; the freed ranges of the device."""
    taken: list[tuple[int, int]] = []

    def take(tx: Transaction) -> None:
        taken.clear()
        for goal, count in ((3000, 8), (3100, 4), (3008, 8)):
            taken.append(alloc.allocate(tx, goal, count))

    machine.change(take)
    machine.sync()
    machine.change(lambda tx: [alloc.free(tx, *run) for run in taken])
    size = machine.fs.geometry.block_bytes
    assert [run[1] for run in taken] == [8, 4, 8] and taken[0][0] + 8 == taken[2][0], "the test chose bad places"
    return [(taken[0][0] * size, 16 * size), (taken[1][0] * size, 4 * size)]


@pytest.mark.parametrize("name", ["v3-64", "no-journal"])
def test_what_a_batch_freed_is_discarded_when_it_is_durable(name: str) -> None:
    machine = Machine(Recorder(base(name)), discard=True)
    machine.start()
    try:
        ranges = free_some(machine)
        assert machine.writing is not None and machine.writing.held.count == 20
        machine.sync()
        assert machine.writing.held.count == 0
        events = machine.device.events
        last = max(index for index, event in enumerate(events) if isinstance(event, Flush))
        assert [(event.offset, len(event.data)) for event in events[last + 1:] if isinstance(event, Write)] \
            == sorted(ranges)
    finally:
        machine.stop()


def test_a_device_that_does_not_discard_is_not_asked_again() -> None:
    machine = Machine(Recorder(base("v3-64")), discard=True)
    machine.start()
    try:
        for _ in range(2):
            asked = machine.device.discard = Mock(side_effect=Refused(errno.EOPNOTSUPP))  # type: ignore[method-assign]
            free_some(machine)
            machine.sync()
        assert not asked.called and machine.committer.failure is None
    finally:
        machine.stop()


def test_a_log_that_holds_something_is_refused(machine: Machine) -> None:
    store = MemoryJournal()
    writer = store.writer()
    writer.encode([(50, bytes(1024))], (), 1)
    with pytest.raises(AssertionError):
        Committer(machine.fs, machine.device, Log(writer, store.file), machine._post)  # type: ignore[arg-type]
