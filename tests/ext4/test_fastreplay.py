"""Fast commits applied: histories of random operations, logged as the kernel logs them, give the same tree elsewhere.

``History`` changes one image and keeps the records; they are applied to a copy of the image as it was.
"""

from __future__ import annotations

import os
import random
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusewire import writable
from fusewire.blockdev import BlockDevice
from fusewire.ext4 import (
    alloc,
    extentstore,
    inode,
    inodefree,
    inodestore,
    iomap,
    iomapwrite,
    mapping,
    namespace,
    namestore,
    orphan,
    truncate,
)
from fusewire.ext4.batch import BatchLimits
from fusewire.ext4.errors import Check, Corrupt, Refused, Unsupported
from fusewire.ext4.extents import END_OF_FILE_BLOCKS, MAX_WRITTEN
from fusewire.ext4.fastcommit import AddRange, Change, Create, DelRange, InodeImage, Link, Unlink
from fusewire.ext4.fastreplay import FastReplay
from fusewire.ext4.inode import Inode
from fusewire.ext4.newinode import Caller
from tests.ext4.driver import Core, image, new_path, run_tool
from tests.ext4.writer import Writer

MOST_BLOCKS = 1 << 20
MAPPED_MOST = 1000      # file blocks that block maps are asked for: beyond their end each hole is one block long
ROOT, ROOT_NUMBER = Caller(0, 0), 2
SHAPES = {
    "1k": "-t ext4 -b 1024 -O ^has_journal",
    "4k": "-t ext4 -b 4096 -O ^has_journal,metadata_csum_seed",
    "no checksums": "-t ext4 -b 1024 -O ^has_journal,^metadata_csum,^64bit,uninit_bg",
    "ext3": "-t ext3 -b 1024 -I 128 -O ^has_journal",
}


