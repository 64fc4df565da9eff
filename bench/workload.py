"""What a workload is, what a sample of one is, and how samples are taken."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.sides import cpu_ns
from tests.mounting import LIBC, Mount

MIB = 1 << 20
SERVERS = ("fuse2fs", "fusewire")
OURS = ("fusewire",)
OURS_AND_KERNEL = ("kernel", "fusewire")
ALL = ("kernel", "fuse2fs", "fusewire")


@dataclass(frozen=True)
class Target:
    """What the figure must reach: a ratio to kernel ext4 (``relative``) or an absolute value, at most or at least."""

    bound: float
    at_least: bool = False
    relative: bool = True


def at_most(bound: float) -> Target:
    """A ratio to kernel ext4 that is not exceeded."""
    return Target(bound)


def at_least(bound: float) -> Target:
    """A ratio to kernel ext4 that is reached."""
    return Target(bound, at_least=True)


def absolute(bound: float) -> Target:
    """A value in the workload's unit that is not exceeded."""
    return Target(bound, relative=False)


@dataclass(frozen=True)
class Sample:
    """One figure in the workload's unit, and the server's processor time per operation [µs] where there is a server."""

    value: float
    cpu: float | None = None


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    ``start``: ``cold`` (nothing of the image is in memory) or ``cached`` (all of it is, in the pages of its file).
    ``writes``: it runs on a copy of the image, mounted for writing; else on the image itself, mounted read-only.
    ``per``: the operation among which the server's processor time is shared.
    Without ``measure`` the figure is the time of the mount command and a listing.
    """

    name: str
    meaning: str
    unit: str
    measure: Callable[[Mount], Sample] | None
    target: Target | None = None
    image: str = "main"
    start: str = "cold"
    sides: tuple[str, ...] = ALL
    rounds: int = 1000
    writes: bool = False
    per: str = ""

    @property
    def is_rate(self) -> bool:
        """Whether more is better."""
        return self.unit in ("MiB/s", "IOPS")

    @property
    def is_compared(self) -> bool:
        """Whether the figure is a time or a rate, so that kernel ext4's can be set against it."""
        return self.is_rate or self.unit in ("s", "ms", "µs")


@dataclass(frozen=True)
class Timing:
    """How long something took, for how many operations, and what the server spent on it [s]."""

    seconds: float
    operations: float
    cpu: float | None

    @property
    def cpu_each(self) -> float | None:
        """The server's processor time per operation [µs]."""
        return None if self.cpu is None else self.cpu / self.operations * 1e6

    def total(self) -> Sample:
        """The whole time [s]."""
        return Sample(self.seconds, self.cpu_each)

    def each(self) -> Sample:
        """The time of one operation [µs]."""
        return Sample(self.seconds / self.operations * 1e6, self.cpu_each)

    def rate(self) -> Sample:
        """Operations per second."""
        return Sample(self.operations / self.seconds, self.cpu_each)


def timed(mounted: Mount, operations: float, run: Callable[[], object]) -> Timing:
    """The cost of ``run``, which does so many operations."""
    cpu = cpu_ns(mounted.pid) if mounted.pid else 0
    begin = time.perf_counter()
    run()
    elapsed = time.perf_counter() - begin
    return Timing(elapsed, operations, (cpu_ns(mounted.pid) - cpu) / 1e9 if mounted.pid else None)


def sync(mounted: Mount) -> None:
    """Put everything on the disk: syncfs, then the image's own pages (fuse2fs writes those; the kernel doesn't ask it).
    """
    for path, call in ((mounted.root, LIBC.syncfs), (mounted.image, LIBC.fsync)):
        fd = os.open(path, os.O_RDONLY)
        try:
            if call(fd):
                raise OSError(f"cannot sync {path}")
        finally:
            os.close(fd)
