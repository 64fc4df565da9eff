"""Fast commits: which of them count, and what the kernel's say."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from fusewire.ext4 import checksum, fastcommit
from fusewire.ext4.errors import Check, Corrupt, Unsupported
from fusewire.ext4.fastcommit import AddRange, Create, DelRange, FastCommits, InodeImage, Link, Unlink
from fusewire.ext4.journalsuper import JournalFeature
from fusewire.ext4.recovery import Replay
from tests.dirty import write
from tests.journals import MemoryJournal, left_dirty, opened
from tests.mounting import run

SEQUENCE = 9
ADD, DEL, CREATE, LINK, UNLINK, INODE, PAD, TAIL, HEAD = range(1, 10)
Tags = list[tuple[int, bytes]]


def packed(kind: int, value: bytes) -> bytes:
    return struct.pack("<HH", kind, len(value)) + value


class Area:
    """A fast commit area in memory, filled tag by tag with running checksums."""

    def __init__(self, fc_blocks: int = 64) -> None:
        self.store = MemoryJournal(maxlen=2048, more_incompat=JournalFeature.FAST_COMMIT.mask, fc_blocks=fc_blocks)
        self.journal = self.store.journal
        self.raw, self.running = bytearray(), 0

    def add(self, kind: int, value: bytes) -> Area:
        """Put a tag behind the last, padding the block before if it does not fit (the kernel keeps room for a pad)."""
        tag = packed(kind, value)
        room = 1024 - len(self.raw) % 1024
        if room < len(tag) + 4:
            self._put(packed(PAD, bytes(room - 4)))
        return self._put(tag)

    def _put(self, tag: bytes) -> Area:
        self.running = checksum.crc32c(self.running, tag)
        self.raw += tag
        return self

    def head(self, sequence: int = SEQUENCE, features: int = 0) -> Area:
        return self.add(HEAD, struct.pack("<II", features, sequence))

    def tail(self, sequence: int = SEQUENCE, wrong: int = 0, fill: bool = True) -> Area:
        """End a commit; the tail takes the rest of its block, as the kernel's does."""
        if 1024 - len(self.raw) % 1024 < 12:
            self._put(packed(PAD, bytes(1024 - len(self.raw) % 1024 - 4)))
        rest = 1024 - len(self.raw) % 1024 - 12 if fill else 0
        start = struct.pack("<HHI", TAIL, 8 + rest, sequence)
        self.raw += start + struct.pack("<I", checksum.crc32c(self.running, start) ^ wrong) + bytes(rest)
        self.running = 0
        return self

    def scan(self, sequence: int = SEQUENCE) -> FastCommits:
        for index in range(0, len(self.raw), 1024):
            block = bytes(self.raw[index:index + 1024])
            self.store.write(self.journal.fc_first + index // 1024, block + bytes(1024 - len(block)))
        return fastcommit.scan(self.journal, sequence, self.store.geometry, self.store.read)


def link(name: bytes, parent: int = 2, inode: int = 12) -> tuple[int, bytes]:
    return LINK, struct.pack("<II", parent, inode) + name


def test_each_tag_becomes_its_change() -> None:
    area, raw = Area().head(), random.Random(1).randbytes(160)
    for kind, value in (
            (INODE, struct.pack("<I", 12) + raw), (CREATE, struct.pack("<II", 2, 12) + b"new"),
            (ADD, struct.pack("<IIHHI", 12, 7, 3, 0, 0x1100)),
            (ADD, struct.pack("<IIHHI", 12, 20, 32768 + 5, 0, 0x1200)),
            (DEL, struct.pack("<III", 12, 9, 4)), (DEL, struct.pack("<III", 12, 9, 0xFFFFFFFF)),
            link(b"second"), (UNLINK, struct.pack("<II", 2, 12) + b"\xff" * 255)):
        area.add(kind, value)
    found = area.tail().scan()
    assert list(found) == [
        InodeImage(12, raw), Create(2, 12, b"new"), AddRange(12, 7, 3, 0x1100, False),
        AddRange(12, 20, 5, 0x1200, True), DelRange(12, 9, 4), DelRange(12, 9, (1 << 32) - 9), Link(2, 12, b"second"),
        Unlink(2, 12, b"\xff" * 255)]
    assert found.commits == 1 and list(found) == list(found)


def test_commits_count_up_to_the_last_good_tail() -> None:
    area = Area().head().add(*link(b"one")).tail().add(*link(b"two")).tail().add(*link(b"three"))
    assert [change.name for change in area.scan()] == [b"one", b"two"]  # type: ignore[union-attr]
    area.tail(wrong=1).add(*link(b"four")).tail()
    found = area.scan()
    assert [change.name for change in found] == [b"one", b"two"] and found.commits == 2  # type: ignore[union-attr]


def test_commits_may_share_a_block() -> None:
    area = Area().head().add(*link(b"one")).tail(fill=False).add(*link(b"two")).tail(fill=False)
    assert area.scan().commits == 2


def test_a_commit_longer_than_a_block_is_one() -> None:
    area = Area().head()
    for index in range(90):
        area.add(*link(b"%03d" % index + b"n" * 50))
    found = area.tail().scan()
    assert len(list(found)) == 90 and found.commits == 1 and len(area.raw) > 5 * 1024


@pytest.mark.parametrize("area", [
    Area(), Area().add(*link(b"x")).tail(), Area().head(SEQUENCE - 1).add(*link(b"x")).tail(),
    Area().head().add(*link(b"x")), Area().head().add(*link(b"x")).tail(SEQUENCE - 1),
    Area().head().add(*link(b"x")).tail(wrong=1), Area().head().add(12, b"unknown").tail(),
    Area().head().add(ADD, bytes(15)).tail(), Area().head().add(DEL, bytes(13)).tail(),
    Area().head().add(LINK, bytes(8)).tail(), Area().head().add(LINK, bytes(8) + b"n" * 256).tail(),
    Area().head().add(INODE, bytes(4 + 127)).tail(), Area().head().add(INODE, bytes(4 + 257)).tail(),
    Area().head().add(HEAD, bytes(9)).tail(), Area().head().add(TAIL, bytes(7)),
], ids=["nothing", "no head", "old head", "no tail", "old tail", "wrong sum", "unknown", "short range", "long range",
        "no name", "long name", "short inode", "long inode", "long head", "short tail"])
def test_what_does_not_begin_or_end_as_it_must_does_not_count(area: Area) -> None:
    found = area.scan()
    assert list(found) == [] and found.tags == found.commits == 0


def test_the_block_between_ring_and_area_is_not_read() -> None:
    area = Area().head().add(*link(b"x")).tail()
    area.store.write(area.journal.last, bytes(area.raw[:1024]))
    assert area.scan().commits == 1
    shifted = Area()
    shifted.store.write(shifted.journal.last, bytes(area.raw[:1024]))
    assert shifted.scan().commits == 0


def test_a_full_area_ends_with_the_journal() -> None:
    area = Area(fc_blocks=9).head()
    for index in range(8):
        area.add(*link(b"%d" % index)).tail()
    assert area.scan().commits == 8 and len(area.raw) == 8 * 1024
    assert area.journal.fc_first + 8 == area.journal.maxlen


def test_features_that_we_do_not_know_forbid_the_replay() -> None:
    with pytest.raises(Unsupported, match="fast commit features: 0x4"):
        Area().head(features=4).add(*link(b"x")).tail().scan()
    assert Area().head(SEQUENCE - 1, features=4).scan().commits == 0


@pytest.mark.parametrize("kind, value", [
    link(b"a/b"), link(b"a\0"), link(b"."), link(b".."), link(b"x", inode=0), link(b"x", inode=1025),
    link(b"x", parent=0), (INODE, struct.pack("<I", 0) + bytes(128)), (DEL, struct.pack("<III", 2000, 0, 1)),
    (ADD, struct.pack("<IIHHI", 12, 0, 0, 0, 100)), (ADD, struct.pack("<IIHHI", 12, 0, 2, 0, 8191)),
    (ADD, struct.pack("<IIHHI", 12, 0, 1, 0, 0)), (ADD, struct.pack("<IIHHI", 12, 0, 1, 1, 100)),
    (ADD, struct.pack("<IIHHI", 12, 0xFFFFFFFF, 2, 0, 100)), (ADD, struct.pack("<IIHHI", 0, 0, 1, 0, 100)),
])
def test_nonsense_under_a_right_checksum_is_corruption(kind: int, value: bytes) -> None:
    with pytest.raises(Corrupt) as refused:
        Area().head().add(kind, value).tail().scan()
    assert refused.value.check is Check.FASTCOMMIT_RECORD
    assert Area().head().add(kind, value).scan().commits == 0  # but only if its commit counts


@pytest.mark.parametrize("seed", range(6))
def test_any_bytes_give_changes_or_a_known_error(seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(60):
        area = Area(fc_blocks=5).head()
        for _ in range(chance.randrange(30)):
            area.add(chance.randrange(11), chance.randbytes(chance.choice((0, 8, 12, 16, 20, 100, 300))))
            if chance.random() < 0.2:
                area.tail()
        area.raw = area.raw[:4 * 1024]
        with suppress(Corrupt, Unsupported):
            list(area.scan())


# ---- the kernel's -------------------------------------------------------------------------------------------

def first(root: Path) -> None:
    """The full commit that must come before any fast one."""
    write(root / "old", b"o" * 9000)
    write(root / "gone", b"g")
    (root / "folder").mkdir()
    write(root / "folder" / "deep", b"d")
    os.sync()


def fast(root: Path) -> None:
    """Operations that are eligible, each made durable by an fsync."""
    write(root / "new", b"n" * 5000)
    os.link(root / "old", root / "folder" / "linked")
    os.unlink(root / "gone")
    os.rename(root / "folder" / "deep", root / "renamed")
    with open(root / "old", "r+b") as file:
        file.truncate(100)
        os.fsync(file.fileno())
    with open(root / "reserved", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 20480)
        os.fsync(file.fileno())


@pytest.mark.parametrize("block_bytes", [1024, 4096])
def test_fast_commits_of_the_kernel_say_what_was_done(block_bytes: int, mounts: None, tmp_path: Path) -> None:
    path = made_by_kernel(tmp_path, block_bytes, first, fast)
    with opened(path) as disk:
        replay = disk.recover()
        assert not replay.damage and replay.fast_commits is not None
        changes = list(replay.fast_commits)
    numbers = {change.name: change.inode for change in changes if isinstance(change, Create)}
    assert set(numbers) == {b"new", b"reserved"} and replay.fast_commits.commits >= 2
    assert {change.name for change in changes if isinstance(change, Link)} == {b"linked", b"renamed"}
    assert {change.name for change in changes if isinstance(change, Unlink)} == {b"gone", b"deep"}
    added = {(change.inode, change.unwritten): change.length for change in changes if isinstance(change, AddRange)}
    assert added[numbers[b"new"], False] == -(-5000 // block_bytes)
    assert added[numbers[b"reserved"], True] == 20480 // block_bytes
    assert any(isinstance(change, DelRange) and change.file_block == -(-100 // block_bytes) for change in changes)
    images = {change.inode: change.raw for change in changes if isinstance(change, InodeImage)}
    assert struct.unpack_from("<I", images[numbers[b"new"]], 4) == (5000,)
    assert struct.unpack_from("<I", images[numbers[b"reserved"]], 4) == (20480,)


def made_by_kernel(folder: Path, block_bytes: int, *steps: Callable[[Path], None]) -> Path:
    path = folder / "image"
    path.touch()
    os.truncate(path, 64 << 20)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(block_bytes), "-O", "fast_commit", path)
    left_dirty(path, "rw", steps)
    return path


def test_every_block_of_the_kernels_area_that_is_cut_off_takes_only_its_commits(mounts: None, tmp_path: Path) -> None:
    """Zeroes, a torn sector or a wrong byte in block n leave exactly the commits before it."""
    def many(root: Path) -> None:
        for number in range(12):
            write(root / f"file{number}", b"f" * 100 * number)

    path = made_by_kernel(tmp_path, 1024, first, many)
    with opened(path) as disk:
        journal = disk.journal
        whole = names(disk.recover())
        assert len(whole) == 12
        counts = []
        for block in range(journal.fc_first, journal.fc_first + 14):
            good = disk.read(block)
            for bad in (bytes(1024), bytes(512) + good[512:], good[:10] + b"?" + good[11:]):
                disk.write(block, bad)
                replay = disk.recover()
                assert not replay.damage
                found = names(replay)
                assert found == whole[:len(found)]
                counts.append(len(found))
            disk.write(block, good)
        assert names(disk.recover()) == whole and len(set(counts)) > 10


def names(replay: Replay) -> list[bytes]:
    assert replay.fast_commits is not None
    return [change.name for change in replay.fast_commits if isinstance(change, Create)]


def test_a_full_commit_makes_older_fast_commits_void(mounts: None, tmp_path: Path) -> None:
    def full(root: Path) -> None:
        os.sync()

    path = made_by_kernel(tmp_path, 1024, first, fast, full)
    with opened(path) as disk:
        replay = disk.recover()
        assert replay.fast_commits is not None and list(replay.fast_commits) == [] and not replay.damage