class History:
    """Operations on an image, and the fast commits that a kernel would have logged of them."""

    def __init__(self, base: Path, chance: random.Random) -> None:
        self.writer, self.chance = Writer(base, batch_blocks=MOST_BLOCKS), chance
        self.changes: list[Change] = []
        self.names: list[Create | Link | Unlink] = []
        self.touched: dict[int, tuple[int, int]] = {}   # inode → its file blocks from the first to the last changed
        self.files: dict[bytes, int] = {}
        self.folders: dict[bytes, int] = {b"": ROOT_NUMBER}
        self.counter = 0

    def inode(self, number: int) -> Inode:
        return self.writer.inode(number)

    def touch(self, number: int, first: int = END_OF_FILE_BLOCKS, end: int = 0) -> None:
        low, high = self.touched.get(number, (END_OF_FILE_BLOCKS, 0))
        self.touched[number] = min(low, first), max(high, end)

    def new_name(self) -> bytes:
        self.counter += 1
        folder = self.chance.choice(sorted(self.folders))
        return folder + b"/%d-%s" % (self.counter, b"n" * self.chance.choice((0, 5, 60)))

    def parent(self, path: bytes) -> tuple[int, bytes]:
        folder, _, name = path.rpartition(b"/")
        return self.folders[folder], name

    # ---- operations

    def create(self) -> None:
        path = self.new_name()
        parent, name = self.parent(path)
        made = self.writer.change(lambda tx: namestore.create(tx, tx.inode(parent), name, 0o644, ROOT))
        self.files[path] = made.number
        self.names.append(Create(parent, made.number, name))
        self.touch(made.number)

    def mkdir(self) -> None:
        path = self.new_name()
        parent, name = self.parent(path)
        made = self.writer.change(lambda tx: namestore.mkdir(tx, tx.inode(parent), name, 0o755, ROOT))
        self.folders[path] = made.number
        self.names.append(Create(parent, made.number, name))

    def rmdir(self) -> None:
        empty = [path for path in self.folders if path and not any(
            other.startswith(path + b"/") for other in (*self.files, *self.folders))]
        if empty:
            path = self.chance.choice(sorted(empty))
            parent, name = self.parent(path)
            number = self.folders.pop(path)
            self.writer.change(lambda tx: namestore.rmdir(tx, tx.inode(parent), name))
            self.names.append(Unlink(parent, number, name))
            self.free(number)

    def write(self) -> None:
        number = self.file()
        first, count = self.chance.randrange(40), self.chance.choice((1, 1, 2, 9))
        block_bytes = self.writer.block_bytes

        def write(tx: Any) -> None:
            at, of = first, tx.inode(number)
            while at < first + count:
                of, found = iomapwrite.begin(tx, of, at * block_bytes, (first + count - at) * block_bytes)
                stop = min((found.offset + found.length) // block_bytes, first + count)
                of = iomapwrite.ioend(tx, of, at * block_bytes, (stop - at) * block_bytes)
                at = stop

        self.writer.change(write)
        self.touch(number, first, first + count)

    def reserve(self) -> None:
        number, block_bytes = self.file(), self.writer.block_bytes
        first, count = self.chance.randrange(60), self.chance.randrange(1, 8)
        if self.inode(number).has_extents:
            self.writer.change(lambda tx: truncate.reserve(
                tx, tx.inode(number), first * block_bytes, count * block_bytes))
            self.touch(number, first, first + count)

    def cut(self) -> None:
        number = self.file()
        size = self.chance.randrange(60 * self.writer.block_bytes)
        self.writer.change(lambda tx: truncate.set_size(tx, tx.inode(number), size))
        while not self.writer.change(lambda tx: truncate.shrink(tx, tx.inode(number))[1]):
            pass
        self.touch(number, -(-size // self.writer.block_bytes), END_OF_FILE_BLOCKS)

    def punch(self) -> None:
        number, block_bytes = self.file(), self.writer.block_bytes
        first, count = self.chance.randrange(40), self.chance.randrange(1, 10)
        while not self.writer.change(lambda tx: truncate.punch(
                tx, tx.inode(number), first * block_bytes, count * block_bytes)[1]):
            pass
        self.touch(number, first, first + count)

    def chmod(self) -> None:
        number, mode = self.file(), self.chance.randrange(0o1000)
        self.writer.change(lambda tx: inodestore.change(tx, tx.inode(number), mode=stat.S_IFREG | mode, ctime=tx.now))
        self.touch(number)

    def link(self) -> None:
        number, path = self.file(), self.new_name()
        parent, name = self.parent(path)
        self.writer.change(lambda tx: namestore.link(tx, tx.inode(number), tx.inode(parent), name))
        self.files[path] = number
        self.names.append(Link(parent, number, name))
        self.touch(number)

    def unlink(self) -> None:
        if self.files:
            self.remove(self.chance.choice(sorted(self.files)))

    def rename(self) -> None:
        if len(self.files) > 1:
            old = self.chance.choice(sorted(self.files))
            new = self.chance.choice((self.new_name(), *sorted(set(self.files) - {old})))
            if self.files.get(new) == self.files[old]:
                return
            number = self.files[old]
            if new in self.files:
                self.remove(new)
            parent, name = self.parent(new)
            self.writer.change(lambda tx: namestore.link(tx, tx.inode(number), tx.inode(parent), name))
            self.names.append(Link(parent, number, name))
            self.files[new] = number
            self.touch(number)
            self.remove(old)

    def remove(self, path: bytes) -> None:
        parent, name = self.parent(path)
        number = self.files.pop(path)
        victim = self.writer.change(lambda tx: namestore.unlink(tx, tx.inode(parent), name))
        self.names.append(Unlink(parent, number, name))
        self.touch(number)
        if not victim.links:
            self.free(number)

    def free(self, number: int) -> None:
        """As when nobody has the file open: it goes at once, and its number is used again."""
        while not self.writer.change(lambda tx: inodefree.release(tx, tx.inode(number))):
            pass
        self.touched.pop(number, None)
        self.names = [name for name in self.names if not (isinstance(name, Create) and name.inode == number)]

    def file(self) -> int:
        if not self.files:
            self.create()
        return self.files[self.chance.choice(sorted(self.files))]

    # ---- records

    def commit(self) -> None:
        """Log what was done: names in order, each new inode described before its first name, then all that changed."""
        for name in self.names:
            if isinstance(name, Create):
                self.changes += [self.image(name.inode), *self.ranges(name.inode)]
            self.changes.append(name)
        for number in self.touched:
            self.changes += [*self.ranges(number), self.image(number)]
        self.names, self.touched = [], {}

    def image(self, number: int) -> InodeImage:
        found = self.inode(number)
        return InodeImage(number, found.raw[:128 + (found.extra_isize or 0)])

    def ranges(self, number: int) -> Iterator[AddRange | DelRange]:
        of, (at, end) = self.inode(number), self.touched.get(number, (0, 0))
        end = end if of.has_extents else min(end, MAPPED_MOST)
        while at < end:
            run = self.writer.run(iomap.find, of, at)
            stop = min(run.file_block + run.length, end)
            if run.start is None:
                yield DelRange(number, at, stop - at)
            else:
                stop = min(stop, at + MAX_WRITTEN - 1)
                yield AddRange(number, at, stop - at, run.start + at - run.file_block, run.unwritten)
            at = stop


OPERATIONS: tuple[Callable[[History], None], ...] = (
    History.create, History.create, History.mkdir, History.rmdir, History.write, History.write, History.write,
    History.reserve, History.cut, History.punch, History.chmod, History.link, History.unlink, History.unlink,
    History.rename)


def tree(core: Core) -> dict[bytes, tuple[object, ...]]:
    """What records describe: names, numbers, links, and of files all fields and where their blocks are."""
    shown: dict[bytes, tuple[object, ...]] = {b"/": (core.root().links,)}
    for path, found in core.tree():
        shown[path] = (found.number, found.mode, found.links, found.generation)
        if not found.is_dir:
            runs = [run[:4] for run in core.mappings(found, max(found.size, 80 * core.block_bytes))]
            shown[path] += (found.size, found.mtime, found.ctime, found.crtime, found.uid, runs)
    return shown


def apply(writer: Writer, changes: list[Change], most: int = 1 << 30) -> int:
    """Apply records, no more than so many transactions of it; how many that were.  Orphans are freed at the end."""
    work, done = FastReplay(writer.fs, changes), 0
    for step in work.steps():
        at: int | None = 0
        while at is not None:
            if done == most:
                return done
            at, done = writer.change(step, at), done + 1
    writer.commit()
    work.release()
    assert writer.fs.writing is not None
    for number in list(writer.fs.writing.orphans):
        while not writer.change(lambda tx, number=number: inodefree.release(tx, tx.inode(number))):
            pass
    return done


def seeded_history(shape: str, seed: int, operations: int) -> tuple[Path, History]:
    """A base image with some files in it, and a history that begins there."""
    print(f"seed {seed}")
    chance = random.Random(f"{shape} {seed}")
    before = History(image(SHAPES[shape], 8192), chance)
    for _ in range(operations // 2):
        chance.choice(OPERATIONS)(before)
    before.writer.check()
    base = before.writer.path
    history = History(base, chance)
    history.files, history.folders, history.counter = before.files, before.folders, before.counter
    before.writer.close()
    for _ in range(operations):
        chance.choice(OPERATIONS)(history)
        if chance.random() < 0.2:
            history.commit()
    history.commit()
    return base, history


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_records_applied_to_the_last_commit_give_the_tree(shape: str, seed: int) -> None:
    base, history = seeded_history(shape, seed, 80)
    expected = tree(history.writer)
    history.writer.check()
    with Writer(base, batch_blocks=MOST_BLOCKS) as writer:
        apply(writer, history.changes)
        assert tree(writer) == expected
        writer.check()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["1k", "ext3"])
def test_records_can_be_applied_again_to_any_part_of_themselves(shape: str, seed: int) -> None:
    """I1: as after a crash between two batches."""
    base, history = seeded_history(shape, seed + 100, 50)
    expected, chance = tree(history.writer), random.Random(seed)
    with Writer(base, batch_blocks=MOST_BLOCKS) as writer:
        steps = apply(writer, history.changes)
    for most in sorted(chance.sample(range(steps), 12)):
        writer = Writer(base, batch_blocks=MOST_BLOCKS)
        assert apply(writer, history.changes, most) == most
        with writer.reopened() as again:
            again.run(orphan.recall)
            apply(again, history.changes)
            assert tree(again) == expected, f"after {most} of {steps}"
            again.check()


def test_what_is_mapped_by_a_later_record_is_not_allocated_before() -> None:
    """I3: a new directory gets its block before the record that maps all but the last of the free blocks."""
    with Writer(image("-t ext4 -b 1024 -O ^has_journal -N 64", 512)) as writer:
        of = writer.change(lambda tx: namestore.create(tx, tx.inode(ROOT_NUMBER), b"file", 0o644, ROOT))
        writer.commit()
        bits = writer.run(alloc_free)
        places = [bit + 1 for bit in range(8192) if bits >> bit & 1]
        runs = [(at, block) for at, block in enumerate(places[:-1])]
        folder = raw_inode(stat.S_IFDIR | 0o755, 2)
        apply(writer, [
            InodeImage(20, folder), Create(ROOT_NUMBER, 20, b"folder"),
            *(AddRange(of.number, at, 1, block, False) for at, block in runs),
            InodeImage(of.number, raw_inode(stat.S_IFREG, 1, of.generation, size=len(runs) * 1024))])
        assert writer.run(iomap.find, writer.at("folder"), 0).start == places[-1]
        writer.check()


def alloc_free(fs: Any) -> int:
    """The free blocks of the first group, as bits."""
    return alloc.free_bits(fs, 0)


def raw_inode(mode: int, links: int, generation: int = 77, block: bytes = b"", flags: int = 0x80000,
              size: int = 0) -> bytes:
    """An inode as a fast commit describes it."""
    raw = bytearray(160)
    struct.pack_into("<HHI", raw, 0, mode, 0, size)
    struct.pack_into("<H", raw, 0x1A, links)
    struct.pack_into("<I", raw, 0x20, flags)
    raw[0x28:0x28 + len(block)] = block
    struct.pack_into("<I", raw, 0x64, generation)
    struct.pack_into("<H", raw, 0x80, 32)
    return bytes(raw)


def test_links_and_devices_keep_what_stands_in_the_block_array() -> None:
    """The kernel (6.18) logs no fast commits for them, but the format can say them."""
    with Writer(image(SHAPES["1k"], 8192)) as writer:
        fast = raw_inode(stat.S_IFLNK | 0o777, 1, block=b"target", flags=0, size=6)
        device = raw_inode(stat.S_IFBLK | 0o600, 1, block=bytes(4) + b"\x09\x07", flags=0)
        apply(writer, [InodeImage(20, fast), Create(2, 20, b"link"), InodeImage(21, device), Create(2, 21, b"device")])
        assert writer.run(namespace.readlink, writer.at("link")) == b"target"
        assert writer.at("device").rdev == (7, 9)
        writer.check()


def test_a_file_that_is_open_without_a_name_is_freed() -> None:
    """The kernel logs an inode without links there; its own replay refuses it."""
    with Writer(image(SHAPES["1k"], 8192)) as writer:
        of = writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"file", 0o644, ROOT))
        writer.commit()
        apply(writer, [Unlink(2, of.number, b"file"),
                       InodeImage(of.number, raw_inode(stat.S_IFREG, 0, of.generation))])
        assert writer.names("/") == [b"lost+found"] and not writer.fs.writing.orphans  # type: ignore[union-attr]
        writer.check()


def test_inodes_that_were_never_written_become_zero() -> None:
    """With lazy_itable_init a table holds what the device held, up to the first inode that was never used."""
    path = new_path()
    path.write_bytes(b"\xa5" * (8 << 20))
    run_tool("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-O", "^has_journal", "-E",
             "nodiscard,lazy_itable_init=1,hash_seed=00112233-4455-6677-8899-aabbccddeeff", path)
    with Writer(path) as writer:
        apply(writer, [InodeImage(40, raw_inode(stat.S_IFREG, 1)), Create(2, 40, b"file")])
        assert writer.at("file").number == 40
        writer.check()


def test_a_replay_without_room_for_its_nodes_says_so() -> None:
    """Every second block of a file is somewhere: that takes nodes, and no block is left for them."""
    with Writer(image("-t ext4 -b 1024 -O ^has_journal -N 64 -m 0", 256)) as writer:
        made = writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"file", 0o644, ROOT))
        writer.commit()
        bits = writer.run(alloc_free)
        places = [bit + 1 for bit in range(8192) if bits >> bit & 1]
        changes: list[Change] = [AddRange(made.number, 2 * at, 1, block, False) for at, block in enumerate(places)]
        device = BlockDevice(os.open(writer.path, os.O_RDWR))
        driver = writable.Driver(device, writer.fs)
        with pytest.raises(Unsupported, match="no room"):
            writable._apply_fast_commits(driver, SimpleNamespace(fast_commits=changes),  # type: ignore[arg-type]
                                         BatchLimits(MOST_BLOCKS))
        device.close()


