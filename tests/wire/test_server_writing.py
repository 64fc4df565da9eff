"""Data and mappings change together: a device that fails, a crash, or another request in between shows nothing else."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path

import pytest

from fusewire import uapi
from fusewire.blockdev import BlockDevice, Buffer
from fusewire.ext4 import iomapwrite
from fusewire.ext4.filesystem import Options
from fusewire.ext4.inode import Inode
from fusewire.ext4.transaction import CommitFirst, Transaction
from fusewire.options import MountOptions
from fusewire.source import open_file_system, open_source
from tests.ext4.driver import Core, run_tool
from tests.images import MIB
from tests.mount.writable_mount import STALE, stale_image
from tests.wire.kernel_peer import PATIENCE_SECONDS, Peer, served

FORMS = ["-t ext4 -b 1024", "-t ext4 -b 4096", "-t ext3 -b 1024", "-t ext2 -b 4096"]
JOURNALED = FORMS[:3]
MARK = STALE[:6]
OLD = b"old." * 2000
HELD = b"held"
KEEP_SIZE, ZERO_RANGE = 0x1, 0x10


class Device(BlockDevice):
    """Fails to write what holds ``broken``; ``flush``, and a write of ``HELD``, waits for ``gate``."""

    def __init__(self, fd: int, start_bytes: int = 0, size_bytes: int = 0) -> None:
        super().__init__(fd, start_bytes, size_bytes)
        self.broken: bytes | None = None
        self.gate = threading.Event()
        self.gate.set()

    def write(self, offset: int, pieces: list[Buffer]) -> None:
        if self.broken is not None and any(self.broken in bytes(piece) for piece in pieces):
            raise OSError(errno.EIO, "broken on purpose")
        if any(bytes(piece) == HELD for piece in pieces):
            assert self.gate.wait(PATIENCE_SECONDS)
        super().write(offset, pieces)

    def flush(self) -> None:
        assert self.gate.wait(PATIENCE_SECONDS)
        super().flush()


def device_of(peer: Peer) -> Device:
    assert isinstance(peer.device, Device)
    return peer.device


@pytest.fixture
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file system on a device that is full of old bytes."""
    path = tmp_path / "image"
    stale_image(path, request.param, 16 * MIB)
    return path


def resize(peer: Peer, node: int, size: int) -> None:
    assert peer.call(uapi.FUSE_SETATTR, node, uapi.setattr_in.encode(valid=uapi.FATTR_SIZE, size=size)).error == 0


def allocate(peer: Peer, node: int, offset: int, length: int, mode: int = 0) -> None:
    body = uapi.fallocate_in.encode(offset=offset, length=length, mode=mode)
    assert peer.call(uapi.FUSE_FALLOCATE, node, body).error == 0


def sync(peer: Peer, node: int) -> None:
    assert peer.call(uapi.FUSE_FSYNC, node, uapi.fsync_in.encode()).error == 0


def content(peer: Peer, node: int) -> bytes:
    found = b""
    while piece := peer.read(node, len(found), 128 << 10).body:
        found += piece
    assert MARK not in found
    return found


def after_crash(image: Path, name: str = "/file") -> bytes:
    """What the next mount finds of a file if the daemon is killed at this moment."""
    copy = Path(shutil.copy(image, image.with_name("crashed")))
    options = MountOptions(access="rw")
    source = open_source(str(copy), options)
    try:
        open_file_system(source, options)
    finally:
        source.close()
    with Core(copy, Options(noload=True)) as core:
        return core.content(core.at(name))


@pytest.mark.parametrize("image", FORMS, indirect=True)
def test_data_that_cannot_be_written_leave_nothing_behind(image: Path) -> None:
    with served(image, Device, access="rw") as peer:
        peer.init()
        node, free = peer.create(), free_blocks(peer)
        device_of(peer).broken = b"lost"
        assert peer.write(node, 20_000, b"lost" * 3000) == errno.EIO
        assert content(peer, node) == b"" and free_blocks(peer) == free
        device_of(peer).broken = None
        assert peer.write(node, 0, OLD) == 0 and peer.write(node, 50_000, b"end") == 0
        device_of(peer).broken = b"lost"
        assert peer.write(node, 20_000, b"lost" * 3000) == errno.EIO
        assert content(peer, node) == OLD.ljust(50_000, b"\0") + b"end"
        device_of(peer).broken = None
        sync(peer, node)
    run_tool("e2fsck", "-fn", image)


def free_blocks(peer: Peer) -> int:
    writing = peer.session.fs.writing
    assert writing is not None
    return writing.free_clusters


@pytest.mark.parametrize("size", [1500, 5000])
@pytest.mark.parametrize("image", JOURNALED, indirect=True)
def test_what_was_cut_off_is_there_until_the_cut_is_durable(image: Path, size: int) -> None:
    with served(image, Device, access="rw") as peer:
        peer.init()
        node = peer.create()
        assert peer.write(node, 0, OLD) == 0
        sync(peer, node)
        resize(peer, node, size)
        assert content(peer, node) == OLD[:size]
        assert after_crash(image) == OLD
        resize(peer, node, 9000)
        assert after_crash(image) in (OLD, OLD[:size], OLD[:size].ljust(9000, b"\0"))
        assert content(peer, node) == OLD[:size].ljust(9000, b"\0")
        sync(peer, node)
        assert after_crash(image) == OLD[:size].ljust(9000, b"\0")
    run_tool("e2fsck", "-fn", image)


