"""Reading: file data, trees and attributes, of an image mounted read-only; cold, and again when the kernel has it."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from collections.abc import Callable

from bench.fio import random_direct
from bench.images import DIRECTORY_FILES, SMALL_DIRECTORY_FILES, TREE_FILES, directory_name
from bench.texts import SEED
from bench.workload import MIB, Sample, Target, Workload, at_least, at_most, timed
from tests.mounting import Mount

PAGES = 8000  # read at random


# --- data -------------------------------------------------------------------------------------------------------------


def read_large(mounted: Mount) -> Sample:
    """Throughput of reading the large file once [MiB/s]."""
    buffer = memoryview(bytearray(MIB))
    with open(mounted.root / "large", "rb", buffering=0) as file:

        def run() -> None:
            while file.readinto(buffer):
                pass

        return timed(mounted, os.fstat(file.fileno()).st_size / MIB, run).rate()


def map_large(mounted: Mount) -> Sample:
    """Throughput of touching each page of a mapping of the large file, in order [MiB/s]."""
    with (
        open(mounted.root / "large", "rb", buffering=0) as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data,
    ):
        return timed(mounted, len(data) / MIB, lambda: sum(data[::4096])).rate()


def read_at_random(mounted: Mount) -> Sample:
    """Buffered reads of 4 KiB at random places of the large file [operations per second]."""
    with open(mounted.root / "large", "rb", buffering=0) as file:
        pages = random.Random(SEED).sample(range(os.fstat(file.fileno()).st_size // 4096), PAGES)

        def run() -> None:
            for page in pages:
                os.pread(file.fileno(), 4096, page * 4096)

        return timed(mounted, PAGES, run).rate()


def warm(measure: Callable[[Mount], Sample]) -> Callable[[Mount], Sample]:
    """``measure`` on its third run: the second still moves pages to the list of those in use."""

    def again(mounted: Mount) -> Sample:
        measure(mounted)
        measure(mounted)
        return measure(mounted)

    return again


def direct_reads(mounted: Mount) -> Sample:
    """Direct reads of 4 KiB [operations per second]."""
    return random_direct(mounted, mounted.root / "large", "read")


# --- names and attributes ---------------------------------------------------------------------------------------------


def command_seconds(*words: str) -> Callable[[Mount], Sample]:
    """The time of a command that finds nothing in the tree of small files, which it gets for ``TREE`` [s]."""

    def measure(mounted: Mount) -> Sample:
        command = [str(mounted.root / "tree") if word == "TREE" else word for word in words]

        def run() -> None:
            done = subprocess.run(command, check=False, capture_output=True)
            if done.stdout or done.stderr:
                raise RuntimeError(f"{words[0]}: {(done.stdout + done.stderr)[:500]!r}")

        return timed(mounted, TREE_FILES, run).total()

    return measure


def list_and_stat(mounted: Mount) -> Sample:
    """List the large directory and stat each name [s]."""

    def run() -> None:
        with os.scandir(mounted.root / "dir") as found:
            if sum(entry.stat().st_size > 0 for entry in found) != DIRECTORY_FILES:
                raise RuntimeError(f"{mounted.root}/dir does not show {DIRECTORY_FILES} files")

    return timed(mounted, DIRECTORY_FILES, run).total()


def stats(total: int, count: int, absent: bool = False) -> Callable[[Mount], Sample]:
    """Time per stat of ``count`` of the ``total`` names of a directory, in random order [µs]."""
    names = [directory_name(index) for index in random.Random(SEED).sample(range(total), count)]

    def measure(mounted: Mount) -> Sample:
        fd = os.open(mounted.root / "dir", os.O_RDONLY)
        found = 0

        def run() -> None:
            nonlocal found
            for name in names:
                try:
                    os.stat(name + "~" if absent else name, dir_fd=fd)
                    found += 1
                except FileNotFoundError:
                    pass

        try:
            timing = timed(mounted, count, run)
        finally:
            os.close(fd)
        if found != (0 if absent else count):
            raise RuntimeError(f"{found} of {count} names found")
        return timing.each()

    return measure


def tree_paths(mounted: Mount) -> list[str]:
    """The paths of the files of the tree."""
    return [f"{path}/{name}" for path, _, names in os.walk(mounted.root / "tree") for name in names]


def warm_stat(mounted: Mount) -> Sample:
    """Time per stat of the files of the tree, attributes cached [µs]."""
    paths = tree_paths(mounted)
    for path in paths:
        os.stat(path)

    def run() -> None:
        for path in paths:
            os.stat(path)

    return timed(mounted, len(paths), run).each()


def warm_readdir(mounted: Mount) -> Sample:
    """Time per name of listing every directory of the tree and the large one, cached [µs]."""
    directories = [path for path, _, _ in os.walk(mounted.root / "tree")] + [str(mounted.root / "dir")]
    names = sum(len(os.listdir(path)) for path in directories for _ in range(2)) // 2

    def run() -> None:
        for path in directories:
            os.listdir(path)

    return timed(mounted, names, run).each()


def row(
    name: str,
    meaning: str,
    unit: str,
    measure: Callable[[Mount], Sample],
    target: Target | None = None,
    per: str = "name",
    image: str = "main",
    start: str = "cold",
) -> Workload:
    """A row of this module."""
    return Workload(name, meaning, unit, measure, target, image=image, start=start, per=per)


FIND = command_seconds("find", "TREE", "-size", "+1000000k")
GREP = command_seconds("grep", "-r", "no such text in it", "TREE")
MANY, FEW = DIRECTORY_FILES, SMALL_DIRECTORY_FILES
WORKLOADS = (
    row("seq-read-cold", "read 1 GiB", "MiB/s", read_large, at_least(0.8), "MiB"),
    row("seq-read-warm", "read 1 GiB again", "MiB/s", warm(read_large), at_least(0.95), "MiB"),
    row("mmap-read-cold", "touch each page of a mapping of 1 GiB", "MiB/s", map_large, None, "MiB"),
    row("random-read", "buffered 4 KiB at random places, cold", "IOPS", read_at_random, None, "read"),
    row("direct-4k", "direct 4 KiB at random places, depth 16", "IOPS", direct_reads, at_least(0.5), "read", "main",
        "cached"),
    row("stat-warm", "stat of 20,000 files again", "µs", warm_stat, at_most(1 / 0.95), "file"),
    row("readdir-warm", "list 1,300 directories again", "µs", warm_readdir, at_most(1 / 0.95)),
    row("find-cold", "find -size over 20,000 files", "s", FIND, at_most(1.7), "file"),
    row("find-warm", "the same again", "s", warm(FIND), None, "file"),
    row("grep-cold", "grep -r over 20,000 files", "s", GREP, at_most(1.2), "file"),
    row("grep-warm", "the same again", "s", warm(GREP), None, "file"),
    row("list-stat-cold", "list and stat 20,000 names", "s", list_and_stat, at_most(1.9)),
    row("random-stat-cold", "stat 2,000 of 20,000 names", "µs", stats(MANY, 2000), at_most(5)),
    row("absent-cold", "stat 2,000 absent names", "µs", stats(MANY, 2000, absent=True), at_most(5)),
    row("small-stat-cold", "stat all of 3,000 names", "µs", stats(FEW, FEW), None, image="names"),
    row("small-absent-cold", "stat 3,000 absent names", "µs", stats(FEW, FEW, absent=True), None, image="names"),
)
