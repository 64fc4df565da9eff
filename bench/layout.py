"""Where files lie: in how many extents, after several programs appended to theirs at the same time.

Four processes append: to logs with an fsync after every 4 KiB, to streams of 64 KiB with an fsync now and then, to
downloads of 1 MiB without any, and to small files one after the other.  What came of it, the journal replayed, is then
read from a copy that the kernel mounts.
"""

from __future__ import annotations

import array
import fcntl
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from bench.workload import MIB, OURS_AND_KERNEL, Sample, Workload, at_most, sync
from tests.mounting import Mount, kernel_mount

KIB = 1 << 10
FS_IOC_FIEMAP = 0xC020660B
EXTENTS_AT = 20     # fm_mapped_extents in struct fiemap [bytes]
SEED = 20_240_229

Append = tuple[str, int, bool]      # (file, bytes, whether an fsync follows)


def logs(folder: str) -> Iterator[Append]:
    """Two files that grow by 4 KiB in turn, each durable."""
    for number in range(300):
        yield f"{folder}/log-{number % 2}", 4 * KIB, True


def streams(folder: str) -> Iterator[Append]:
    """Two files that grow by 64 KiB in turn to 12 MiB, durable every megabyte."""
    for number in range(384):
        yield f"{folder}/stream-{number % 2}", 64 * KIB, number % 32 >= 30


def downloads(folder: str) -> Iterator[Append]:
    """Two files that grow by a megabyte in turn to 24 MiB."""
    for number in range(48):
        yield f"{folder}/download-{number % 2}", MIB, False


def documents(folder: str) -> Iterator[Append]:
    """150 files of up to 200 KiB, in one or two appends."""
    chance = random.Random(SEED)
    for number in range(150):
        for _ in range(chance.choice((1, 2))):
            yield f"{folder}/document-{number}", chance.randrange(1, 100 * KIB), number % 10 == 0


def append_all(root: Path, appends: Callable[[str], Iterator[Append]]) -> None:
    """Do one process's appends."""
    folder = root / appends.__name__
    folder.mkdir()
    files: dict[str, int] = {}
    for path, count, durable in appends(str(folder)):
        if path not in files:
            files[path] = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.write(files[path], bytes(count))
        if durable:
            os.fsync(files[path])
    for fd in files.values():
        os.close(fd)


def at_once(root: Path) -> None:
    """All processes together."""
    fork = get_context("fork")
    processes = [fork.Process(target=append_all, args=(root, each)) for each in (logs, streams, downloads, documents)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"an appending process ended with {process.exitcode}")


def extents_of(path: Path) -> int:
    """How many extents map a file, as FIEMAP counts them."""
    request = array.array("B", (0).to_bytes(8, "little") + (1 << 62).to_bytes(8, "little") + bytes(16))
    with open(path, "rb") as file:
        fcntl.ioctl(file, FS_IOC_FIEMAP, request)
    return int.from_bytes(request[EXTENTS_AT:EXTENTS_AT + 4], "little")


@contextmanager
def by_kernel(image: Path) -> Iterator[Path]:
    """What is durable of an image in use, as the kernel mounts a copy of it."""
    copy = image.with_name(f"bench-layout-{os.getpid()}.img")
    try:
        subprocess.run(["cp", "--sparse=always", image, copy], check=True)
        with kernel_mount(copy, "rw") as mounted:
            yield mounted.root
    finally:
        copy.unlink(missing_ok=True)


def extents_each(mounted: Mount) -> Sample:
    """Extents per file after all appends."""
    at_once(mounted.root)
    sync(mounted)
    with by_kernel(mounted.image) as root:
        counts = [extents_of(path) for path in root.rglob("*") if path.is_file()]
    return Sample(sum(counts) / len(counts))


WORKLOADS = (
    Workload("append-layout", "extents per file after four processes appended", "extents", extents_each, at_most(1.5),
             image="empty", sides=OURS_AND_KERNEL, writes=True),
)
