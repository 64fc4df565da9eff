"""A file system that was put away is clean and complete, with a journal or without one."""

from __future__ import annotations

import errno
import random

import pytest

from tests.crash.bases import BASES, base
from tests.crash.machine import Aborted, Machine
from tests.crash.model import Snapshot, difference, tree_of_image
from tests.crash.recorder import Fault, Recorder
from tests.crash.sweep import e2fsck, image_file
from tests.crash.workload import Workload
from tests.ext4.driver import seeded

OPERATIONS = 200


def put_away(name: str, chance: random.Random) -> tuple[Recorder, Workload]:
    recorder = Recorder(base(name))
    machine = Machine(recorder)
    workload = Workload(machine, chance)
    machine.start()
    try:
        workload.run(OPERATIONS)
        workload.finish()
    finally:
        machine.stop()
    return recorder, workload


@pytest.mark.parametrize("name", BASES)
def test_nothing_is_left_to_do_after_a_clean_end(name: str) -> None:
    recorder, workload = put_away(name, seeded())
    assert len(workload.done) > 5
    end = len(recorder.events) + 1
    assert difference(Snapshot(workload.root), tree_of_image(recorder.data), end, end) is None
    with image_file(recorder.data) as path:
        done = e2fsck("-fn", path)
    assert done.returncode == 0, done.stdout
    assert "recovering journal" not in done.stdout


@pytest.mark.parametrize("name", ["ext2", "no-journal"])
def test_without_a_journal_a_failure_is_told_and_the_file_system_not_marked_clean(name: str) -> None:
    recorder = Recorder(base(name))
    machine = Machine(recorder)
    workload = Workload(machine, random.Random(3))
    machine.start()
    recorder.faults = dict.fromkeys(range(recorder.calls + 20, 10_000), Fault(errno.ENOSPC))
    try:
        workload.run(OPERATIONS)
        with pytest.raises((Aborted, OSError)):
            workload.finish()
    finally:
        machine.stop()
    assert len(machine.answers) == len(machine.asked) and machine.answers[-1].failure is machine.committer.failure
    assert machine.committer.failure is not None and machine.committer.failure.errno == errno.ENOSPC
    state = int.from_bytes(recorder.data[1024 + 0x3A:1024 + 0x3C], "little")
    assert not state & 1, "marked clean"
