"""Changing extent trees, against a dictionary of blocks: random changes, trees of three levels, extents of the greatest
length, collapse.  The kernel reads the files afterwards, e2fsck checks the trees."""

from __future__ import annotations

import errno
import random
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fusewire.ext4 import alloc, extents, extentstore, inodestore, iomap, mapping, namestore
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.extents import MAX_WRITTEN, Run
from fusewire.ext4.inode import Inode
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import Transaction
from tests import mounting
from tests.ext4.driver import Editor, image, new_path, run_tool, seeded
from tests.ext4.writer import Writer

ROOT = Caller(0, 0)
MOST_EDITED = 200
Model = dict[int, tuple[int, bool]]     # file block → device block, whether it is unwritten
FORMS = ["-t ext4 -b 1024 -O ^has_journal", "-t ext4 -b 4096 -O ^has_journal",
         "-t ext4 -b 1024 -O ^has_journal,^metadata_csum,^64bit", "-t ext4 -b 2048 -O ^has_journal -g 1024"]


class Subject:
    """Files of one image with the model of what their trees map."""

    def __init__(self, writer: Writer, files: int = 1) -> None:
        self.writer = writer
        self.numbers = [int(writer.change(lambda tx, n=n: namestore.create(
            tx, tx.inode(2), b"f%d" % n, 0o644, ROOT)).number) for n in range(files)]
        self.models: dict[int, Model] = {number: {} for number in self.numbers}
        self.most_edited = self.deepest = 0

    def change(self, operation: Callable[[Transaction, Inode], Any], number: int) -> Any:
        def counted(tx: Transaction) -> Any:
            result = operation(tx, tx.inode(number))
            self.most_edited = max(self.most_edited, len(tx.overlay.edited))
            return result

        result = self.writer.change(counted)
        of = self.writer.inode(number)
        if of.has_extents:
            self.deepest = max(self.deepest, self.writer.run(extents.root_of, of).depth)
        return result

    def allocate(self, number: int, first: int, count: int, *, unwritten: bool, goal: int | None = None) -> None:
        model = self.models[number]
        if first in model:
            return
        _, run = self.change(partial(mapping.allocate, file_block=first, count=count, unwritten=unwritten, goal=goal),
                             number)
        assert run.file_block == first and 1 <= run.length <= count
        for step in range(run.length):
            assert first + step not in model
            model[first + step] = run.start + step, unwritten

    def convert(self, number: int, first: int, end: int, *, unwritten: bool) -> None:
        at = first
        while at < end:
            before = at
            _, at = self.change(partial(extentstore.convert, first=at, end=end, unwritten=unwritten), number)
            assert before < at <= end
        model = self.models[number]
        for block in [block for block in model if first <= block < end]:
            model[block] = model[block][0], unwritten

    def unmap(self, number: int, first: int, end: int) -> None:
        done = False
        while not done:
            _, done = self.change(partial(mapping.unmap, first=first, end=end), number)
        model = self.models[number]
        for block in [block for block in model if first <= block < end]:
            del model[block]

    def check(self) -> None:
        for number in self.numbers:
            assert self.mapped(number) == self.models[number], number
            check_tree(self.writer, number, self.models[number])

    def mapped(self, number: int) -> Model:
        """What the tree says, asked block range by block range."""
        found: Model = {}
        of, at = self.writer.inode(number), 0
        while at < extents.END_OF_FILE_BLOCKS:
            run = self.writer.run(iomap.find, of, at)
            if run.start is not None:
                found.update((run.file_block + step, (run.start + step, run.unwritten)) for step in range(run.length))
            assert run.file_block + run.length > at
            at = run.file_block + run.length
        return found


