"""The backing device changes while it is served: it grows, shrinks, turns read-only, vanishes."""

from __future__ import annotations

import fcntl
import os
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusewire import ioctl, uevents
from fusewire.blockdev import BlockDevice
from tests.mounting import loop_device

pytestmark = pytest.mark.usefixtures("mounts")

PATIENCE_SECONDS = 60
MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, 8 * MIB)
    return path


@pytest.fixture
def device(image: Path) -> Iterator[BlockDevice]:
    with loop_device(image) as path:
        device = BlockDevice(os.open(path, os.O_RDONLY))
        yield device
        device.close()


def resize(device: BlockDevice, image: Path, size: int) -> None:
    os.truncate(image, size)
    ioctl.loop_set_capacity(device.fd)


def test_changes_are_reported_as_they_happen(device: BlockDevice, image: Path) -> None:
    heard: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    # A change before the thread listens is found at its first look; so there is no moment to wait for.
    watching = uevents.DeviceWatch(device)
    resize(device, image, 16 * MIB)
    assert watching.changes({}) == [("device_grew", {"before_bytes": 8 * MIB, "now_bytes": 16 * MIB})]
    uevents.watch(device, lambda event, fields: heard.put((event, fields)))
    resize(device, image, 12 * MIB)
    assert heard.get(timeout=PATIENCE_SECONDS)[0] == "device_shrank"
    resize(device, image, 20 * MIB)
    event, fields = heard.get(timeout=PATIENCE_SECONDS)
    assert event == "device_grew" and fields == {"before_bytes": 12 * MIB, "now_bytes": 20 * MIB}


def test_a_message_is_only_a_reason_to_look(device: BlockDevice) -> None:
    watching = uevents.DeviceWatch(device)
    assert watching.changes({"ACTION": "change"}) == []
    fcntl.ioctl(device.fd, ioctl.BLKROSET, b"\1\0\0\0")
    assert watching.changes({"ACTION": "change"}) == [("device_turned_read_only", {})]
    fcntl.ioctl(device.fd, ioctl.BLKROSET, b"\0\0\0\0")
    assert watching.changes({"ACTION": "change"}) == [("device_turned_writable", {})]


def test_a_device_that_went_is_reported_once(device: BlockDevice) -> None:
    watching = uevents.DeviceWatch(device)
    assert watching.changes({"ACTION": "remove"}) == [("device_vanished", {})]
    assert watching.changes({"ACTION": "remove"}) == []


def test_a_detached_loop_device_has_vanished(image: Path) -> None:
    with loop_device(image) as path:
        device = BlockDevice(os.open(path, os.O_RDONLY))
        watching = uevents.DeviceWatch(device)
        device.close()
    device.fd = os.open(path, os.O_RDONLY)
    try:
        assert watching.changes({"ACTION": "change"}) == [("device_vanished", {})]
    finally:
        device.close()


def test_messages_about_others_are_ignored(device: BlockDevice) -> None:
    watching = uevents.DeviceWatch(device)
    number = os.fstat(device.fd).st_rdev
    own = {"SUBSYSTEM": "block", "MAJOR": str(os.major(number)), "MINOR": str(os.minor(number))}
    assert watching.concerns(own)
    assert not watching.concerns(own | {"SUBSYSTEM": "net"})
    assert not watching.concerns(own | {"MINOR": str(os.minor(number) + 1)})
    assert not watching.concerns({})
