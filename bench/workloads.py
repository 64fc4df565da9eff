"""The workloads: each measures one figure on a mount that the runner has just made."""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.images import DIRECTORY_FILES, MILLION, SEED, directory_name
from bench.sides import cpu_ns, resident_bytes
from tests.mounting import Mount
from tests.walk import AT_EMPTY_PATH, AT_STATX_FORCE_SYNC, statx

SAMPLES = 2000
REQUESTS = 20_000
LOOKUPS = 8_000  # fuse2fs takes a millisecond for one
MIB = 1 << 20


@dataclass(frozen=True)
class Target:
    """What the figure must reach: a ratio to kernel ext4 (``relative``) or an absolute value, at most or at least."""

    bound: float
    at_least: bool = False
    relative: bool = True


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    ``start``: ``cold`` (nothing of the image is in memory) or ``cached`` (all of it is, in the pages of its file).
    Without ``measure`` the figure is the time of the mount command and a listing.
    """

    name: str
    meaning: str
    unit: str
    measure: Callable[[Mount], float] | None
    target: Target | None = None
    image: str = "main"
    start: str = "cold"
    sides: tuple[str, ...] = ("kernel", "fuse2fs", "fusewire")
    rounds: int = 1000


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


# --- data -------------------------------------------------------------------------------------------------------------


def read_large(mounted: Mount) -> float:
    """Throughput of reading the large file once [MiB/s]."""
    buffer = memoryview(bytearray(MIB))
    with open(mounted.root / "large", "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size

        def read_all() -> None:
            while file.readinto(buffer):
                pass

        return size / MIB / seconds(read_all)


def warm(measure: Callable[[Mount], float]) -> Callable[[Mount], float]:
    """``measure`` on its third run: the second still moves pages to the list of those in use."""

    def again(mounted: Mount) -> float:
        measure(mounted)
        measure(mounted)
        return measure(mounted)

    return again


def direct_reads(mounted: Mount) -> float:
    """4 KiB O_DIRECT reads per second at depth 16, by fio."""
    command = ["fio", "--name=direct", f"--filename={mounted.root}/large", "--readonly", "--rw=randread", "--bs=4k"]
    command += ["--direct=1", "--ioengine=libaio", "--iodepth=16", "--time_based", "--runtime=3", "--randseed=1"]
    done = subprocess.run([*command, "--output-format=json"], check=True, capture_output=True, text=True, cwd="/tmp")
    return float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["iops"])


# --- names and attributes ---------------------------------------------------------------------------------------------


def command_seconds(*words: str) -> Callable[[Mount], float]:
    """The time of a command that finds nothing in the tree of small files, which it gets for ``TREE`` [s]."""

    def measure(mounted: Mount) -> float:
        command = [str(mounted.root / "tree") if word == "TREE" else word for word in words]
        begin = time.perf_counter()
        done = subprocess.run(command, check=False, capture_output=True)
        elapsed = time.perf_counter() - begin
        if done.stdout or done.stderr:
            raise RuntimeError(f"{words[0]}: {(done.stdout + done.stderr)[:500]!r}")
        return elapsed

    return measure


def list_and_stat(mounted: Mount) -> float:
    """List the large directory and stat each name [s]."""

    def run() -> None:
        with os.scandir(mounted.root / "dir") as found:
            if sum(entry.stat().st_size > 0 for entry in found) != DIRECTORY_FILES:
                raise RuntimeError(f"{mounted.root}/dir does not show {DIRECTORY_FILES} files")

    return seconds(run)


def random_stats(mounted: Mount, absent: bool = False) -> float:
    """Time per stat of names in random order [µs]."""
    names = [directory_name(index) for index in random.Random(SEED).sample(range(DIRECTORY_FILES), SAMPLES)]
    fd = os.open(mounted.root / "dir", os.O_RDONLY)
    try:
        found = 0
        begin = time.perf_counter()
        for name in names:
            try:
                os.stat(name + "~" if absent else name, dir_fd=fd)
                found += 1
            except FileNotFoundError:
                pass
        elapsed = time.perf_counter() - begin
    finally:
        os.close(fd)
    if found != (0 if absent else SAMPLES):
        raise RuntimeError(f"{found} of {SAMPLES} names found")
    return elapsed / SAMPLES * 1e6


def tree_paths(mounted: Mount) -> list[str]:
    return [f"{path}/{name}" for path, _, names in os.walk(mounted.root / "tree") for name in names]


def warm_stat(mounted: Mount) -> float:
    """Time per stat of the files of the tree, attributes cached [µs]."""
    paths = tree_paths(mounted)
    for path in paths:
        os.stat(path)

    def run() -> None:
        for path in paths:
            os.stat(path)

    return seconds(run) / len(paths) * 1e6


def warm_readdir(mounted: Mount) -> float:
    """Time per name of listing every directory of the tree and the large one, cached [µs]."""
    directories = [path for path, _, _ in os.walk(mounted.root / "tree")] + [str(mounted.root / "dir")]
    names = sum(len(os.listdir(path)) for path in directories for _ in range(2)) // 2

    def run() -> None:
        for path in directories:
            os.listdir(path)

    return seconds(run) / names * 1e6


# --- the server alone -------------------------------------------------------------------------------------------------


def server_cpu(mounted: Mount, requests: int, run: Callable[[], None]) -> float:
    """Processor time that the server spends per request while ``run`` causes ``requests`` of them [µs]."""
    if mounted.pid is None:
        raise RuntimeError("the kernel is not a process")
    begin = cpu_ns(mounted.pid)
    run()
    return (cpu_ns(mounted.pid) - begin) / requests / 1000


def cpu_getattr(mounted: Mount) -> float:
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


def cpu_read(mounted: Mount) -> float:
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


def cpu_lookup_absent(mounted: Mount) -> float:
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


def cpu_lookup(mounted: Mount) -> float:
    """LOOKUP of names that are there: all were looked up before, then the kernel was made to forget them."""
    fd = os.open(mounted.root / "dir", os.O_RDONLY)

    def look() -> None:
        for index in range(LOOKUPS):
            os.stat(directory_name(index), dir_fd=fd)

    try:
        look()
        Path("/proc/sys/vm/drop_caches").write_text("2")
        statx(b"", fd, AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, 0x7FF)  # the forgets are read before it, or nearly all
        return server_cpu(mounted, LOOKUPS, look)
    finally:
        os.close(fd)


def idle_memory(mounted: Mount) -> float:
    """Resident memory of the server after listing the root [MiB]."""
    os.listdir(mounted.root)
    if mounted.pid is None:
        raise RuntimeError("the kernel is not a process")
    return resident_bytes(mounted.pid) / MIB


def walk_million(mounted: Mount) -> None:
    """Stat every file with find; its count is checked."""
    command = ["find", str(mounted.root), "-type", "f", "-size", "0", "-printf", "x"]
    done = subprocess.run(command, check=True, capture_output=True)
    if len(done.stdout) != MILLION:
        raise RuntimeError(f"{len(done.stdout)} files instead of {MILLION}")


def walk_memory(mounted: Mount) -> float:
    """Highest resident memory of the server after the walk [MiB]."""
    walk_million(mounted)
    if mounted.pid is None:
        raise RuntimeError("the kernel is not a process")
    return resident_bytes(mounted.pid, "VmHWM") / MIB


SERVERS = ("fuse2fs", "fusewire")
OURS = ("fusewire",)
FIND = ("find", "TREE", "-size", "+1000000k")
GREP = ("grep", "-r", "no such text in it", "TREE")


def at_most(bound: float) -> Target:
    return Target(bound)


def at_least(bound: float) -> Target:
    return Target(bound, at_least=True)


def absolute(bound: float) -> Target:
    return Target(bound, relative=False)


def no_stat(mounted: Mount) -> float:
    """Time per absent name [µs]."""
    return random_stats(mounted, absent=True)


WORKLOADS = (
    Workload("seq-read-cold", "read 1 GiB", "MiB/s", read_large, at_least(0.8)),
    Workload("seq-read-warm", "read 1 GiB again", "MiB/s", warm(read_large), at_least(0.95)),
    Workload("stat-warm", "stat of 20,000 files again", "µs", warm_stat, at_most(1 / 0.95)),
    Workload("readdir-warm", "list 1,300 directories again", "µs", warm_readdir, at_most(1 / 0.95)),
    Workload("find-cold", "find -size over 20,000 files", "s", command_seconds(*FIND), at_most(1.7)),
    Workload("grep-cold", "grep -r over 20,000 files", "s", command_seconds(*GREP), at_most(1.2)),
    Workload("list-stat-cold", "list and stat 20,000 names", "s", list_and_stat, at_most(1.9)),
    Workload("random-stat-cold", "stat 2,000 of 20,000 names", "µs", random_stats, at_most(5)),
    Workload("absent-cold", "stat 2,000 absent names", "µs", no_stat, at_most(5)),
    Workload("direct-4k", "random 4 KiB direct, depth 16", "IOPS", direct_reads, at_least(0.5), start="cached"),
    Workload("cpu-getattr", "server CPU per GETATTR", "µs", cpu_getattr, absolute(12), sides=SERVERS),
    Workload("cpu-read-4k", "server CPU per 4 KiB READ", "µs", cpu_read, absolute(12), start="cached", sides=SERVERS),
    Workload("cpu-lookup", "server CPU per LOOKUP", "µs", cpu_lookup, absolute(18), sides=SERVERS),
    Workload("cpu-lookup-absent", "the same, absent names", "µs", cpu_lookup_absent, absolute(18), sides=SERVERS),
    Workload("mount", "mount to first answer", "s", None, absolute(0.25)),
    Workload("mount-1tib", "the same, 1 TiB", "s", None, absolute(0.25), image="huge"),
    Workload("memory-idle", "resident memory, idle", "MiB", idle_memory, absolute(60), sides=SERVERS),
    Workload(
        "memory-1m", "highest memory, 1,000,000 files", "MiB", walk_memory, absolute(300), "million", "cold", OURS, 1
    ),
)