def check_tree(writer: Writer, number: int, model: Model) -> int:
    """Walk the nodes as they are on disk: depth, order, keys equal to the first entries below, lengths, block count."""
    of = writer.inode(number)
    nodes = [0]

    def walk(raw: bytes, depth: int | None, room: int) -> int | None:
        magic, entries, most, found, _ = struct.unpack_from("<HHHHI", raw)
        assert magic == extents.MAGIC and entries <= most <= (room - 12) // 12
        assert depth is None or (found == depth and entries)
        firsts = []
        for at in range(12, 12 + 12 * entries, 12):
            first = struct.unpack_from("<I", raw, at)[0]
            firsts.append(first)
            if found:
                low, high = struct.unpack_from("<IH", raw, at + 4)
                nodes[0] += 1
                block = low | high << 32
                content = writer.run(lambda fs, b=block: fs.cache.read(b))
                for key, view in writer.fs.cache.entry(block).views.items():    # left there by changes
                    if key[0] == "extents":
                        assert view == extents._decode(writer.fs, of, content, *key[3:])
                below = walk(content, found - 1, writer.block_bytes)
                assert below == first, "an index is not its child's first block"
            else:
                length = struct.unpack_from("<H", raw, at + 4)[0]
                assert length >= 1 and length != 2 * MAX_WRITTEN
        assert firsts == sorted(set(firsts))
        return firsts[0] if firsts else None

    walk(of.block, None, 60)
    assert of.sectors == (len(model) + nodes[0]) * writer.block_bytes // 512
    return nodes[0]


def fsck(writer: Writer) -> None:
    """e2fsck finds nothing, but that nodes could be fuller: the kernel too leaves them as they are."""
    writer.commit()
    text = run_tool("e2fsck", "-fn", writer.path)
    text = re.sub(r"^Inode \d+ extent tree \(at level \d\) could be narrower\.  Optimize\? no$", "", text, flags=re.M)
    assert "? no" not in text, text