def test_a_replay_on_a_full_disk_uses_what_it_has_freed() -> None:
    """The kernel had the blocks back after an earlier commit."""
    with Writer(image("-t ext3 -b 1024 -I 128 -O ^has_journal -N 64 -m 0", 512)) as writer:
        made = writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"file", 0o644, ROOT))
        at = 0
        with suppress(Refused):
            while True:
                at = fill(writer, made.number, at)
        writer.commit()
        assert not writer.run(alloc_free)
        device = BlockDevice(os.open(writer.path, os.O_RDWR))
        folders: list[Change] = []
        for number in (20, 21, 22):
            folder = raw_inode(stat.S_IFDIR | 0o755, 2, flags=0)[:128]
            folders += [InodeImage(number, folder), Create(2, number, b"d%d" % number)]
        writable._apply_fast_commits(
            writable.Driver(device, writer.fs), SimpleNamespace(  # type: ignore[arg-type]
                fast_commits=[DelRange(made.number, 0, 3), *folders]), BatchLimits(MOST_BLOCKS))
        assert sorted(writer.names("/")) == [b"d20", b"d21", b"d22", b"file", b"lost+found"]
        writer.check()
        device.close()


def fill(writer: Writer, number: int, at: int) -> int:
    """Map more of a file, from the reserve, too; up to which block."""
    _, run = writer.change(lambda tx: mapping.allocate(tx, tx.inode(number), at, 100, unwritten=False, reserve=True))
    writer.change(lambda tx: inodestore.change(tx, tx.inode(number), size=(at + run.length) * writer.block_bytes))
    return at + int(run.length)


