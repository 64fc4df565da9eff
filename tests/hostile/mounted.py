"""What holds of a mount whatever the image holds: refused in one line, or walked to its end by a daemon that lives."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.mounting import Mount, MountRefused, fusewire_mount
from tests.walk import Fields, Limits, entries, statfs_fields

SECONDS = 10
RESIDENT_BYTES = 200 << 20
MOUNT_EXIT_CODES = {1, 2, 4, 8, 16, 32}  # mount(8), "EXIT STATUS"
DAMAGE = {errno.EUCLEAN, errno.EBADMSG, errno.EIO}
BOUNDED = Limits(entries=3000, names=1 << 16, depth=40, file_bytes=8 << 20, runs=2000)


@dataclass
class Outcome:
    """How it went: the refusal, or the entries of the walk."""

    refusal: str = ""
    tree: list[tuple[str, Fields]] = field(default_factory=list)


@contextmanager
def watchdog(pid: int) -> Iterator[threading.Event]:
    """Kill the daemon when its time is over, which frees everybody who waits for it; the event says so."""
    expired = threading.Event()

    def kill() -> None:
        expired.set()
        os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(SECONDS, kill)
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


def high_water_bytes(pid: int) -> int:
    """The most memory that the process has had resident."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def assert_refusal(refused: MountRefused) -> str:
    """The one line that the mount was refused with."""
    lines = refused.output.strip().splitlines()
    assert refused.code in MOUNT_EXIT_CODES, (refused.code, refused.output)
    assert "Traceback" not in refused.output, refused.output
    assert len(lines) == 1 and lines[0].startswith("fusewire: "), refused.output
    return lines[0]


def assert_alive(mounted: Mount) -> None:
    """The daemon answers, is small, and has said nothing about bugs of its own."""
    assert mounted.pid is not None
    try:
        os.statvfs(mounted.root)
    except OSError as error:
        assert error.errno in DAMAGE, error
    assert high_water_bytes(mounted.pid) < RESIDENT_BYTES, f"{high_water_bytes(mounted.pid) >> 20} MiB"
    assert "Traceback" not in mounted.log_text(), mounted.log_text()


def survive(image: Path, options: str = "ro,noatime,noload,noloop") -> Outcome:
    """Mount ``image`` and walk it within limits of time, size and memory."""
    try:
        with fusewire_mount(image, options, unmount=("umount",)) as mounted:
            assert mounted.pid is not None
            with watchdog(mounted.pid) as expired:
                try:
                    tree = [*entries(mounted.root, BOUNDED), ("statfs", statfs_fields(mounted.root))]
                except OSError as error:
                    assert not expired.is_set(), f"not done after {SECONDS} s"
                    tree = [(".", {"walk": str(error)})]
                assert not expired.is_set(), f"not done after {SECONDS} s: {tree[-1:]}"
            assert_alive(mounted)
            return Outcome(tree=tree)
    except MountRefused as refused:
        return Outcome(refusal=assert_refusal(refused))
