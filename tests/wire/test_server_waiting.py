"""Requests that wait for a slow or failing device: each answered once, sharing what they wait for, never too many."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire import server, uapi
from fusewire.blockdev import BlockDevice
from tests.wire.kernel_peer import FILES, Peer, make_image, served

PATIENCE_SECONDS = 60


class SlowDevice(BlockDevice):
    """Nothing is resident; reads wait until ``gate`` is open, and fail where ``broken`` says so."""

    def __init__(self, fd: int, start_bytes: int = 0, size_bytes: int = 0) -> None:
        super().__init__(fd, start_bytes, size_bytes)
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        self.reads: list[tuple[int, int]] = []
        self.broken: set[int] = set()

    def read_into_now(self, view: memoryview, offset: int) -> int:
        return 0

    def will_need(self, offset: int, length: int) -> None:
        """A hint; nothing here depends on it."""

    def read_into(self, view: memoryview, offset: int) -> None:
        self.reads.append((offset, len(view)))
        self.arrived.release()
        assert self.gate.wait(PATIENCE_SECONDS)
        if any(offset <= place < offset + len(view) for place in self.broken):
            raise OSError(errno.EIO, "broken on purpose")
        super().read_into(view, offset)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("slow"))


@pytest.fixture
def peer(image: Path) -> Iterator[Peer]:
    with served(image, SlowDevice) as peer:
        peer.init()
        yield peer
        slow(peer).gate.set()


def slow(peer: Peer) -> SlowDevice:
    assert isinstance(peer.device, SlowDevice)
    return peer.device


def test_everything_works_when_nothing_is_resident(peer: Peer) -> None:
    assert peer.read(peer.lookup(b"big"), 1000, 5000).body == FILES[b"big"][1000:6000]
    assert peer.lookup(b"name123", peer.lookup(b"d"))
    assert peer.call(uapi.FUSE_READLINK, peer.lookup(b"link")).body == b"a"


def test_those_who_need_the_same_blocks_wait_for_one_read(peer: Peer) -> None:
    device = slow(peer)
    node = peer.lookup(b"d")
    device.gate.clear()
    device.reads.clear()
    before = device.arrived._value
    asked = [peer.send(uapi.FUSE_LOOKUP, node, b"name%03d\0" % number) for number in range(50)]
    for _ in range(before + 1):
        assert device.arrived.acquire(timeout=PATIENCE_SECONDS)
    # One request that needs nothing from the device shows that all before it have been taken up.
    assert peer.call(uapi.FUSE_INTERRUPT, 0, uapi.interrupt_in.encode(unique=asked[0])).errno == errno.ENOSYS
    device.gate.set()
    entries = [uapi.entry_out.decode(peer.receive(unique).body) for unique in asked]
    assert len({entry["nodeid"] for entry in entries}) == 50
    assert len(device.reads) == len(set(device.reads)), "a block was read twice"


def test_others_are_answered_while_one_waits(peer: Peer) -> None:
    device = slow(peer)
    node = peer.lookup(b"big")
    device.gate.clear()
    waiting = peer.send(uapi.FUSE_READ, node, uapi.read_in.encode(offset=0, size=65536))
    assert peer.is_alive()
    assert peer.lookup(b"big") == node
    assert peer.nothing_came()
    device.gate.set()
    assert peer.receive(waiting).body == FILES[b"big"][:65536]


def test_a_broken_block_costs_the_operation_that_needs_it(peer: Peer) -> None:
    device = slow(peer)
    node = peer.lookup(b"big")
    (address,) = uapi.bmap_out.unpack(peer.call(uapi.FUSE_BMAP, node, uapi.bmap_in.encode(block=2, blocksize=512)).body)
    device.broken = {address * 512}
    assert peer.read(node, 0, 4096).errno == errno.EIO
    assert peer.read(node, 65536, 4096).body == FILES[b"big"][65536 : 65536 + 4096]
    device.broken = set()
    assert peer.read(node, 0, 4096).body == FILES[b"big"][:4096]


def test_a_broken_metadata_block_spares_its_neighbours(peer: Peer) -> None:
    """The inode table is read in runs of many blocks; one that fails must not take the others with it."""
    device = slow(peer)
    fs = peer.session.fs
    node = peer.lookup(b"d")
    reply = peer.call(uapi.FUSE_READDIR, node, uapi.read_in.encode(size=65536))
    assert reply.error == 0
    number = node + 200
    group, index = fs.geometry.group_of_inode(number)
    block, _ = fs.geometry.inode_place(index)
    place = fs.geometry.byte_of(fs.tables[group] + block)
    fs.cache._young.clear()
    fs.cache._old.clear()
    device.broken = {place}
    getattr_in = uapi.getattr_in.encode()
    assert peer.call(uapi.FUSE_GETATTR, number, getattr_in).errno == errno.EIO
    far = number - fs.geometry.block_bytes // fs.geometry.inode_bytes
    assert peer.call(uapi.FUSE_GETATTR, far, getattr_in).error == 0
    device.broken = set()
    assert peer.call(uapi.FUSE_GETATTR, number, getattr_in).error == 0


def test_a_device_that_ends_early_gives_eio(image: Path) -> None:
    with served(image) as peer:
        peer.init()
        node = peer.lookup(b"big")
        peer.device.start_bytes = os.path.getsize(image)
        assert peer.read(node, 0, 4096).errno == errno.EIO
        peer.device.start_bytes = 0
        assert peer.read(node, 0, 4096).error == 0


def test_the_number_of_waiting_requests_is_bounded(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "WAITING_MOST", 5)
    device = slow(peer)
    node = peer.lookup(b"big")
    device.gate.clear()
    asked = [peer.send(uapi.FUSE_READ, node, uapi.read_in.encode(offset=number, size=1)) for number in range(20)]
    getting = peer.send(uapi.FUSE_GETATTR, 1, uapi.getattr_in.encode())
    for _ in range(5):
        assert device.arrived.acquire(timeout=PATIENCE_SECONDS)
    assert len(peer.server._waiting) <= 5
    assert peer.nothing_came(), "a request was read although too many wait"
    device.gate.set()
    assert peer.receive(getting).error == 0
    assert [peer.receive(unique).body for unique in asked] == [FILES[b"big"][n : n + 1] for n in range(20)]


def test_an_operation_that_never_gets_on_is_given_up(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ATTEMPTS_MOST", 3)
    fs = peer.session.fs
    monkeypatch.setattr(fs.cache, "admit", lambda _blocks: None)
    fs.cache._young.clear()
    fs.cache._old.clear()
    assert peer.call(uapi.FUSE_GETATTR, 1, uapi.getattr_in.encode()).errno == errno.EIO


def test_the_connection_may_end_while_requests_wait(image: Path) -> None:
    with served(image, SlowDevice) as peer:
        peer.init()
        node = peer.lookup(b"big")
        device = slow(peer)
        device.gate.clear()
        for number in range(10):
            peer.send(uapi.FUSE_READ, node, uapi.read_in.encode(offset=number, size=4096))
        assert device.arrived.acquire(timeout=PATIENCE_SECONDS)
        threading.Timer(0.2, device.gate.set).start()