@pytest.mark.parametrize("changes", [
    [InodeImage(7, bytes(160))], [InodeImage(2, bytes(160))], [AddRange(8, 0, 1, 5000, False)], [DelRange(1, 0, 1)],
    [Unlink(2, 8, b"x")], [Link(2, 2, b"x")], [Create(11, 11, b"x")],
    [Create(2, 11, b"again"), Create(11, 11, b"x")], [AddRange(12, 0, 5, 3, False)],
], ids=["resize inode", "root", "journal inode", "bad blocks", "unlink journal", "link root",
        "within itself", "within itself later", "over metadata"])
def test_nonsense_is_corruption(changes: list[Change]) -> None:
    with Writer(image(SHAPES["1k"], 8192)) as writer:
        made = writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"file", 0o644, ROOT))
        assert made.number == 12
        writer.commit()
        with pytest.raises(Corrupt) as refused:
            apply(writer, changes)
        assert refused.value.check is Check.FASTCOMMIT_RECORD


def test_a_name_for_what_is_no_kind_of_file_is_corruption() -> None:
    with Writer(image(SHAPES["1k"], 8192)) as writer, pytest.raises(Corrupt) as refused:
        apply(writer, [InodeImage(20, raw_inode(0, 1)), Create(2, 20, b"file")])
    assert refused.value.check is Check.INODE_MODE


