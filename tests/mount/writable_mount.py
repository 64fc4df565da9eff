"""A file system mounted for writing, by kernel ext4 and by fusewire, on a device that is full of old bytes.

Where the mount ends, e2fsck must be content.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.images import MIB, mke2fs
from tests.model.run import fsck
from tests.mounting import Mount, fusewire_mount, kernel_mount

STALE = b"\xa5STALE\xa5\n"      # what the device is full of before it is formatted
DRIVERS = ("kernel", "fusewire")
MOUNTS = {"kernel": kernel_mount, "fusewire": fusewire_mount}


class Writable(NamedTuple):
    """One driver's mount."""

    driver: str
    root: Path
    mount: Mount


def stale_image(path: Path, arguments: str, size: int) -> None:
    """A file system whose free blocks hold ``STALE`` over and over."""
    mke2fs(path, f"-E nodiscard,lazy_itable_init=0 {arguments}", size)
    blank = bytes(MIB)
    with open(path, "r+b") as file:
        for offset in range(0, size, 4096):     # what mke2fs left as holes: no block that it wrote is one
            file.seek(offset)
            if file.read(4096) == blank[:4096] and os.lseek(file.fileno(), offset, os.SEEK_HOLE) == offset:
                file.seek(offset)
                file.write(STALE * (4096 // len(STALE)))


@contextmanager
def writable(driver: str, path: Path, arguments: str = "-t ext4 -b 4096", size: int = 96 * MIB,
             options: str = "rw,noatime") -> Iterator[Writable]:
    """A new file system, mounted; judged by e2fsck afterwards."""
    stale_image(path, arguments, size)
    with MOUNTS[driver](path, options) as mount:
        yield Writable(driver, mount.root, mount)
        assert "Traceback" not in mount.log_text(), mount.log_text()
    text = fsck(path, kernels=driver == "kernel")
    assert not text, text


@pytest.fixture(scope="module", params=DRIVERS)
def mounted(request: pytest.FixtureRequest, mounts: None, tmp_path_factory: pytest.TempPathFactory
            ) -> Iterator[Writable]:
    """One mount for all tests of a module."""
    mask = os.umask(0o022)
    path = tmp_path_factory.mktemp("writable") / f"{request.param}.img"
    try:
        with writable(request.param, path) as made:
            yield made
    finally:
        os.umask(mask)
        path.unlink(missing_ok=True)


@pytest.fixture
def here(mounted: Writable, request: pytest.FixtureRequest) -> Path:
    """An empty directory for one test."""
    path = mounted.root / request.node.name.replace("/", "_")[:100]
    path.mkdir(0o777)
    os.chmod(path, 0o777)
    return path


def error_of(action: Callable[..., object], *arguments: object, **named: object) -> str:
    """The name of the errno that a call fails with, or "ok"."""
    try:
        action(*arguments, **named)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"