def pattern(number: int, block: int, size: int) -> bytes:
    return struct.pack("<II", number, block) * (size // 8)


def under_the_kernel(subject: Subject) -> None:
    """Put data into the blocks, and let the kernel read the files: data, and zeroes where nothing was written."""
    writer, size = subject.writer, subject.writer.block_bytes
    ends = {number: max(model, default=-1) + 1 for number, model in subject.models.items()}
    for number, end in ends.items():
        writer.change(lambda tx, n=number, e=end: inodestore.change(tx, tx.inode(n), size=e * size))
    fsck(writer)
    with writer.path.open("r+b") as device:
        for number, model in subject.models.items():
            for block, (start, unwritten) in model.items():
                device.seek(start * size)
                device.write(b"\xee" * size if unwritten else pattern(number, block, size))
    with mounting.kernel_mount(writer.path) as mount:
        for at, number in enumerate(subject.numbers):
            model = subject.models[number]
            with (mount.root / f"f{at}").open("rb") as file:
                choose = random.Random(number)
                wanted = sorted(choose.sample(sorted(model), min(len(model), 1500))) + [
                    choose.randrange(ends[number]) for _ in range(100) if ends[number]]
                for block in wanted:
                    file.seek(block * size)
                    plain = block in model and not model[block][1]
                    assert file.read(size) == (pattern(number, block, size) if plain else bytes(size)), (number, block)


@pytest.mark.parametrize("form", FORMS)
def test_random_changes_against_a_dictionary(mounts: None, form: str) -> None:
    choose = seeded()
    with Writer(image(form, 48 << 10), batch_blocks=300) as writer:
        subject = Subject(writer, 3)
        for step in range(900):
            number = choose.choice(subject.numbers)
            first = choose.randrange(3000) if choose.random() < 0.8 else choose.randrange(1 << 32)
            count = choose.choice([1, 1, 1, 2, 3, 10, 100, 2000])
            kind = choose.random()
            if kind < 0.6:
                goal = choose.choice([None, choose.randrange(writer.fs.geometry.blocks)])
                subject.allocate(number, first, min(count, 200, (1 << 32) - 1 - first) or 1,
                                 unwritten=choose.random() < 0.5, goal=goal)
            elif kind < 0.85:
                subject.convert(number, first, min(first + count, 1 << 32), unwritten=choose.random() < 0.4)
            else:
                subject.unmap(number, first, min(first + count, 1 << 32))
            if step % 300 == 299:
                subject.check()
                writer.commit()
        assert subject.most_edited < MOST_EDITED
        for number in subject.numbers:
            subject.unmap(number, 20000, 1 << 32)
        under_the_kernel(subject)


def scattered(subject: Subject, blocks: list[int], at_once: int = 50) -> None:
    """Give these file blocks a device block each, no two together."""
    number = subject.numbers[0]
    model = subject.models[number]
    for position in range(0, len(blocks), at_once):
        part = blocks[position:position + at_once]

        def allocate(tx: Transaction, part: list[int] = part) -> list[Run]:
            of, runs = tx.inode(number), []
            for block in part:
                goal = 4000 + 2 * len(model) + 2 * len(runs)
                of, run = mapping.allocate(tx, of, block, 1, unwritten=block % 2 == 0, goal=goal)
                runs.append(run)
            return runs

        for run in subject.writer.change(allocate):
            model[run.file_block] = run.start, run.unwritten
    root = subject.writer.run(extents.root_of, subject.writer.inode(number))
    subject.deepest = max(subject.deepest, root.depth)


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_trees_of_several_levels_grow_and_go(mounts: None, order: str) -> None:
    choose = seeded()
    count = {"ascending": 1500, "descending": 9600, "random": 3000}[order]
    with Writer(image("-t ext4 -b 1024 -O ^has_journal", 40 << 10), batch_blocks=1000) as writer:
        subject = Subject(writer)
        number = subject.numbers[0]
        blocks = list(range(0, 2 * count, 2))
        if order == "descending":
            blocks.reverse()
        elif order == "random":
            choose.shuffle(blocks)
        scattered(subject, blocks)
        assert subject.deepest == (3 if order == "descending" else 2)
        subject.check()
        nodes = check_tree(writer, number, subject.models[number])
        if order == "ascending":
            assert nodes <= -(-count // 84) + 2, "files written in order fill their nodes"
        for _ in range(60):
            first = choose.randrange(2 * count)
            end = first + choose.choice([1, 2, 50, 600])
            choose.choice([subject.unmap, partial(subject.convert, unwritten=False),
                           partial(subject.convert, unwritten=True)])(number, first, end)
        subject.check()
        assert subject.most_edited < MOST_EDITED
        under_the_kernel(subject)
        subject.unmap(number, 0, 1 << 32)
        assert subject.most_edited < MOST_EDITED
        found = writer.inode(number)
        assert found.block[:12] == extentstore.empty_root()[:12] and found.sectors == 0, "no collapse"
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), size=0))
        writer.check()


def test_unmapping_from_the_front_and_the_middle(mounts: None) -> None:
    choose = seeded()
    with Writer(image("-t ext4 -b 1024 -O ^has_journal", 40 << 10), batch_blocks=1000) as writer:
        subject = Subject(writer)
        number = subject.numbers[0]
        scattered(subject, list(range(0, 2000, 2)))
        for first in range(0, 1000, 100):
            subject.unmap(number, first, first + choose.randrange(90, 110))
            subject.check()
        subject.unmap(number, 1500, 1501)
        subject.unmap(number, 1500, 1501)
        subject.unmap(number, 5000, 6000)
        subject.check()
        subject.unmap(number, 0, 1992)
        subject.check()
        assert writer.run(extents.root_of, writer.inode(number)).depth == 0
        under_the_kernel(subject)


# ---- lengths ---------------------------------------------------------------------------------------------------------

def runs_of(writer: Writer, number: int) -> list[tuple[int, int, bool]]:
    """(first, length, unwritten) of each extent, one after the other."""
    found, at, of = [], 0, writer.inode(number)
    while at < of.size // writer.block_bytes + 200000:
        run = writer.run(extents.find, of, at)
        if run.start is not None:
            found.append((run.file_block, run.length, run.unwritten))
        at = run.file_block + run.length
    return found