@pytest.mark.parametrize("image", FORMS, indirect=True)
def test_what_was_cut_off_is_zero_in_the_end(image: Path) -> None:
    with served(image, Device, access="rw") as peer:
        peer.init()
        nodes = [peer.create(b"%d" % number) for number in range(3)]
        for node in nodes:
            assert peer.write(node, 0, OLD) == 0
            resize(peer, node, 1500)
        sync(peer, nodes[0])
        resize(peer, nodes[1], 1200)
        assert peer.write(nodes[2], 1500, b"new") == 0
    run_tool("e2fsck", "-fn", image)
    with Core(image) as core:
        for name, size in (("/0", 1500), ("/1", 1200), ("/2", 1503)):
            found = core.at(name)
            (mapping,) = core.mappings(found)
            block = core.block_bytes
            last = core.pread(mapping.addr + size - size % block, block)
            assert last[size % block:] == bytes(block - size % block), name


@pytest.mark.parametrize("way", ["write", "truncate", "fallocate", "zero", "copy"])
@pytest.mark.parametrize("image", FORMS, indirect=True)
def test_a_file_grows_over_zeroes(image: Path, way: str) -> None:
    """Whatever stands behind the end, left by others or written through memory, is not shown."""
    with served(image, Device, access="rw") as peer:
        peer.init()
        node, other = peer.create(), peer.create(b"other")
        assert peer.write(node, 0, OLD[:1500]) == 0 and peer.write(other, 0, b"x") == 0
        sync(peer, node)
        spoil(peer, node, 1500)
        if way in ("fallocate", "zero") and not peer.session.fs.inode(node).has_extents:
            return
        if way == "write":
            assert peer.write(node, 8000, b"x") == 0
        elif way == "truncate":
            resize(peer, node, 8001)
        elif way == "copy":
            body = uapi.copy_file_range_in.encode(nodeid_out=node, off_out=8000, len=1)
            assert peer.call(uapi.FUSE_COPY_FILE_RANGE, other, body).error == 0
        else:
            start = 0 if way == "fallocate" else 7000
            allocate(peer, node, start, 8001 - start, ZERO_RANGE if way == "zero" else 0)
        assert content(peer, node)[:8000] == OLD[:1500].ljust(8000, b"\0")


def spoil(peer: Peer, node: int, size: int) -> None:
    """Old bytes behind the end of a file in its last block."""
    (start,) = uapi.bmap_out.unpack(peer.call(uapi.FUSE_BMAP, node, uapi.bmap_in.encode(
        block=size // 512, blocksize=512)).body)
    block, inside = peer.session.fs.geometry.block_bytes, size % 512
    end = -(-size // block) * block - size
    peer.device.write(start * 512 + inside, [(STALE * 1000)[:end]])


@pytest.mark.parametrize("way", ["write", "copy"])
@pytest.mark.parametrize("image", FORMS[:1], indirect=True)
def test_data_whose_transaction_has_to_wait_are_placed_anew(image: Path, way: str,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile the file is cut, and room reserved in it that holds old bytes: these must not become data."""
    refused: list[int] = []
    real = iomapwrite.ioend

    def refuse_once(tx: Transaction, inode: Inode, pos: int, written: int) -> Inode:
        if not refused:
            refused.append(inode.number)
            raise CommitFirst
        return real(tx, inode, pos, written)

    with served(image, Device, access="rw") as peer:
        peer.init()
        source, target, data = peer.create(b"source"), peer.create(), b"copy" * 16384
        assert peer.write(source, 0, data) == 0 and peer.write(target, 0, OLD) == 0
        device_of(peer).gate.clear()
        monkeypatch.setattr(iomapwrite, "ioend", refuse_once)
        if way == "copy":
            body = uapi.copy_file_range_in.encode(nodeid_out=target, off_out=16384, len=len(data))
            asked = peer.send(uapi.FUSE_COPY_FILE_RANGE, source, body)
        else:
            asked = peer.send(uapi.FUSE_WRITE, target, uapi.write_in.encode(offset=16384, size=len(data)) + data)
        assert peer.is_alive()
        assert refused == [peer.session.number_of(target)]
        resize(peer, target, 0)
        allocate(peer, target, 0, 200_000, KEEP_SIZE)
        device_of(peer).gate.set()
        assert peer.receive(asked).error == 0
        assert content(peer, target) == bytes(16384) + data
        allocate(peer, target, 0, 200_000)
        assert content(peer, target) == (bytes(16384) + data).ljust(200_000, b"\0")


@pytest.mark.parametrize("image", FORMS[1:2], indirect=True)
def test_after_syncfs_what_was_freed_is_free(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is told may look for it at once, with FITRIM: what a batch freed is let go of before the reply."""
    with served(image, access="rw") as peer:
        peer.init()
        node, writing, reply = peer.create(), peer.session.fs.writing, peer.server._write
        assert writing is not None
        assert peer.write(node, 0, bytes(1 << 16)) == 0
        assert peer.call(uapi.FUSE_SYNCFS, 1, uapi.syncfs_in.encode()).error == 0
        assert peer.call(uapi.FUSE_UNLINK, 1, b"file\0").error == 0
        peer.send(uapi.FUSE_FORGET, node, uapi.forget_in.encode(nlookup=1))
        assert peer.is_alive() and writing.held.count
        held = []
        monkeypatch.setattr(peer.server, "_write", lambda pieces: (held.append(writing.held.count), reply(pieces)))
        assert peer.call(uapi.FUSE_SYNCFS, 1, uapi.syncfs_in.encode()).error == 0
        assert held == [0]