@pytest.mark.parametrize("seed", range(3))
def test_any_records_are_applied_or_refused(seed: int) -> None:
    """Records in any order, about anything: nothing but known errors, and what is stored can be read."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    base, history = seeded_history("1k", seed + 200, 30)
    for _ in range(30):
        changes = [changed(change, chance) for change in chance.sample(history.changes, len(history.changes))]
        with Writer(base, batch_blocks=MOST_BLOCKS) as writer:
            with suppress(Corrupt, Refused):
                apply(writer, changes)
            writer.commit()
            with Core(writer.path) as core, suppress(Corrupt):
                tree(core)


def changed(change: Change, chance: random.Random) -> Change:
    """The record, or one that says something else."""
    if chance.random() < 0.7:
        return change
    if isinstance(change, InodeImage):
        raw = bytearray(change.raw)
        raw[chance.randrange(len(raw))] = chance.randrange(256)
        return InodeImage(change.inode, bytes(raw))
    field = chance.choice([name for name in change._fields if name not in ("name", "unwritten")])
    return change._replace(**{field: max(1, getattr(change, field) + chance.choice((-1, 1, 7)))})


def test_extents_of_a_new_inode_begin_empty() -> None:
    """The block array in a description is that of another allocation: it does not count."""
    with Writer(image(SHAPES["1k"], 8192)) as writer:
        raw = raw_inode(stat.S_IFREG, 1, block=os.urandom(60))
        apply(writer, [InodeImage(20, raw), Create(2, 20, b"file")])
        assert writer.at("file").block == extentstore.empty_root()
        assert inode.load(writer.fs, 20).links == 1