@pytest.fixture(scope="module")
def wide() -> Path:
    """An image of small blocks with a long stretch of free ones (groups 10 to 24 hold no metadata)."""
    return image("-t ext4 -b 1024 -O ^has_journal -N 512", 220 << 10)


@pytest.mark.parametrize("unwritten, most", [(False, 32768), (True, 32767)])
def test_neighbours_join_up_to_the_greatest_length(wide: Path, unwritten: bool, most: int) -> None:
    with Writer(wide) as writer:
        subject = Subject(writer)
        number, start = subject.numbers[0], int(writer.fs.geometry.first_block_of(10))
        total = 100000
        while len(subject.models[number]) < total:
            first = len(subject.models[number])
            subject.allocate(number, first, min(4000, total - first), unwritten=unwritten, goal=start + first)
        assert min(subject.models[number].values())[0] == start
        found = runs_of(writer, number)
        assert sum(length for _, length, _ in found) == total
        assert max(length for _, length, _ in found) <= most
        assert len(found) < 10
        subject.check()
        subject.convert(number, 0, total, unwritten=not unwritten)
        subject.check()
        assert max(length for _, length, _ in runs_of(writer, number)) <= (32767 if not unwritten else 32768)
        subject.convert(number, 17, total - 17, unwritten=unwritten)
        subject.check()
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), size=total << 10))
        writer.check()
        subject.unmap(number, 100, total - 100)
        subject.check()
        writer.check()


def test_single_extents_of_the_greatest_lengths(wide: Path) -> None:
    """32767 blocks are given at once at most: as many as one unwritten extent takes."""
    with Writer(wide) as writer:
        subject = Subject(writer)
        number, start = subject.numbers[0], int(writer.fs.geometry.first_block_of(10))
        writer.change(lambda tx: alloc.allocate(tx, start, 1))
        of = writer.inode(number)
        for first, length, unwritten in ((0, 32768, False), (40000, 32767, True)):
            run = Run(first, length, start + first, unwritten)
            writer.change(lambda tx, run=run: extentstore.insert(tx, tx.inode(number), run))
            assert writer.run(extents.find, writer.inode(number), first + 5) == run
        with pytest.raises((AssertionError, struct.error)):
            writer.change(lambda tx: extentstore.insert(tx, tx.inode(number), Run(90000, 32768, start, True)))
        writer.change(lambda tx: extentstore.convert(tx, tx.inode(number), 0, 40001, unwritten=True))
        assert runs_of(writer, number) == [(0, 32767, True), (32767, 1, True), (40000, 32767, True)]
        writer.change(lambda tx: extentstore.convert(tx, tx.inode(number), 0, 90000, unwritten=False))
        assert runs_of(writer, number) == [(0, 32768, False), (40000, 32767, False)]
        assert of.block != writer.inode(number).block


def test_a_full_leaf_of_longest_extents_can_be_made_unwritten(wide: Path) -> None:
    """Each of them becomes two: more than two nodes' worth of entries."""
    with Writer(wide) as writer:  # extents that overlap on the device, which nobody looks at here
        number = Subject(writer).numbers[0]
        full = 84

        def plant(tx: Transaction) -> None:
            of = tx.inode(number)
            for index in range(full + 6):
                of = extentstore.insert(tx, of, Run(index * 32769, 32768, 9000, False))

        writer.change(plant)
        at, end = 3, (full + 6) * 32769 - 3
        while at < end:
            _, at = writer.change(lambda tx, a=at: extentstore.convert(
                tx, tx.inode(number), a, (full + 6) * 32769 - 3, unwritten=True))
        of, at, lengths = writer.inode(number), 0, []
        while at < end + 3:
            run = writer.run(extents.find, of, at)
            if run.start is not None:
                lengths.append((run.length, run.unwritten))
            at = run.file_block + run.length
        whole = [(32767, True), (1, True)] * (full + 6)
        assert lengths == [(3, False), (32765, True), *whole[2:-2], (32766, True), (2, False)]
        check_tree(writer, number, {})


