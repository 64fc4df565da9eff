"""Power cuts and kills of the real daemon: threads use a mount, whose device is recorded (``recording_daemon``).

``python -m tests.crash.mounted FORMAT SEED [CUTS]`` examines one recording in every way (as root).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from fusewire.ext4 import journalfile
from fusewire.ext4.filesystem import Options
from tests.crash.bases import base
from tests.crash.history import History
from tests.crash.model import Tree, tree_of_mount
from tests.crash.recorder import Cuts, Flush, Recorder
from tests.crash.recording_daemon import FLUSH, FLUSHED, HEADER, WRITE
from tests.crash.sweep import MEMORY, Cut, Recording, Sweep, examine, image_file
from tests.ext4.driver import Core
from tests.mounting import (
    DIES_WITH_US,
    READY_SECONDS,
    abandon,
    fusewire_command,
    fusewire_environment,
    kernel_mount,
    mount_point,
    private_mounts,
    run,
    wait_mounted,
)

THREADS = 3
OPERATIONS = (40, 120, 250)
OPTIONS = ("rw", "rw", "rw,noloop", "rw,cache_size=1", "rw,commit=1", "rw,sync", "rw,dirsync")
KILLED = 0.5        # of the recordings end with the daemon being killed


class MountedRecording(Recording):
    """What threads did on a mount, and what that did to the device."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        chance = random.Random(f"mounted:{name}:{seed}")
        self.killed = chance.random() < KILLED
        self.recorder = Recorder(base(name))
        self.journal = set(_journal_of(base(name)))
        with tempfile.TemporaryDirectory(prefix="fusewire-crash-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
            path, log = Path(folder) / "image", Path(folder) / "log"
            path.write_bytes(base(name))
            log.touch()
            self._record(path, log, chance)
            positions = self._replay(log)
            if not self.killed:
                assert path.read_bytes() == self.recorder.data, "the device was written past the recorder"
        self._count_in_events(positions)

    def _record(self, path: Path, log: Path, chance: random.Random) -> None:
        """Have the threads do their work; ``histories`` and ``ready`` tell of it in positions of the log."""
        self.options = options = chance.choice(OPTIONS)
        with recorded_mount(path, log, options, self.killed) as (root, process):
            self.histories = [
                History(os.fsencode(root), number, random.Random(f"{self.name}:{self.seed}:{number}"),
                        lambda: log.stat().st_size, not self.name.startswith("ext3"), frozenset(options.split(",")))
                for number in range(THREADS)]
            for history in self.histories:
                history.begin()
            self.ready = log.stat().st_size
            operations = chance.choice(OPERATIONS)
            last = chance.randrange(operations) if self.killed else -1

            def kill(number: int) -> None:
                if number == last:
                    process.kill()

            with ThreadPoolExecutor(THREADS) as pool:
                for done in [pool.submit(history.work, operations, kill if history is self.histories[0] else _nothing)
                             for history in self.histories]:
                    done.result()
            assert self.killed or not any(history.ended for history in self.histories)

    def _replay(self, log: Path) -> list[int]:
        """Fill the recorder with what the log tells; where in the log each of its events ended.

        What was written while a flush was under way may come after it: those writes are put behind it.
        """
        running: set[int] = set()                   # flushes under way
        late: list[tuple[int, int, bytes]] = []     # (the last flush that had begun, address, bytes)
        positions: list[int] = []
        for end, what, number, data in _records(log):
            if what == WRITE:
                late.append((max(running, default=0), number, data))
            elif what == FLUSH:
                running.add(number)
            else:
                running.remove(number)
                self._put([each for each in late if each[0] < number])
                late = [each for each in late if each[0] >= number]
                self.recorder.events.append(Flush())
            if not running:
                self._put(late)
                late = []
            positions += [end] * (len(self.recorder.events) - len(positions))
        self._put(late)
        positions += [log.stat().st_size] * (len(self.recorder.events) - len(positions))
        return positions

    def _put(self, writes: list[tuple[int, int, bytes]]) -> None:
        for _, address, data in writes:
            self.recorder.write(address, [data])

    def _count_in_events(self, positions: list[int]) -> None:
        """Turn positions of the log into numbers of events."""

        def at(position: int) -> int:
            return bisect_right(positions, position)

        self.ready = at(self.ready)
        for history in self.histories:
            history.steps = [(at(position), names) for position, names in history.steps]
            history.floors = [(at(position), step) for position, step in history.floors]
            for kept in {entry.kept for _, names in history.steps for entry in names.values()}:
                kept.versions = [(at(position), data) for position, data in kept.versions]
                kept.told = [(at(position), version) for position, version in kept.told]

    def cuts(self, count: int) -> list[Cut]:
        return [cut for cut in super().cuts(count) if cut.at >= self.ready]

    def judge(self, tree: Tree, at: int) -> None:
        """AssertionError if the recovered tree is not what the threads may expect."""
        wrong = [complaint for history in self.histories if (complaint := history.judge(tree, at)) is not None]
        assert not wrong, "\n".join(["no state of the threads matches", *wrong])


class MountedSweep(Sweep):
    """Checks cuts of a ``MountedRecording``."""

    recording: MountedRecording

    def matching(self, tree: Tree, cut: Cut) -> int:
        self.recording.judge(tree, cut.at)
        return 0

    def by_kernel(self, image: bytearray, cut: Cut, number: int) -> None:
        with image_file(image) as path:
            with kernel_mount(path, "rw,noatime") as mounted:
                tree = tree_of_mount(mounted.root)
            self.recording.judge(tree, cut.at)
            examine(path)


def _nothing(_number: int) -> None:
    """Done at each operation of a thread that kills nobody."""


def _records(log: Path) -> Iterator[tuple[int, bytes, int, bytes]]:
    """(where it ends, what, number, bytes) of each record that is whole."""
    raw, at = log.read_bytes(), 0
    while at + HEADER.size <= len(raw):
        what, number, length = HEADER.unpack_from(raw, at)
        assert what in (WRITE, FLUSH, FLUSHED)
        end = at + HEADER.size + length
        if end > len(raw):
            return
        yield end, what, number, raw[at + HEADER.size:end]
        at = end


def _journal_of(image: bytes) -> Iterator[int]:
    file = Core(image, Options(noload=True)).run(journalfile.locate)
    assert file is not None
    for extent in file.extents:
        yield from range(extent.start, extent.start + extent.length)


@contextmanager
def recorded_mount(path: Path, log: Path, options: str, killed: bool) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A mount, and its daemon, which is ended in peace unless it is to be ``killed``."""
    with mount_point() as target:
        command = [*DIES_WITH_US, sys.executable, "-P", "-m", "tests.crash.recording_daemon", log, "mount", "-f",
                   "-o", options, path, target]
        process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, cwd="/",
                                   env=fusewire_environment())
        try:
            assert wait_mounted(target, process)
            yield target, process
            if not killed:
                run(*fusewire_command(), "umount", target, env=fusewire_environment())
                assert process.wait(READY_SECONDS) == 0
        finally:
            abandon(target, process)


def main(name: str, seed: str, cuts: str = "300") -> None:
    private_mounts()
    recording = MountedRecording(name, int(seed))
    print(f"{len(recording.recorder.events)} events from {recording.ready}, {len(Cuts(recording.recorder).flushes)} "
          f"flushes, steps {[len(history.steps) for history in recording.histories]}, killed {recording.killed}, "
          f"{recording.options}")
    sweep = MountedSweep(recording, 0.2, 0.2, 0.05)
    sweep.run(int(cuts))
    print(f"{sweep.checked}, {len(sweep.states)} states")


if __name__ == "__main__":
    main(*sys.argv[1:])
