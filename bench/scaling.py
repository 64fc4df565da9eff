"""How much dearer an operation is in a directory of 100,000 names than in one of 1,000."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

from bench.images import BIG_NAMES, SMALL_DIRECTORIES, SMALL_NAMES, directory_name
from bench.serving import drop_dentries
from bench.texts import SEED
from bench.workload import OURS_AND_KERNEL, Sample, Timing, Workload, absolute, timed
from tests.mounting import Mount

OPERATIONS = 5000
CHUNK = 500  # operations between two turns
EACH = OPERATIONS // SMALL_DIRECTORIES

Act = Callable[[str], object]


def make_empty(path: str) -> None:
    """An empty file."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def look_at_all(root: str) -> None:
    """Stat every name once, so that no block is read from the disk later."""
    for folder in sorted(os.listdir(root)):
        with os.scandir(f"{root}/{folder}") as found:
            for entry in found:
                os.stat(entry.path)


def chosen(folder: str, names: int, count: int, suffix: str) -> list[str]:
    """Paths of ``count`` of the ``names`` names of a directory."""
    indexes = random.Random(f"{SEED} {folder}").sample(range(names), count)
    return [f"{folder}/{directory_name(index)}{suffix}" for index in indexes]


def in_turns(mounted: Mount, act: Act, big: list[str], small: list[str]) -> tuple[list[Timing], list[Timing]]:
    """The times of ``act`` on both lists of paths, some of each in turn."""

    def part(paths: list[str]) -> Timing:
        def run() -> None:
            for path in paths:
                act(path)

        return timed(mounted, len(paths), run)

    begins = range(0, OPERATIONS, CHUNK)
    pairs = [(part(big[begin : begin + CHUNK]), part(small[begin : begin + CHUNK])) for begin in begins]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def growth(act: Act, suffix: str = "", cold_names: bool = False) -> Callable[[Mount], Sample]:
    """The time of ``act`` in the big directory, as a multiple of that in the small ones.

    The processor time is that of the big directory.  ``cold_names``: the kernel asks for each name.
    """

    def measure(mounted: Mount) -> Sample:
        root = str(mounted.root)
        look_at_all(root)
        big = chosen(f"{root}/big", BIG_NAMES, OPERATIONS, suffix)
        small = [
            path
            for index in range(SMALL_DIRECTORIES)
            for path in chosen(f"{root}/small-{index:02}", SMALL_NAMES, EACH, suffix)
        ]
        if cold_names:
            drop_dentries(mounted)
        bigs, smalls = in_turns(mounted, act, big, small)
        ratio = sum(timing.seconds for timing in bigs) / sum(timing.seconds for timing in smalls)
        cpu = sum(timing.cpu or 0.0 for timing in bigs)
        return Sample(ratio, cpu / OPERATIONS * 1e6 if mounted.pid else None)

    return measure


def row(name: str, meaning: str, measure: Callable[[Mount], Sample]) -> Workload:
    """A row of this module."""
    sides = OURS_AND_KERNEL
    return Workload(name, meaning, "×", measure, absolute(1.5), "directories", "cold", sides, writes=True, per="name")


WORKLOADS = (
    row("grow-create", "create: 100,000 names against 1,000", growth(make_empty, "~")),
    row("grow-lookup", "look-up of names the kernel dropped", growth(os.stat, cold_names=True)),
    row("grow-unlink", "unlink", growth(os.unlink)),
)
