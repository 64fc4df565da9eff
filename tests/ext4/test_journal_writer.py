"""What our writer logs is what the kernel, e2fsck and our own recovery replay, in every format of the journal."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusewire.ext4 import iomap, namespace
from fusewire.ext4.journalsuper import Checksums, JournalFeature
from tests.journals import Disk, MemoryJournal, opened, with_format
from tests.mounting import kernel_mount, run

FILE_BLOCKS = 1020
SECOND = 1_000_000_000
MAGIC = b"\xc0\x3b\x39\x98"
LAYOUTS = {"1k": "-b 1024 -J size=1", "2k": "-b 2048 -J size=2", "4k": "-b 4096 -J size=4"}
FORMATS = [(kind, wide) for kind in Checksums for wide in (False, True)]
formats = pytest.mark.parametrize("kind, wide", FORMATS, ids=[f"{kind.value}-{32 << wide}" for kind, wide in FORMATS])
layouts = pytest.mark.parametrize("layout", LAYOUTS)
kinds = pytest.mark.parametrize("kind", Checksums, ids=lambda kind: kind.value)


@pytest.fixture(scope="module")
def image_with_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """A function from a layout to a fresh image with the shortest journal and a file of FILE_BLOCKS blocks."""
    folder = tmp_path_factory.mktemp("writer")

    def make(layout: str) -> Path:
        block_bytes = 1024 * int(layout[0])
        original = folder / layout
        if not original.exists():
            content = folder / f"content-{layout}"
            content.mkdir()
            (content / "file").write_bytes(b"o" * block_bytes * FILE_BLOCKS)
            original.touch()
            os.truncate(original, block_bytes * 6000)
            run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "metadata_csum,64bit", *LAYOUTS[layout].split(),
                "-d", content, original)
        copy = folder / f"copy-{layout}"
        shutil.copyfile(original, copy)
        return copy

    yield make
    shutil.rmtree(folder)


class Model:
    """A disk whose file is overwritten through the log; what each of its blocks must hold after recovery."""

    def __init__(self, disk: Disk, kind: Checksums, wide: bool, seed: int) -> None:
        self.disk, self.chance = disk, random.Random(seed)
        raw = disk.journal.patched(sequence=self.chance.choice((1, 77, 0xFFFFFFF0)))
        disk.write(0, with_format(raw, kind, wide))
        disk.set_needs_recovery(True)
        self.writer = disk.writer()
        file = disk.run(namespace.lookup_inode, disk.fs, disk.run(disk.fs.check), b"file")
        self.homes = [self._home(file, index) for index in range(FILE_BLOCKS)]
        self.expected = dict.fromkeys(self.homes, disk.read_home(self.homes[0]))
        self.at_home = dict(self.expected)
        self.logged: list[tuple[int, dict[int, bytes]]] = []

    def _home(self, file: object, index: int) -> int:
        run_ = self.disk.run(iomap.find, self.disk.fs, file, index)
        assert run_.start is not None
        return run_.start + index - run_.file_block

    def content(self) -> bytes:
        head = MAGIC if self.chance.random() < 0.3 else b""
        return head + self.chance.randbytes(self.disk.block_bytes - len(head))

    def add_batch(self, most: int) -> None:
        homes = self.chance.sample(self.homes, self.chance.randrange(1, most))
        logged = {home: self.content() for home in homes}
        free = [home for home in self.homes if home not in logged]
        revoked = self.chance.sample(free, self.chance.choice((0, 0, 1, 40)))
        while not self.writer.fits(len(logged), len(revoked)):
            self.checkpoint()
        self._write(self.writer.begin(), 0)
        encoded = self.writer.encode(list(logged.items()), revoked, 1_700_000_000 * SECOND)
        assert len(encoded.records) + 1 == self.writer.need(len(logged), len(revoked))
        for start, run_ in encoded.runs():
            for offset, data in enumerate(run_):
                self._write(data, start + offset)
        self._write(encoded.commit[1], encoded.commit[0])
        self.expected |= {home: self.at_home[home] for home in revoked} | logged
        for _, older in self.logged:
            for home in revoked:
                older.pop(home, None)
        self.logged.append((encoded.sequence, logged))

    def checkpoint(self) -> None:
        """Write the oldest half of the log home and move the tail."""
        count = max(len(self.logged) // 2, 1)
        done, self.logged = self.logged[:count], self.logged[count:]
        for _, blocks in done:
            for home, data in blocks.items():
                self.disk.write_home(home, data)
            self.at_home |= blocks
        move = self.writer.checkpoint(done[-1][0])
        assert move is not None
        self._write(move.superblock, 0)
        self.writer.release(move)

    def _write(self, data: bytes | None, position: int) -> None:
        if data is not None:
            self.disk.write(position, data)


def blocks_of(path: Path, homes: list[int]) -> dict[int, bytes]:
    with opened(path) as disk:
        return {home: disk.read_home(home) for home in homes}


def differences(found: dict[int, bytes], expected: dict[int, bytes]) -> list[int]:
    return [home for home in expected if found[home] != expected[home]]


@layouts
@formats
def test_a_log_of_ours_is_replayed_by_all(layout: str, kind: Checksums, wide: bool, mounts: None,
                                          image_with_file: Callable[[str], Path]) -> None:
    """Batches of all sizes with escapes and revocations, the ring used more than once."""
    seed = random.Random(f"{layout}{kind}{wide}").randrange(1 << 32)
    print(f"seed {seed}")
    path = image_with_file(layout)
    with opened(path) as disk:
        model = Model(disk, kind, wide, seed)
        for _ in range(16):
            model.add_batch(most=200)
        assert sum(model.writer.need(len(blocks)) for _, blocks in model.logged) > 100
        replay = disk.recover()
        ours = {home: replay.content(home) or disk.read_home(home) for home in model.homes}
        assert not replay.damage and not differences(ours, model.expected)
    by_kernel, by_e2fsck = path.with_name("kernel"), path.with_name("e2fsck")
    shutil.copyfile(path, by_kernel)
    shutil.copyfile(path, by_e2fsck)
    with kernel_mount(by_kernel, "rw"):
        pass
    assert not differences(blocks_of(by_kernel, model.homes), model.expected), "kernel"
    checked = run("e2fsck", "-fy", by_e2fsck, check=False)
    assert checked.returncode in (0, 1), checked.stdout
    assert not differences(blocks_of(by_e2fsck, model.homes), model.expected), "e2fsck"
    with opened(path) as disk:
        disk.replay_home(disk.recover())
    assert not differences(blocks_of(path, model.homes), model.expected), "fusewire"
    run("e2fsck", "-fn", path)


@layouts
def test_a_batch_that_fills_the_whole_log_is_replayed_by_all(layout: str, mounts: None,
                                                             image_with_file: Callable[[str], Path]) -> None:
    path = image_with_file(layout)
    with opened(path) as disk:
        model = Model(disk, Checksums.V3, True, 5)
        model.add_batch(most=50)
        model.checkpoint()
        writer, count = model.writer, model.writer.most_blocks
        encoded = writer.encode([(home, model.content()) for home in model.homes[:count]], (), SECOND)
        assert writer.free <= 1 < count and encoded.commit[0] in (writer.head - 1, writer.journal.last - 1)
        for position, data in (*encoded.records, encoded.commit):
            disk.write(position, data)
        replay = disk.recover()
        assert [found.logged for found in replay.transactions] == [count] and not replay.damage
        expected = {home: replay.content(home) or b"" for home in model.homes[:count]}
    by_kernel, by_e2fsck = path.with_name("kernel"), path.with_name("e2fsck")
    shutil.copyfile(path, by_kernel)
    shutil.copyfile(path, by_e2fsck)
    with kernel_mount(by_kernel, "rw"):
        pass
    run("e2fsck", "-fy", by_e2fsck, check=False)
    for other in (by_kernel, by_e2fsck):
        assert not differences(blocks_of(other, model.homes[:count]), expected), other.name


def test_an_emptied_journal_is_clean_for_all(mounts: None, image_with_file: Callable[[str], Path]) -> None:
    path = image_with_file("1k")
    with opened(path) as disk:
        model = Model(disk, Checksums.V3, True, 2)
        model.add_batch(most=50)
        while model.logged:
            model.checkpoint()
        disk.write(0, model.writer.empty())
        disk.set_needs_recovery(False)
        assert model.writer.free == disk.journal.ring_blocks and not disk.recover().transactions
        assert disk.journal.head == model.writer.head and disk.journal.sequence == model.writer.sequence
    assert "Journal start:            0" in run("dumpe2fs", "-h", path).stdout
    run("e2fsck", "-fn", path)
    with kernel_mount(path, "rw") as mounted:
        (mounted.root / "new").write_bytes(b"n")
    run("e2fsck", "-fn", path)


def test_an_abort_is_recorded_as_the_kernel_and_e2fsck_read_it(mounts: None,
                                                               image_with_file: Callable[[str], Path]) -> None:
    path = image_with_file("1k")
    with opened(path) as disk:
        model = Model(disk, Checksums.V3, True, 3)
        model.add_batch(most=50)
        disk.write(0, model.writer.aborted(5))
        assert disk.journal.errno == 5 and len(disk.recover().transactions) == 1
    with kernel_mount(path, "rw"):
        pass
    assert not differences(blocks_of(path, model.homes), model.expected)
    assert "clean with errors" in run("dumpe2fs", "-h", path).stdout


# ---- rules of the writer, in memory ------------------------------------------------------------------------

@kinds
@pytest.mark.parametrize("block_bytes", [1024, 4096])
def test_need_is_what_a_batch_takes(kind: Checksums, block_bytes: int) -> None:
    store = MemoryJournal(kind, block_bytes=block_bytes)
    for count in (0, 1, 59, 60, 61, 62, 63, 80, 81, 82, 120, 125, 126, 240):
        for revoked in (0, 1, 125, 126, 127, 1000):
            writer = store.writer()
            if writer.fits(count, revoked):
                encoded = writer.encode([(100 + index, bytes(block_bytes)) for index in range(count)],
                                        range(5000, 5000 + revoked), SECOND)
                assert len(encoded.records) + 1 == writer.need(count, revoked)
                assert writer.free == 1023 - writer.need(count, revoked)
            store = MemoryJournal(kind, block_bytes=block_bytes)


@kinds
def test_the_largest_batch_fits_and_one_more_block_does_not(kind: Checksums) -> None:
    writer = MemoryJournal(kind).writer()
    assert writer.fits(writer.most_blocks) and not writer.fits(writer.most_blocks + 2)
    assert writer.need(writer.max_blocks) <= 1023 // 4 < writer.need(writer.max_blocks + 2)


def test_space_comes_back_only_when_the_tail_has_moved() -> None:
    store = MemoryJournal()
    writer = store.writer()
    for _ in range(4):
        writer.encode([(100 + index, bytes(1024)) for index in range(200)], (), SECOND)
    assert not writer.fits(220)
    move = writer.checkpoint(8)
    assert move is not None and move.sequence == 9 and not writer.fits(220)
    store.write(0, move.superblock)
    assert (store.journal.start, store.journal.sequence) == (move.start, 9)
    writer.release(move)
    assert writer.fits(220) and writer.in_log() == [9, 10]
    assert writer.checkpoint(8) is None
    last = writer.checkpoint(10)
    assert last is not None and (last.sequence, last.start) == (11, writer.head)


def test_the_ring_is_never_overwritten_and_the_fast_commit_area_never_touched() -> None:
    store = MemoryJournal(maxlen=2048, more_incompat=JournalFeature.FAST_COMMIT.mask, fc_blocks=256)
    writer, chance, live = store.writer(), random.Random(4), set[int]()
    spans: dict[int, set[int]] = {}
    for _ in range(300):
        count = chance.randrange(1, 120)
        if not writer.fits(count):
            move = writer.checkpoint(chance.choice(writer.in_log()))
            assert move is not None
            writer.release(move)
            for sequence in set(spans) - set(writer.in_log()):
                live -= spans.pop(sequence)
            continue
        encoded = writer.encode([(3000 + index, bytes(1024)) for index in range(count)], (), SECOND)
        span = {position for position, _ in (*encoded.records, encoded.commit)}
        assert not span & live and min(span) >= 1 and max(span) < store.journal.last == 1792
        spans[encoded.sequence] = span
        live |= span
        assert writer.free == 1791 - len(live)


@pytest.mark.parametrize("blocks, revoked, wide", [
    ([(100, bytes(1024)), (100, bytes(1024))], (), True), ([(100, bytes(1024))], (100,), True),
    ([(1 << 32, bytes(1024))], (), False), ([(100 + index, bytes(1024)) for index in range(1023)], (), True),
])
def test_batches_that_replay_would_misread_are_our_bugs(blocks: list[tuple[int, bytes]], revoked: tuple[int, ...],
                                                        wide: bool) -> None:
    writer = MemoryJournal(Checksums.V3, wide).writer()
    with pytest.raises(AssertionError):
        writer.encode(blocks, revoked, SECOND)


def test_commit_times_never_go_back() -> None:
    store = MemoryJournal()
    writer = store.writer()
    for at in (100, 90, 110):
        store.commit(writer.encode([(50, bytes(1024))], (), at * SECOND))
    assert [transaction.seconds for transaction in store.recover().transactions] == [100, 100, 110]
