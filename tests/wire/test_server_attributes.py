"""Attributes read straight from inode tables: the same bytes as those of decoded inodes, or left to be decoded.

The seed is printed; FUSEWIRE_SEED replays it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire import accel, wire
from fusewire.ext4 import checksum
from fusewire.ext4 import inode as inodes
from fusewire.ext4.errors import Corrupt
from fusewire.ext4.filesystem import Ext4
from fusewire.handlers import nodes
from fusewire.session import Session
from tests.conftest import require
from tests.ext4.driver import Core
from tests.wire.kernel_peer import make_image

ROUNDS = 20_000
FILES_FROM, FILES_TO = 12, 300
IMAGES = {
    "usual": [],
    "1 KiB blocks, no checksums": ["-b", "1024", "-O", "^metadata_csum"],
    "small inodes": ["-I", "128", "-O", "^metadata_csum,^extra_isize"],
    "small inodes with checksums": ["-I", "128", "-O", "^extra_isize"],
    "ext2": ["-O", "^extents,^has_journal,^huge_file,^64bit,^metadata_csum,^large_file"],
    "larger inodes": ["-I", "512", "-O", "large_dir"],
}
# Where a mutation matters: mode, uid, sizes, times, links, blocks, flags, extra_isize and the fields behind it
FIELDS = [*range(0x28), *range(0x64, 0x70), *range(0x74, 0x7C), *range(0x80, 0xA0)]


@pytest.fixture(scope="module", params=IMAGES)
def core(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Core]:
    require([] if accel.AVAILABLE else ["the compiled part of fusewire (make venv)"])
    with Core(make_image(tmp_path_factory.mktemp("attributes"), *IMAGES[request.param])) as core:
        yield core


def raw_of(core: Core, number: int) -> bytes:
    def read(fs: Ext4) -> bytes:
        (place,) = inodes.places(fs, [number])
        assert place is not None
        block, offset = place
        return bytes(fs.cache.read(block)[offset : offset + fs.geometry.inode_bytes])

    return core.run(read)


def decoded(session: Session, raw: bytes, number: int) -> bytes | None:
    """The entry by way of a decoded inode, None if that is refused."""
    fs = session.fs
    try:
        inodes._verify(fs, number, raw)
        return nodes.entry(fs, inodes.check_in_use(fs, inodes.decode(fs, inodes.InodeNumber(number), raw)))
    except Corrupt:
        return None


def straight(session: Session, raw: bytes, number: int) -> bytes | None:
    assert session.attributes is not None
    found = session.attributes.read(b"\xff" * 64 + raw, 64, number)
    return found and wire.pack_entry(number, found[0], wire.FOREVER, 0, wire.FOREVER, 0, found[1])


def test_sound_inodes(core: Core) -> None:
    session, found = Session(core.fs), 0
    for number in range(FILES_FROM, FILES_TO):
        raw = raw_of(core, number)
        entry = straight(session, raw, number)
        assert entry is None or entry == decoded(session, raw, number), number
        found += entry is not None
    assert found > 250, "usual inodes were left to be decoded"


def test_mutated_inodes(core: Core) -> None:
    seed = int(os.environ.get("FUSEWIRE_SEED", random.SystemRandom().getrandbits(32)))
    print(f"FUSEWIRE_SEED={seed}")
    rng, session, agreed = random.Random(seed), Session(core.fs), 0
    raws = {number: raw_of(core, number) for number in range(FILES_FROM, FILES_FROM + 20)}
    for _ in range(ROUNDS):
        number = rng.choice(list(raws))
        raw = bytearray(raws[number])
        for _ in range(rng.randrange(4)):
            at = rng.choice(FIELDS)
            if at < len(raw):
                raw[at] = rng.choice((0, 1, 0xFF, 0x80, raw[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        if core.fs.has_checksums and rng.random() < 0.9:
            checksum.seal_inode(raw, number, core.fs.superblock.seed)
        entry = straight(session, bytes(raw), number)
        if entry is not None:
            assert entry == decoded(session, bytes(raw), number), bytes(raw).hex()
            agreed += 1
    assert agreed > ROUNDS // 10


def test_inline_inodes_are_left_to_be_decoded(tmp_path: Path) -> None:
    """Their data count as blocks in stat(2), which the inode table does not say."""
    require([] if accel.AVAILABLE else ["the compiled part of fusewire (make venv)"])
    with Core(make_image(tmp_path, "-O", "inline_data")) as core:
        session = Session(core.fs)
        numbers = range(FILES_FROM, FILES_TO)
        inline = [number for number in numbers if core.run(lambda fs, n: fs.inode(n).is_inline, number)]
        assert inline
        assert all(straight(session, raw_of(core, number), number) is None for number in inline)


def test_checksums_of_any_inode(core: Core) -> None:
    """The compiled check agrees with the formula, for sound inodes, changed ones and records of any length."""
    rng = random.Random(7)
    seed, verdicts = core.fs.superblock.seed, set[bool]()
    for number in range(FILES_FROM, FILES_FROM + 100):
        raw = bytearray(raw_of(core, number))
        checksum.seal_inode(raw, number, seed)
        for _ in range(20):
            verdict = checksum.inode_ok(raw, number, seed)
            assert accel.inode_ok(raw, number, seed) == verdict
            verdicts.add(verdict)
            raw[rng.randrange(len(raw))] ^= rng.choice((0, 1 << rng.randrange(8)))
    for length in range(300):
        assert accel.inode_ok(bytes(length), 12, seed) == checksum.inode_ok(bytes(length), 12, seed)
    assert verdicts == {True, False}


def test_places_outside_the_block_are_not_read(core: Core) -> None:
    attributes = Session(core.fs).attributes
    assert attributes is not None
    raw = raw_of(core, FILES_FROM)
    for offset in (1, len(raw) - 1, len(raw), 1 << 40):
        assert attributes.read(raw, offset, FILES_FROM) is None
    assert attributes.read(b"", 0, FILES_FROM) is None


def test_reserved_inodes_are_left_to_be_refused(core: Core) -> None:
    attributes = Session(core.fs).attributes
    assert attributes is not None
    for number in (0, 1, 3, 7, 8, 10):
        assert attributes.read(raw_of(core, 2), 0, number) is None


def test_compiled_code_is_not_needed(tmp_path: Path) -> None:
    """Without compiled code every entry comes from a decoded inode."""
    with Core(make_image(tmp_path)) as core:
        session = Session(core.fs)
        session.attributes = None
        core.run(lambda fs: fs.inode(FILES_FROM))
        assert nodes.unread_entry(session, FILES_FROM, 0, 0) is None
