"""Changing block maps, through all three levels of pointer blocks, against a dictionary; the kernel reads the files."""

from __future__ import annotations

import errno
from functools import partial

import pytest

from fusewire.ext4 import alloc, iomap, mapping, mapstore, namestore
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import Transaction
from tests.ext4.driver import Editor, image, new_path, seeded
from tests.ext4.test_extentstore import MOST_EDITED, Model, Subject, under_the_kernel
from tests.ext4.writer import Writer

ROOT = Caller(0, 0)
FORMS = ["-t ext3 -b 1024", "-t ext2 -b 1024 -I 128", "-t ext3 -b 4096",
         "-t ext4 -b 2048 -O ^extent,^has_journal,^64bit"]
DIRECT = 12


class Mapped(Subject):
    """Files whose inodes map by pointers."""

    def check(self) -> None:
        for number in self.numbers:
            model, of = self.models[number], self.writer.inode(number)
            assert self.mapped_by_pointers(number) == model
            pointers = self.pointer_blocks(number)
            assert of.sectors == (len(model) + pointers) * self.writer.block_bytes // 512

    def mapped_by_pointers(self, number: int) -> Model:
        found: Model = {}
        of, at, end = self.writer.inode(number), 0, self.largest()
        while at < end:
            run = self.writer.run(iomap.find, of, at)
            if run.start is not None:
                found.update((run.file_block + step, (run.start + step, False)) for step in range(run.length))
            at = run.file_block + run.length
        return found

    def largest(self) -> int:
        pointers = self.writer.block_bytes // 4
        return DIRECT + pointers + pointers ** 2 + pointers ** 3

    def pointer_blocks(self, number: int) -> int:
        """How many pointer blocks the mapped blocks need: no more may be there."""
        pointers, needed = self.writer.block_bytes // 4, set[tuple[int, ...]]()
        for block in self.models[number]:
            rest = block - DIRECT
            for level in range(1, 4):
                if rest < 0:
                    break
                if rest < pointers ** level:
                    needed |= {(level, power, rest // pointers ** power) for power in range(1, level + 1)}
                    break
                rest -= pointers ** level
        return len(needed)


def places(writer: Writer) -> list[int]:
    """File blocks around every border of the map."""
    pointers = writer.block_bytes // 4
    borders = [0, DIRECT, DIRECT + pointers, DIRECT + 2 * pointers, DIRECT + pointers + pointers ** 2,
               DIRECT + 2 * pointers + pointers ** 2, DIRECT + pointers + 2 * pointers ** 2,
               DIRECT + pointers + pointers ** 2 + pointers ** 3 - 40]
    return [min(border, limit(writer) - 400) for border in borders]


def limit(writer: Writer) -> int:
    """Blocks of the largest file."""
    return int(writer.fs._largest[False] >> writer.fs.geometry.block_bits)


@pytest.mark.parametrize("form", FORMS)
def test_random_changes_against_a_dictionary(mounts: None, form: str) -> None:
    choose = seeded()
    with Writer(image(form, 32 << 10), batch_blocks=300) as writer:
        subject = Mapped(writer, 3)
        for step in range(700):
            number = choose.choice(subject.numbers)
            first = max(choose.choice(places(writer)) + choose.randrange(-30, 300), 0)
            count = choose.choice([1, 1, 2, 3, 10, 100])
            if choose.random() < 0.6:
                goal = choose.choice([None, choose.randrange(writer.fs.geometry.blocks)])
                subject.allocate(number, first, count, unwritten=False, goal=goal)
            else:
                end = first + choose.choice([1, 2, 20, 300, 70000])
                subject.unmap(number, first, end)
            if step % 350 == 349:
                subject.check()
                writer.commit()
        assert subject.most_edited < MOST_EDITED
        under_the_kernel(subject)


def test_unmapping_everything_leaves_an_empty_map() -> None:
    with Writer(image("-t ext3 -b 1024", 32 << 10), batch_blocks=300) as writer:
        subject = Mapped(writer)
        number = subject.numbers[0]
        for place in places(writer):
            for at in range(place, place + 8, 2):
                subject.allocate(number, at, 1, unwritten=False, goal=9000 + at % 5000)
        subject.allocate(number, 1000, 5000, unwritten=False)
        subject.check()
        subject.unmap(number, 0, 1 << 32)
        assert subject.most_edited < MOST_EDITED
        found = writer.inode(number)
        assert found.block == bytes(60) and found.sectors == 0
        writer.check()


def test_beyond_the_largest_file_there_is_nothing() -> None:
    with Writer(image("-t ext3 -b 1024", 4096)) as writer:
        subject = Mapped(writer)
        number, largest = subject.numbers[0], limit(writer)
        subject.allocate(number, largest - 1, 5, unwritten=False)
        assert list(subject.models[number]) == [largest - 1]
        for at in (largest, largest + 5, 1 << 31):
            with pytest.raises(Refused) as caught:
                subject.change(partial(mapstore.insert, file_block=at, start=3000, count=1), number)
            assert caught.value.errno == errno.EFBIG
            with pytest.raises(Refused):
                subject.allocate(number, at, 1, unwritten=False)
        subject.unmap(number, largest - 1, 1 << 40)
        subject.check()


def test_blocks_that_32_bits_cannot_name_are_not_taken() -> None:
    with Writer(image("-t ext3 -b 1024", 4096)) as writer:
        number = Mapped(writer).numbers[0]
        for start, count in ((1 << 32, 1), ((1 << 32) - 1, 2)):
            with pytest.raises(Refused) as caught:
                writer.change(lambda tx, s=start, n=count: mapstore.insert(tx, tx.inode(number), 0, s, n))
            assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("pointer", [1, 4096, 1 << 31])
def test_pointers_to_nowhere_are_corrupt(pointer: int) -> None:
    editor = Editor(image("-t ext2 -b 1024 -I 128", 4096))
    number = editor.number("lost+found")
    words = bytearray(editor.core.inode(number).block)
    words[48:52] = pointer.to_bytes(4, "little")
    editor.put_inode(number, block=bytes(words))
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        for operation in (lambda tx, of: mapstore.insert(tx, of, 20, 3000, 1),
                          lambda tx, of: mapstore.unmap(tx, of, 12, 100, 16)):
            with pytest.raises(Corrupt) as caught:
                writer.change(lambda tx, operation=operation: operation(tx, tx.inode(number)))
            assert caught.value.check is Check.BLOCKMAP_RANGE


def test_a_full_disk_leaves_the_map_as_it_was() -> None:
    with Writer(image("-t ext2 -b 1024", 2048)) as writer:
        subject = Mapped(writer)
        number = subject.numbers[0]
        subject.allocate(number, 0, 12, unwritten=False)
        while True:
            try:
                run = writer.change(lambda tx: alloc.allocate(tx, 0, 100))
            except Refused:
                break
        writer.change(lambda tx: alloc.free(tx, run.start, 1))
        writer.commit()
        before = writer.inode(number).raw

        def through_three_levels(tx: Transaction) -> None:
            mapping.allocate(tx, tx.inode(number), 70000, 1, unwritten=False)

        with pytest.raises(Refused) as caught:
            writer.change(through_three_levels)
        assert caught.value.errno == errno.ENOSPC and writer.inode(number).raw == before
        subject.check()


def test_directories_and_data_of_one_image_stay_apart(mounts: None) -> None:
    """Blocks that names, data and pointers take from each other in turns."""
    choose = seeded()
    with Writer(image("-t ext3 -b 1024 -N 400", 6 << 10), batch_blocks=60) as writer:
        subject = Mapped(writer, 2)
        for step in range(120):
            writer.change(lambda tx, n=step: namestore.create(tx, tx.inode(2), b"name %d" % n * 9, 0o644, ROOT))
            subject.allocate(subject.numbers[0], step * 3, 2, unwritten=False)
            subject.allocate(subject.numbers[1], choose.randrange(70000), 2, unwritten=False)
        subject.check()
        under_the_kernel(subject)
