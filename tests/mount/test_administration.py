"""FITRIM and EXT4_IOC_SHUTDOWN: kernel ext4 is asked first, and is the judge."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest

from fusewire import ioctl
from tests.images import MIB, mke2fs
from tests.model.run import fsck
from tests.model.side import Side, user
from tests.mount.writable_mount import DRIVERS, MOUNTS, STALE, error_of, writable
from tests.mounting import kernel_mount, wait_for, wait_unused

SHUTDOWN = 0x8004587D
DEFAULT, FLUSH_LOG, AT_ONCE = 0, 1, 2


def trim(root: Path, start: int = 0, length: int = (1 << 64) - 1, shortest: int = 0) -> int:
    fd = os.open(root, os.O_RDONLY)
    try:
        return ioctl.trim(fd, start, length, shortest)
    finally:
        os.close(fd)


def shut_down(root: Path, mode: int) -> None:
    fd = os.open(root, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, SHUTDOWN, struct.pack("<I", mode))
    finally:
        os.close(fd)


@pytest.mark.parametrize("driver", DRIVERS)
def test_trim(driver: str, mounts: None, tmp_path: Path) -> None:
    """Free blocks are given back to the image, and nothing else: what files hold is still there."""
    path = tmp_path / "trim.img"
    with writable(driver, path, "-t ext4 -b 4096 -g 8192", size=96 * MIB) as made:
        for index in range(20):
            (made.root / f"f{index}").write_bytes(bytes([index + 1]) * 300_000)
        Side(made.root).syncfs()
        wanted = os.statvfs(made.root).f_bfree + 10 * -(-300_000 // 4096)
        for index in range(0, 20, 2):
            os.unlink(made.root / f"f{index}")
        wait_for(lambda: os.statvfs(made.root).f_bfree >= wanted)   # the kernel's FORGETs may come after other requests
        Side(made.root).syncfs()
        before = os.stat(path).st_blocks
        free = os.statvfs(made.root).f_bfree * 4096
        done = trim(made.root)
        assert free - MIB <= done <= free
        assert before - os.stat(path).st_blocks >= (done - MIB) // 512
        fd = os.open(made.root, os.O_RDONLY)
        try:
            assert error_of(ioctl.trim, fd, 0, 100) == "EINVAL"
            assert error_of(ioctl.trim, fd, 1 << 40) == "EINVAL"
            assert error_of(ioctl.trim, fd, 0, 1 << 30, 1 << 30) == "EINVAL"
            with user(1000):
                assert error_of(ioctl.trim, fd) == "EPERM"
        finally:
            os.close(fd)
        for index in range(1, 20, 2):
            assert (made.root / f"f{index}").read_bytes() == bytes([index + 1]) * 300_000


def test_trim_of_a_range(mounts: None, tmp_path: Path) -> None:
    """Only what lies in it, and no shorter runs; ext4 itself remembers which groups it has trimmed."""
    path = tmp_path / "trim.img"
    with writable("fusewire", path, "-t ext4 -b 1024", size=32 * MIB) as made:
        assert trim(made.root, 20 * MIB, 2 * MIB) in range(2 * MIB - 16384, 2 * MIB + 1)     # a few blocks are in use
        with open(path, "rb") as file:
            assert os.pread(file.fileno(), 6, 20 * MIB) == bytes(6)
            assert STALE[:6] in os.pread(file.fileno(), 100, 23 * MIB)
        assert trim(made.root, 0, 32 * MIB, 8 * MIB - 1024) in range(16 * MIB)


@pytest.mark.parametrize("mode", [DEFAULT, FLUSH_LOG, AT_ONCE])
@pytest.mark.parametrize("driver", DRIVERS)
def test_shutdown(driver: str, mode: int, mounts: None, tmp_path: Path) -> None:
    path = tmp_path / "shut.img"
    mke2fs(path, "-t ext4 -b 4096", 32 * MIB)
    with MOUNTS[driver](path, "rw") as made:
        fd = os.open(made.root / "safe", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"synced")
        os.fsync(fd)
        os.mkdir(made.root / "recent")
        with user(1000):
            assert error_of(shut_down, made.root, mode) == "EPERM"
        assert error_of(shut_down, made.root, 7) == "EINVAL"
        shut_down(made.root, mode)
        assert error_of(os.mkdir, made.root / "later") == "EIO"
        assert error_of(os.open, made.root / "new", os.O_CREAT | os.O_WRONLY) == "EIO"
        assert error_of(os.fsync, fd) == "EIO"
        with contextlib.suppress(OSError):      # FUSE writes its times back at close(2), and that is refused, too
            os.close(fd)
    wait_unused(path)
    with kernel_mount(path, "rw") as again:
        assert (again.root / "safe").read_bytes() == b"synced"
        assert not (again.root / "later").exists()
        if mode != AT_ONCE:
            assert (again.root / "recent").is_dir()
    assert not fsck(path)


def test_shutdown_from_another_program(mounts: None, tmp_path: Path) -> None:
    """The argument is in the memory of whoever asks, not of this process."""
    path = tmp_path / "shut.img"
    mke2fs(path, "-t ext4 -b 4096", 32 * MIB)
    script = "import fcntl,os,sys,struct; fcntl.ioctl(os.open(sys.argv[1],0),0x8004587D,struct.pack('<I',1))"
    with MOUNTS["fusewire"](path, "rw") as made:
        (made.root / "file").write_bytes(b"kept")
        subprocess.run(["python3", "-c", script, made.root], check=True)
        assert error_of(os.mkdir, made.root / "later") == "EIO"
    with kernel_mount(path, "rw") as again:
        assert (again.root / "file").read_bytes() == b"kept"
    assert not fsck(path)
