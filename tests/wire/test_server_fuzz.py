"""A hostile kernel: mutated and random requests.  Each is answered exactly once, or never if its kind has no reply.

Seeds are printed; FUSEWIRE_SEED replays one of them, FUSEWIRE_ROUNDS sets how many messages a test sends.
"""

from __future__ import annotations

import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusewire import log, ops, uapi, wire
from tests.wire.kernel_peer import Peer, Reply, make_image, served

ROUNDS = int(os.environ.get("FUSEWIRE_ROUNDS", "3000"))
HEADER = uapi.in_header.size
UNIQUE_AT = uapi.in_header.offsets["unique"]
OPCODES = [row.opcode for row in ops.ROWS if row.opcode != uapi.FUSE_DESTROY]  # after DESTROY a server may stop
INTERESTING = (0, 1, 2, 11, 12, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def no_bugs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a request says, none of our own mistakes may come to light."""
    bugs: list[BaseException] = []
    monkeypatch.setattr(log, "bug", lambda _event, error, **_fields: bugs.append(error))
    yield
    assert not bugs


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("FUSEWIRE_SEED", random.SystemRandom().getrandbits(32)))
    print(f"FUSEWIRE_SEED={chosen}")
    return chosen


def sound(rng: random.Random, opcode: int) -> bytes:
    """What may follow the header of an opcode: a record of likely values, names, data."""
    shape = wire.SHAPES[opcode]
    tail = b""
    if shape.codec is not None:
        tail = bytearray(shape.codec.size)
        for at in range(0, shape.codec.size - 3, 4):
            if rng.random() < 0.5:
                struct.pack_into("=I", tail, at, rng.choice((0, 1, 4096, 65536, rng.getrandbits(12))))
        tail = bytes(tail)
    for _ in range(shape.names):
        tail += rng.choice((b"a", b"d", b"big", b"link", b"..", b".", b"x" * 300, b"", b"/", b"user.x")) + b"\0"
    return tail + (rng.randbytes(rng.randrange(64)) if shape.payload else b"")


def limited(opcode: int, tail: bytes) -> bytes:
    """READ and its kin must not ask for more than a message of the socket can carry."""
    if opcode in (uapi.FUSE_READ, uapi.FUSE_READDIR, uapi.FUSE_READDIRPLUS):
        at = uapi.read_in.offsets["size"]
        if len(tail) >= at + 4:
            (size,) = struct.unpack_from("=I", tail, at)
            return tail[:at] + struct.pack("=I", size % 65537) + tail[at + 4 :]
    return tail


def mutate(rng: random.Random, message: bytes) -> bytes:
    """The message with bits flipped, numbers replaced, cut or lengthened; its unique id stays."""
    raw = bytearray(message)
    for _ in range(rng.randrange(4)):
        kind = rng.randrange(5)
        at = rng.randrange(len(raw)) if raw else 0
        if UNIQUE_AT <= at < UNIQUE_AT + 8:
            continue
        if kind == 0 and raw:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            width = rng.choice((4, 8))
            value = rng.choice(INTERESTING) & ((1 << 8 * width) - 1)
            at -= at % width
            if at + width <= len(raw) and not (at < UNIQUE_AT + 8 and at + width > UNIQUE_AT):
                raw[at : at + width] = value.to_bytes(width, "little")
        elif kind == 2:
            del raw[max(at, HEADER) :]
        elif kind == 3:
            raw += rng.randbytes(rng.randrange(40))
        elif kind == 4 and len(raw) >= 4:
            raw[:4] = len(raw).to_bytes(4, "little")
    if len(raw) >= HEADER:
        opcode = int.from_bytes(raw[4:8], "little")
        raw = raw[:HEADER] + limited(opcode, bytes(raw[HEADER:]))
    return bytes(raw)


def answers(message: bytes) -> bool:
    """Whether a reply must come: not if the kind of message has none, or its header is not whole."""
    if len(message) < HEADER:
        return False
    row = {row.opcode: row for row in ops.ROWS}.get(int.from_bytes(message[4:8], "little"), ops.UNKNOWN)
    return row.replies


def run(peer: Peer, make: Callable[[int], bytes], rounds: int) -> None:
    """Send messages; afterwards each must have had its reply, and none more than one."""
    peer.init()
    expected: Counter[int] = Counter()
    seen: Counter[int] = Counter()

    def take(reply: Reply) -> None:
        seen[reply.unique] += 1
        assert expected[reply.unique] >= seen[reply.unique], f"nobody waits for {reply.raw[:40].hex()}"

    for _ in range(rounds):
        unique = peer.unique()
        message = make(unique)
        if not message or (int.from_bytes(message[4:8], "little") == uapi.FUSE_DESTROY and len(message) >= HEADER):
            continue
        expected[unique] += answers(message)
        barrier = peer.unique()
        expected[barrier] += 1
        peer.connection.send(message)
        peer.connection.send(peer.message(uapi.FUSE_GETATTR, 1, uapi.getattr_in.encode(), unique=barrier))
        while not seen[barrier]:
            take(peer.receive())
    while seen != +expected:
        take(peer.receive())
    assert peer.is_alive() and peer.nothing_came()


def test_mutated_requests(image: Path, seed: int) -> None:
    rng = random.Random(seed)

    def make(unique: int) -> bytes:
        opcode = rng.choice(OPCODES)
        node = rng.choice((1, 1, 12, 13, 14, 300, rng.choice(INTERESTING)))
        head = uapi.in_header.encode(len=0, opcode=opcode, unique=unique, nodeid=node, uid=0, gid=0, pid=1)
        message = bytearray(head + limited(opcode, sound(rng, opcode)))
        message[:4] = len(message).to_bytes(4, "little")
        return mutate(rng, bytes(message))

    with served(image) as peer:
        run(peer, make, ROUNDS)


def test_random_bytes(image: Path, seed: int) -> None:
    rng = random.Random(seed)

    def make(unique: int) -> bytes:
        raw = bytearray(rng.randbytes(rng.randrange(200)))
        raw[UNIQUE_AT : UNIQUE_AT + 8] = struct.pack("=Q", unique)
        raw[4:8] = struct.pack("=I", rng.choice((rng.getrandbits(32), rng.randrange(60))))
        if rng.random() < 0.8:
            raw[:4] = len(raw).to_bytes(4, "little")
        if len(raw) >= HEADER:
            raw = raw[:HEADER] + limited(int.from_bytes(raw[4:8], "little"), bytes(raw[HEADER:]))
        return bytes(raw)

    with served(image) as peer:
        run(peer, make, ROUNDS)


def test_every_truncation_of_every_request(image: Path) -> None:
    rng = random.Random(1)
    messages: list[bytes] = []
    for opcode in OPCODES:
        tail = limited(opcode, sound(rng, opcode))
        for length in range(len(tail) + 1):
            for honest in (True, False):
                size = HEADER + (length if honest else len(tail))
                messages.append(struct.pack("=II", size, opcode) + bytes(HEADER - 8) + tail[:length])
    left = iter(messages)

    def make(unique: int) -> bytes:
        message = bytearray(next(left))
        struct.pack_into("=QQ", message, UNIQUE_AT, unique, 1)
        return bytes(message)

    with served(image) as peer:
        run(peer, make, len(messages))