# ---- limits ----------------------------------------------------------------------------------------------------------

def test_the_last_block_of_the_largest_file() -> None:
    with Writer(image("-t ext4 -b 1024 -O ^has_journal", 8 << 10)) as writer:
        subject = Subject(writer)
        number, last = subject.numbers[0], (1 << 32) - 2
        subject.allocate(number, last, 100, unwritten=False)
        assert list(subject.models[number]) == [last]
        with pytest.raises(Refused) as caught:
            subject.allocate(number, last + 1, 1, unwritten=False)
        assert caught.value.errno == errno.EFBIG
        subject.check()
        subject.unmap(number, 0, 1 << 32)
        subject.check()


def test_a_root_without_children_is_corrupt() -> None:
    editor = Editor(image("-t ext4 -b 1024 -O ^has_journal", 4096))
    number = editor.number("lost+found")
    editor.put_inode(number, block=struct.pack("<HHHHI", extents.MAGIC, 0, 4, 1, 0))
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        for operation in (lambda tx, of: extentstore.insert(tx, of, Run(0, 1, 3000, False)),
                          lambda tx, of: extentstore.unmap(tx, of, 0, 100, 16),
                          lambda tx, of: extentstore.convert(tx, of, 0, 100, unwritten=False)):
            with pytest.raises(Corrupt) as caught:
                writer.change(lambda tx, operation=operation: operation(tx, tx.inode(number)))
            assert caught.value.check is Check.EXTENT_ENTRIES


def test_a_full_disk_leaves_the_tree_as_it_was() -> None:
    """Splitting needs a block that is not there: nothing happened."""
    with Writer(image("-t ext4 -b 1024 -O ^has_journal", 4096)) as writer:
        subject = Subject(writer)
        number = subject.numbers[0]
        for block in range(0, 8, 2):
            subject.allocate(number, block, 1, unwritten=False, goal=3000 + block)
        while True:
            try:
                writer.change(lambda tx: alloc.allocate(tx, 0, 500, reserve=True))
            except Refused:
                break
        before = writer.inode(number).raw
        for operation in (lambda tx, of: mapping.allocate(tx, of, 100, 1, unwritten=False, reserve=True),
                          lambda tx, of: extentstore.convert(tx, of, 2, 3, unwritten=True) and stop(of, tx)):
            with pytest.raises(Refused) as caught:
                writer.change(lambda tx, operation=operation: operation(tx, tx.inode(number)))
            assert caught.value.errno == errno.ENOSPC
        assert writer.inode(number).raw == before
        subject.unmap(number, 2, 3)
        subject.check()


def stop(_of: Inode, _tx: Transaction) -> None:
    raise Refused(errno.ENOSPC)


def test_long_extents_over_small_groups_are_freed_in_steps() -> None:
    """One extent may lie in 128 groups, each with a bitmap: sixteen of them would be more than a journal takes."""
    path = image("-t ext4 -b 1024 -g 256 -G 1024 -O ^has_journal,^resize_inode -N 64 -m 0", 96 << 10)
    with Writer(path) as writer:
        subject = Subject(writer)
        number, at = subject.numbers[0], 0
        while at < 70_000:
            subject.allocate(number, at, MAX_WRITTEN, unwritten=False)
            at = max(subject.models[number]) + 1
        assert len(runs_of(writer, number)) < 12
        subject.most_edited, steps = 0, 1
        while not subject.change(partial(mapping.unmap, first=0, end=at), number)[1]:
            steps += 1
        assert steps > 10 and subject.most_edited < 60
        assert not runs_of(writer, number)
        writer.check()
