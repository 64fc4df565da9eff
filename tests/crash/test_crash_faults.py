"""The device fails at its n-th write or flush, for every n of a workload: everybody hears, and nothing is lost."""

from __future__ import annotations

import errno
import random

import pytest

from fusewire.ext4.journalsuper import JournalSuperblock
from tests.crash.bases import base
from tests.crash.machine import Aborted, Machine
from tests.crash.model import Snapshot
from tests.crash.recorder import Cuts, Fate, Fault, Flush, Recorder, Write
from tests.crash.sweep import Cut, Recording, Recovered, Sweep, examine, image_file
from tests.crash.workload import Workload

OPERATIONS = 24
FAULTS = {
    "EIO": Fault(errno.EIO), "ENOSPC": Fault(errno.ENOSPC), "short": Fault(errno.EIO, 0.5),
    "whole": Fault(errno.EIO, 1.0), "torn": Fault(errno.EIO, 0.5, torn=True)}
CASES = [*(("v3-64", kind) for kind in FAULTS), ("v1", "torn"), ("ext3", "EIO"), ("v3-4k", "short")]
EXAMINED = 7        # every so manieth fault is looked at by e2fsck as well


class Faulty(Recording):
    """A short workload on a device that fails at one call."""

    def __init__(self, name: str, call: int | None, fault: Fault | None) -> None:
        self.name, self.seed = name, 0
        chance = random.Random(f"{name}:2")      # does much of everything
        self.recorder = Recorder(base(name))
        self.machine = machine = Machine(self.recorder, 1015)
        self.workload = Workload(machine, chance)
        first = Snapshot(self.workload.root)
        machine.start()
        self.begun = self.recorder.calls
        if call is not None and fault is not None:
            self.recorder.faults[call] = fault
        self.ended = False
        try:
            self.workload.run(OPERATIONS, commits=0.3, leisure=0.1)
            self.workload.finish()
            self.ended = True
        except (Aborted, OSError):
            pass
        finally:
            machine.stop()
        self.snapshots = {0: (first, 0), **machine.closed}
        self.journal = set(self._journal_blocks())


def check_answers(run: Faulty) -> None:
    """Each waiter was told once; after the first failure there are only failures, all the same."""
    machine = run.machine
    assert len(machine.answers) == len(machine.asked)
    failures = [answer.failure for answer in machine.answers]
    bad = [index for index, failure in enumerate(failures) if failure is not None]
    assert all(failures[index] is not None for index in range(bad[0], len(failures))) if bad else True
    assert bool(bad) <= (machine.committer.failure is not None)


def check_silence(run: Faulty, call: int, fault: Fault, failed_at: int) -> None:
    """After its failure the committer writes nothing but the note in the journal's superblock.

    File data may still be written until the loop has heard of it.
    """
    failure = run.machine.committer.failure
    assert failure is not None and failure.errno == fault.number, failure
    later = [event for index, event in enumerate(run.recorder.events)
             if index >= failed_at and index not in run.workload.data_events]
    log = run.machine.log
    assert log is not None
    place = log.file.place(0) * run.machine.fs.geometry.block_bytes
    writes = [event for event in later if isinstance(event, Write)]
    assert [write.offset for write in writes] == [place], f"call {call}: {[write.offset for write in writes]}"
    assert int.from_bytes(writes[0].data[0x20:0x24], "big") == (1 << 32) - fault.number
    assert isinstance(later[-1], Flush)
    told: list[OSError | None] = []
    run.machine.committer.commit(told.append)
    assert told == [failure]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_device_that_fails_anywhere_loses_nothing(name: str, kind: str) -> None:
    fault = FAULTS[kind]
    sound = Faulty(name, None, None)
    assert sound.ended and sound.machine.committer.failure is not None     # it was put away
    aborted = 0
    for call in range(sound.begun, sound.recorder.calls):
        run = Faulty(name, call, fault)
        check_answers(run)
        if not run.ended:
            aborted += 1
            failed_at = run.recorder.failed_at
            assert failed_at is not None
            check_silence(run, call, fault, failed_at)
        check_image(run, call)
    assert aborted > 10


def check_image(run: Faulty, call: int) -> None:
    """What is on the device, with or without what was not flushed, is recovered to what was acknowledged."""
    sweep, end = Sweep(run, 0, 0, 0), len(run.recorder.events)
    cuts = Cuts(run.recorder)
    for fate in (Fate.ALL, Fate.NONE if call % 2 else Fate.SUBSET):
        cut = Cut(end, fate, f"{call}")
        image = cuts.image(end, fate, random.Random(call))
        sweep.check(cut, image)
        if call % EXAMINED == 0 and not Recovered(image).is_beyond_e2fsck:
            with image_file(forgiven(run, image)) as path:
                examine(path)


def forgiven(run: Faulty, image: bytearray) -> bytearray:
    """The image without the note of the failure: e2fsck frees no orphans of a file system with errors."""
    log, size = run.machine.log, run.machine.fs.geometry.block_bytes
    assert log is not None
    at = log.file.place(0) * size
    journal = JournalSuperblock.parse(bytes(image[at:at + size]), size, log.file.blocks)
    image[at:at + size] = journal.patched(errno=0)
    return image
