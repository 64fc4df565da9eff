"""The three servers of one image, and what can be asked about the process that serves."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.mounting import Mount, fuse2fs_mount, fusewire_command, fusewire_environment, fusewire_mount, kernel_mount

CPU_OF_PROCESS = 2  # in the number of a clock: time that the scheduler has counted (clock_getcpuclockid(3))


@dataclass(frozen=True)
class Side:
    """One server: how to mount in the foreground, and the command a person would type; both get ``ro`` or ``rw``.

    ``rounds``: the most that are worth their time; fuse2fs takes minutes for one and is far from the others.
    """

    name: str
    mount: Callable[[Path, str], AbstractContextManager[Mount]]
    command: Callable[[Path, Path, str], list[str]]
    rounds: int = 1000


def kernel_command(image: Path, target: Path, mode: str) -> list[str]:
    return ["mount", "-t", "ext4", "-o", f"loop,{mode}", str(image), str(target)]


def fuse2fs_command(image: Path, target: Path, mode: str) -> list[str]:
    return ["fuse2fs", "-o", f"{mode},allow_other,default_permissions", str(image), str(target)]


def fusewire_mount_command(image: Path, target: Path, mode: str) -> list[str]:
    return [*fusewire_command(), "mount", "-o", mode, str(image), str(target)]


SIDES = {
    "kernel": Side("kernel", kernel_mount, kernel_command),
    "fuse2fs": Side("fuse2fs", fuse2fs_mount, fuse2fs_command, rounds=1),
    "fusewire": Side("fusewire", fusewire_mount, fusewire_mount_command),
}


def start_detached(side: Side, image: Path, target: Path, mode: str) -> None:
    """Run the ordinary mount command, which returns when it thinks that the mount is there."""
    command = side.command(image, target, mode)
    subprocess.run(command, check=True, env=fusewire_environment(), cwd="/", stdout=2, stdin=subprocess.DEVNULL)


def cpu_ns(pid: int) -> int:
    """Processor time that all threads of ``pid`` have used, those that have ended too [ns]."""
    return time.clock_gettime_ns(~pid << 3 | CPU_OF_PROCESS)


def resident_bytes(pid: int, field: str = "VmRSS") -> int:
    """Resident memory of ``pid`` now, or with ``VmHWM`` at its highest."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def forget_pages(path: Path) -> None:
    """Take the pages of the image out of memory: with the mount gone, nothing of the file system is left in it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def load_pages(path: Path) -> None:
    """Read the data of the image into memory."""
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        position, size = 0, os.fstat(file.fileno()).st_size
        while position < size:
            try:
                position = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(file.fileno(), position, os.SEEK_HOLE)
            while position < end:
                position += max(1, os.preadv(file.fileno(), [buffer], position))
