"""A full disk is told of when no room can come any more, and then it is told of."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from fusewire import server, uapi
from fusewire.blockdev import BlockDevice, Buffer
from tests.ext4.driver import run_tool
from tests.images import MIB
from tests.mount.writable_mount import stale_image
from tests.wire.kernel_peer import PATIENCE_SECONDS, Peer, served

FORMS = ["-t ext4 -b 1024", "-t ext4 -b 4096", "-t ext3 -b 1024", "-t ext2 -b 4096"]
HELD = b"held"


class Device(BlockDevice):
    """A write of ``HELD`` waits for ``gate``."""

    gate = threading.Event()

    def write(self, offset: int, pieces: Sequence[Buffer]) -> None:
        if any(bytes(piece) == HELD for piece in pieces):
            assert self.gate.wait(PATIENCE_SECONDS)
        super().write(offset, pieces)


@pytest.fixture
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "image"
    stale_image(path, request.param, 16 * MIB)
    return path


def fill(peer: Peer, node: int) -> None:
    """Append until nothing more is taken."""
    offset = 0
    for size in (64 << 10, 1 << 10):
        while (refused := peer.write(node, offset, bytes(size))) == 0:
            offset += size
        assert refused == errno.ENOSPC


@pytest.mark.parametrize("image", FORMS, indirect=True)
def test_a_request_that_overtakes_a_forget_finds_the_room(image: Path) -> None:
    """The kernel has sent FORGET of a deleted file before, but may hand over up to eight requests first."""
    with served(image, Device, access="rw") as peer:
        peer.init()
        big, other, mode = peer.create(b"big"), peer.create(b"other"), uapi.mkdir_in.encode(mode=0o755)
        assert peer.write(other, 0, b"some") == 0
        fill(peer, big)
        made = 0
        while peer.call(uapi.FUSE_MKDIR, 1, mode + b"%d\0" % made).errno != errno.ENOSPC:
            made += 1
        assert peer.call(uapi.FUSE_FSYNC, other, uapi.fsync_in.encode()).error == 0
        assert peer.call(uapi.FUSE_UNLINK, 1, b"big\0").error == 0
        Device.gate.clear()     # the loop stands still in this write
        held = peer.send(uapi.FUSE_WRITE, other, uapi.write_in.encode(offset=0, size=len(HELD)) + HELD)
        asked = [peer.send(uapi.FUSE_MKDIR, 1, mode + b"new-%d\0" % number) for number in range(3)]
        peer.send(uapi.FUSE_FORGET, big, uapi.forget_in.encode(nlookup=1))
        Device.gate.set()
        assert peer.receive(held).error == 0
        assert [peer.receive(number).error for number in asked] == [0, 0, 0]
        assert peer.write(other, 0, bytes(512 << 10)) == 0
    run_tool("e2fsck", "-fn", image)


@pytest.mark.parametrize("image", ["-t ext4 -b 4096"], indirect=True)
def test_who_finds_no_room_is_told_though_nothing_else_arrives(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deleted file is still open, and what was refused is the last request that one wake-up reads."""
    monkeypatch.setattr(server, "DRAIN_MOST", 1)
    with served(image, access="rw") as peer:
        peer.init()
        kept, big = peer.create(b"kept"), peer.create(b"big")
        assert peer.call(uapi.FUSE_UNLINK, 1, b"kept\0").error == 0
        fill(peer, big)
        peer.send(uapi.FUSE_FORGET, kept, uapi.forget_in.encode(nlookup=1))
    run_tool("e2fsck", "-fn", image)
