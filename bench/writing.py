"""Writing and freeing file data: in order, at random places, buffered, direct, and made durable at once."""

from __future__ import annotations

import ctypes
import os
import random
import statistics
import time
from collections.abc import Callable

from bench.fio import random_direct
from bench.images import DATA_BYTES
from bench.texts import SEED
from bench.workload import MIB, Sample, Target, Workload, at_least, at_most, sync, timed
from tests.mounting import LIBC, Mount

PAGE = 4096
PAGES = DATA_BYTES // PAGE // 2  # written at random: every second one
APPENDS = 400
STEP = 128 << 10  # between two ends, or two holes, of the file
PUNCH_HOLE, KEEP_SIZE = 2, 1


def write_large(mounted: Mount) -> Sample:
    """Throughput of writing 1 GiB in writes of 1 MiB, with one fsync at the end [MiB/s]."""
    data = os.urandom(MIB)
    with open(mounted.root / "new", "wb", buffering=0) as file:

        def run() -> None:
            for _ in range(1024):
                file.write(data)
            os.fsync(file.fileno())

        return timed(mounted, 1024, run).rate()


def write_at_random(mounted: Mount) -> Sample:
    """Buffered writes of 4 KiB to half of the pages of a file of 256 MiB, not synced [operations per second]."""
    pages = random.Random(SEED).sample(range(DATA_BYTES // PAGE), PAGES)
    data = os.urandom(PAGE)
    with open(mounted.root / "data", "r+b", buffering=0) as file:

        def run() -> None:
            for page in pages:
                os.pwrite(file.fileno(), data, page * PAGE)

        return timed(mounted, PAGES, run).rate()


def direct_writes(mounted: Mount) -> Sample:
    """Direct writes of 4 KiB over what was written before [operations per second]."""
    return random_direct(mounted, mounted.root / "data", "write")


def append_durably(mounted: Mount) -> Sample:
    """Median of the time of an append of 4 KiB together with its fsync [µs]."""
    data = os.urandom(PAGE)
    latencies = []
    with open(mounted.root / "log", "ab", buffering=0) as file:

        def run() -> None:
            for _ in range(APPENDS):
                begin = time.perf_counter()
                file.write(data)
                os.fsync(file.fileno())
                latencies.append(time.perf_counter() - begin)

        sync(mounted)
        timing = timed(mounted, APPENDS, run)
    return Sample(statistics.median(latencies) * 1e6, timing.cpu_each)


def punch(fd: int, offset: int) -> None:
    """Free 4 KiB of a file."""
    if LIBC.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(PAGE)):
        raise OSError(ctypes.get_errno(), "fallocate")


def in_steps(act: Callable[[int, int], None]) -> Callable[[Mount], Sample]:
    """The time of ``act`` at every 128 KiB of a file of 256 MiB, from its end to its begin [µs]."""

    def measure(mounted: Mount) -> Sample:
        with open(mounted.root / "data", "r+b", buffering=0) as file:

            def run() -> None:
                for offset in range(DATA_BYTES - STEP, -1, -STEP):
                    act(file.fileno(), offset)

            return timed(mounted, DATA_BYTES // STEP, run).each()

    return measure


def row(name: str, meaning: str, unit: str, measure: Callable[[Mount], Sample], target: Target | None, image: str,
        per: str, start: str = "cold") -> Workload:
    """A row of this module."""
    return Workload(name, meaning, unit, measure, target, image=image, start=start, per=per, writes=True)


SHRINK, PUNCH = in_steps(os.ftruncate), in_steps(punch)
WORKLOADS = (
    row("seq-write", "write 1 GiB and fsync", "MiB/s", write_large, at_least(0.6), "empty", "MiB"),
    row("random-write", "buffered 4 KiB at random places", "IOPS", write_at_random, at_least(0.1), "data", "write"),
    row("direct-4k-write", "direct 4 KiB at random places, depth 16", "IOPS", direct_writes, at_least(0.4), "data",
        "write", "cached"),
    row("append-fsync", "append 4 KiB and fsync, median", "µs", append_durably, at_most(1.3), "empty", "append"),
    row("truncate-shrink", "shorten a file by 128 KiB", "µs", SHRINK, None, "data", "call"),
    row("punch", "punch a hole of 4 KiB", "µs", PUNCH, None, "data", "call"),
)
