"""The server alone: its processor time per request, its memory, and how soon it is there."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from bench.images import MILLION, directory_name, write_million
from bench.sides import cpu_ns, resident_bytes
from bench.workload import MIB, OURS, SERVERS, Sample, Workload, absolute
from tests.mounting import Mount
from tests.walk import AT_EMPTY_PATH, AT_STATX_FORCE_SYNC, statx

REQUESTS = 20_000
LOOKUPS = 8_000  # fuse2fs takes a millisecond for one


def server_cpu(mounted: Mount, requests: int, run: Callable[[], None]) -> Sample:
    """Processor time that the server spends per request while ``run`` causes ``requests`` of them [µs]."""
    if mounted.pid is None:
        raise RuntimeError("the kernel is not a process")
    begin = cpu_ns(mounted.pid)
    run()
    return Sample((cpu_ns(mounted.pid) - begin) / requests / 1000)


def cpu_getattr(mounted: Mount) -> Sample:
    """GETATTR: statx of an open file with AT_STATX_FORCE_SYNC, which passes by the attribute cache."""
    fd = os.open(mounted.root / "large", os.O_RDONLY)

    def run() -> None:
        for _ in range(REQUESTS):
            statx(b"", fd, AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, 0x7FF)

    try:
        statx(b"", fd, AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, 0x7FF)
        return server_cpu(mounted, REQUESTS, run)
    finally:
        os.close(fd)


def cpu_read(mounted: Mount) -> Sample:
    """READ of 4 KiB whose data is in memory: O_DIRECT reads of the same 64 pages."""
    fd = os.open(mounted.root / "large", os.O_RDONLY | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)

    def run() -> None:
        for index in range(REQUESTS):
            os.preadv(fd, [page], index % 64 * 4096)

    try:
        run()
        return server_cpu(mounted, REQUESTS, run)
    finally:
        os.close(fd)
        page.close()


def cpu_lookup_absent(mounted: Mount) -> Sample:
    """LOOKUP of names that are not there, each another, in a directory that the server has read."""
    fd = os.open(mounted.root / "dir", os.O_RDONLY)

    def look(prefix: str) -> None:
        for index in range(LOOKUPS):
            try:
                os.stat(f"{prefix}-{index}", dir_fd=fd)
            except FileNotFoundError:
                continue

    try:
        look("first")
        return server_cpu(mounted, LOOKUPS, lambda: look("second"))
    finally:
        os.close(fd)


def drop_dentries(mounted: Mount) -> None:
    """Make the kernel forget the names and inodes of all file systems, and the server read of it."""
    Path("/proc/sys/vm/drop_caches").write_text("2")
    fd = os.open(mounted.root, os.O_RDONLY)
    try:
        statx(b"", fd, AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, 0x7FF)  # the forgets are read before it, or nearly all
    finally:
        os.close(fd)


def cpu_lookup(mounted: Mount) -> Sample:
    """LOOKUP of names that are there: all were looked up before, then the kernel was made to forget them."""
    fd = os.open(mounted.root / "dir", os.O_RDONLY)

    def look() -> None:
        for index in range(LOOKUPS):
            os.stat(directory_name(index), dir_fd=fd)

    try:
        look()
        drop_dentries(mounted)
        return server_cpu(mounted, LOOKUPS, look)
    finally:
        os.close(fd)


def idle_memory(mounted: Mount) -> Sample:
    """Resident memory of the server after listing the root [MiB]."""
    os.listdir(mounted.root)
    if mounted.pid is None:
        raise RuntimeError("the kernel is not a process")
    return Sample(resident_bytes(mounted.pid) / MIB)


def walk_million(mounted: Mount) -> None:
    """Stat every file with find; its count is checked."""
    command = ["find", str(mounted.root), "-type", "f", "-size", "0", "-printf", "x"]
    done = subprocess.run(command, check=True, capture_output=True)
    if len(done.stdout) != MILLION:
        raise RuntimeError(f"{len(done.stdout)} files instead of {MILLION}")


def walk_memory(mounted: Mount) -> Sample:
    """Highest resident memory of the server after the walk [MiB]."""
    walk_million(mounted)
    return highest_memory(mounted)


def highest_memory(mounted: Mount) -> Sample:
    """The most memory that the server ever had resident [MiB]."""
    if mounted.pid is None:
        raise RuntimeError("the kernel is not a process")
    return Sample(resident_bytes(mounted.pid, "VmHWM") / MIB)


def creating_memory(mounted: Mount) -> Sample:
    """Highest resident memory of the server after making a million files [MiB]."""
    write_million(mounted.root)
    return highest_memory(mounted)


WORKLOADS = (
    Workload("cpu-getattr", "server CPU per GETATTR", "µs", cpu_getattr, absolute(12), sides=SERVERS),
    Workload("cpu-read-4k", "server CPU per 4 KiB READ", "µs", cpu_read, absolute(12), start="cached", sides=SERVERS),
    Workload("cpu-lookup", "server CPU per LOOKUP", "µs", cpu_lookup, absolute(18), sides=SERVERS),
    Workload("cpu-lookup-absent", "the same, absent names", "µs", cpu_lookup_absent, absolute(18), sides=SERVERS),
    Workload("mount", "mount to first answer", "s", None, absolute(0.25)),
    Workload("mount-rw", "the same, for writing", "s", None, image="tree", writes=True),
    Workload("mount-1tib", "the same, 1 TiB", "s", None, absolute(0.25), image="huge"),
    Workload("memory-idle", "resident memory, idle", "MiB", idle_memory, absolute(60), sides=SERVERS),
    Workload(
        "memory-1m", "highest memory, 1,000,000 files", "MiB", walk_memory, absolute(300), "million", "cold", OURS, 1
    ),
    Workload(
        "memory-1m-create", "the same, made by it", "MiB", creating_memory, absolute(286), "roomy", "cold", OURS, 1,
        writes=True,
    ),
)
