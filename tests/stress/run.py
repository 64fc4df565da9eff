"""Several processes on one mount at once, with sync, remounts and a full disk; afterwards everybody must agree.

``python -m tests.stress.run SHAPE SEED [SECONDS]`` repeats one run (as root), as far as chance among processes lets it.
"""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.model.run import fsck
from tests.model.side import Side, fallocate
from tests.mount.writable_mount import stale_image
from tests.mounting import CHECKOUT, Mount, fusewire_mount, kernel_mount, private_mounts

WORKERS = 4
ANSWER_SECONDS = 240
SYNC_SECONDS = 0.1
CALLS = (20, 100, 300)      # of each process in one round
LEAVE_BYTES = (0, 20_000, 300_000)      # of a disk that is called full


class Shape(NamedTuple):
    """A kind of file system, and how it is mounted."""

    mkfs: str
    mib: int
    options: str = "rw,noatime"
    has_extents: bool = True


SHAPES = {
    "ext4-1k": Shape("-t ext4 -b 1024 -J size=1 -N 4000", 48),
    "ext4-2k": Shape("-t ext4 -b 2048 -J size=4 -I 128 -N 4000 -O ^orphan_file", 64),
    "ext4-4k": Shape("-t ext4 -b 4096 -N 4000", 96),
    "small-cache": Shape("-t ext4 -b 1024 -N 4000", 48, "rw,noatime,cache_size=1"),
    "ext3-1k": Shape("-t ext3 -b 1024 -J size=1 -N 4000", 48, has_extents=False),
    "ext3-4k": Shape("-t ext3 -b 4096 -I 128 -N 4000", 96, has_extents=False),
    "no-journal": Shape("-t ext4 -b 4096 -O ^has_journal -N 4000", 64),
}


class Team:
    """The processes."""

    def __init__(self, seed: int, has_extents: bool) -> None:
        self.processes = [subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.stress.worker", str(number), str(seed), str(has_extents)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", env=os.environ | {"PYTHONPATH": str(CHECKOUT)})
            for number in range(WORKERS)]

    def ask(self, *command: object, meanwhile: Side | None = None) -> list[int]:
        """The answers of all to one command; with ``meanwhile``, that mount is synchronised again and again."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
        deadline = time.monotonic() + ANSWER_SECONDS
        waiting = {process.stdout: None for process in self.processes if process.stdout is not None}
        answers = []
        while waiting:
            ready = select.select(list(waiting), [], [], SYNC_SECONDS if meanwhile else ANSWER_SECONDS)[0]
            for stream in ready:
                text = stream.readline()
                answers.append(json.loads(text) if text else "a process has ended")
                del waiting[stream]
            if meanwhile is not None:
                with suppress(OSError):     # a full disk is told here, too
                    meanwhile.syncfs()
            assert time.monotonic() < deadline, f"{command}: {len(waiting)} processes do not answer"
        wrong = [answer for answer in answers if not isinstance(answer, int)]
        assert not wrong, "\n".join(wrong)
        return answers

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@contextmanager
def team(seed: int, has_extents: bool) -> Iterator[Team]:
    made = Team(seed, has_extents)
    try:
        yield made
    finally:
        made.end()


def stress(name: str, seed: int, seconds: float, folder: Path) -> dict[str, int]:
    """Run for so long; what was done.  AssertionError tells what is wrong."""
    shape, path, chance = SHAPES[name], folder / "stress.img", random.Random(seed)
    stale_image(path, shape.mkfs, shape.mib << 20)
    done = {"calls": 0, "refused": 0, "mounts": 0, "full": 0}
    end = time.monotonic() + seconds
    with team(seed, shape.has_extents) as workers:
        while not done["mounts"] or time.monotonic() < end:
            with fusewire_mount(path, shape.options) as mount:
                if done["mounts"]:
                    workers.ask("verify", str(mount.root))
                else:
                    _begin(mount, workers)
                for _ in range(chance.randrange(2, 5)):
                    _round(mount, workers, chance, done)
                done["mounts"] += 1
                text = mount.log_text()
                assert '"level": "error"' not in text and "Traceback" not in text, text
            complaint = fsck(path)
            assert not complaint, complaint
        with kernel_mount(path) as mount:
            workers.ask("verify", str(mount.root))
    path.unlink()
    return done


def _begin(mount: Mount, workers: Team) -> None:
    os.mkdir(mount.root / "shared")
    (mount.root / "records").touch()
    workers.ask("begin", str(mount.root))


def _round(mount: Mount, workers: Team, chance: random.Random, done: dict[str, int]) -> None:
    calls, full, side = chance.choice(CALLS), chance.random() < 0.3, Side(mount.root)
    balloon = mount.root / "balloon"
    if full:
        _fill(balloon, chance.choice(LEAVE_BYTES))
    refused = workers.ask("work", str(mount.root), calls, full, meanwhile=side if chance.random() < 0.7 else None)
    if chance.random() < 0.3:
        workers.ask("verify", str(mount.root))
    if full:
        balloon.unlink()
    done["calls"] += calls * WORKERS
    done["refused"] += sum(refused)
    done["full"] += full


def _fill(path: Path, leave: int) -> None:
    """A file that leaves so much of the disk."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        size = 0
        for piece in (4 << 20, 1 << 18, 1 << 12):
            with suppress(OSError):
                while True:
                    _grow(fd, size, piece)
                    size += piece
        os.ftruncate(fd, max(size - leave, 0))
    finally:
        os.close(fd)


def _grow(fd: int, size: int, piece: int) -> None:
    """By fallocate(2), or by writing where there is none."""
    try:
        fallocate(fd, 0, size, piece)
    except OSError as error:
        if error.errno != 95:
            raise
        if os.pwrite(fd, b"balloon." * (piece // 8), size) < piece:
            raise OSError(28, "full") from None
        os.fsync(fd)


def main(name: str, seed: str, seconds: str = "10") -> None:
    private_mounts()
    with tempfile.TemporaryDirectory(prefix="fusewire-stress-") as folder:
        print(stress(name, int(seed), float(seconds), Path(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
