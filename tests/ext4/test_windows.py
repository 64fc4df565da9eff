"""Files that grow in turn lie in few pieces; what is kept for them is there for others when nothing else is."""

from __future__ import annotations

import errno

import pytest

from fusewire.ext4 import alloc, batch, inodefree, iomap, iomapwrite, namestore, truncate
from fusewire.ext4.batch import Windows
from fusewire.ext4.errors import Refused
from fusewire.ext4.newinode import Caller
from tests.ext4.driver import image, seeded
from tests.ext4.writer import Writer

ROOT = Caller(0, 0)
FORMS = ["-t ext4 -b 1024", "-t ext4 -b 4096", "-t ext3 -b 4096"]
KIB = 1024


def new_file(writer: Writer, name: bytes) -> int:
    return int(writer.change(lambda tx: namestore.create(tx, tx.inode(2), name, 0o644, ROOT)).number)


def append(writer: Writer, number: int, count: int) -> None:
    """As ``write``, at the end."""
    write(writer, number, writer.inode(number).size, count)


def write(writer: Writer, number: int, at: int, count: int) -> None:
    """Blocks for so many bytes, written; the data themselves are left out."""
    end = at + count
    while at < end:
        _, found = writer.change(lambda tx, a=at: iomapwrite.begin(tx, tx.inode(number), a, end - a))
        stop = min(found.offset + found.length, end)
        writer.change(lambda tx, a=at, n=stop - at: iomapwrite.ioend(tx, tx.inode(number), a, n))
        at = stop


def pieces(writer: Writer, number: int) -> int:
    """Runs of neighbouring blocks, wherever the map of them is cut."""
    of, at, count, follows = writer.inode(number), 0, 0, -1
    while at < writer.fs.geometry.blocks_for(of.size):
        run = writer.run(iomap.find, of, at)
        assert run.start is not None
        start = run.start + at - run.file_block
        count += start != follows
        at = run.file_block + run.length
        follows = start + at - run.file_block if start == run.start else run.start + run.length
    return count


def kept(writer: Writer) -> Windows:
    assert writer.fs.writing is not None
    return writer.fs.writing.windows


@pytest.mark.parametrize("form", FORMS)
def test_files_that_grow_in_turn_do_not_mingle(form: str) -> None:
    choose = seeded()
    with Writer(image(form, 64 * KIB)) as writer:
        numbers = [new_file(writer, b"%d" % n) for n in range(5)]
        for _ in range(150):
            append(writer, choose.choice(numbers), choose.choice([4, 4, 16, 64]) * KIB)
        pointers = 0 if "ext4" in form else 2    # pieces that pointer blocks cut off
        for number in numbers:
            assert pieces(writer, number) <= 8 + pointers, [pieces(writer, each) for each in numbers]
        writer.check()


@pytest.mark.parametrize("form", FORMS)
def test_holes_are_filled_where_there_was_room_left_for_them(form: str) -> None:
    choose = seeded()
    with Writer(image(form, 64 * KIB)) as writer:
        number = new_file(writer, b"file")
        for at in [0, *range(1, 64, 2), *choose.sample(range(2, 64, 2), 31)]:
            write(writer, number, at * 16 * KIB, 16 * KIB)
        assert pieces(writer, number) <= 16     # nodes of the tree stand in some of it
        writer.check()


def test_small_files_lie_side_by_side() -> None:
    with Writer(image("-t ext4 -b 1024", 16 * KIB)) as writer:
        places = []
        for n in range(20):
            number = new_file(writer, b"%d" % n)
            append(writer, number, 10 * KIB)
            places.append(writer.run(iomap.find, writer.inode(number), 0).start)
        assert places == list(range(places[0], places[0] + 200, 10))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_is_given_out_before_the_disk_is_full(form: str) -> None:
    with Writer(image(form, 32 * KIB)) as writer:
        for n in range(10):
            number = new_file(writer, b"%d" % n)
            append(writer, number, 4 * KIB)
            append(writer, number, 300 * KIB)
        assert kept(writer)._runs
        writer.settle()     # else what was freed would have to be durable first
        writing = writer.fs.writing
        assert writing is not None
        ratio, free = writer.fs.geometry.cluster_blocks, writing.free_clusters
        taken = 0
        with pytest.raises(Refused) as caught:
            while True:
                taken += writer.change(lambda tx: alloc.allocate(tx, 0, 500, reserve=True)).length // ratio
        assert caught.value.errno == errno.ENOSPC
        assert taken == free and not writing.free_clusters and not kept(writer)._runs


def test_nothing_is_kept_on_a_disk_that_is_almost_full() -> None:
    with Writer(image("-t ext4 -b 1024", 16 * KIB)) as writer:
        writing = writer.fs.writing
        assert writing is not None
        number = new_file(writer, b"file")
        append(writer, number, 100 * KIB)
        append(writer, number, 100 * KIB)
        assert kept(writer)._runs
        writer.change(lambda tx: alloc.allocate(tx, 0, 7000))
        while writing.free_clusters > 900:
            writer.change(lambda tx: alloc.allocate(tx, 0, writing.free_clusters - 900, reserve=True))
        append(writer, number, 100 * KIB)
        assert not kept(writer)._runs


def test_nothing_is_kept_for_files_that_shrink_or_go() -> None:
    with Writer(image("-t ext4 -b 1024", 32 * KIB)) as writer:
        for cut in (True, False):
            number = new_file(writer, b"%d" % cut)
            append(writer, number, 300 * KIB)
            assert list(kept(writer)._runs) == [number]
            if cut:
                writer.change(lambda tx, n=number: truncate.set_size(tx, tx.inode(n), 100 * KIB))
                writer.change(lambda tx, n=number: truncate.shrink(tx, tx.inode(n)))
            else:
                writer.change(lambda tx: namestore.unlink(tx, tx.inode(2), b"0"))
                while not writer.change(lambda tx, n=number: inodefree.release(tx, tx.inode(n))):
                    pass
            assert not kept(writer)._runs
        writer.check()


def test_the_files_that_something_is_kept_for_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a dictionary of sets: the masks are those of the runs that are there."""
    monkeypatch.setattr(batch, "MOST_WINDOWS", 4)
    choose, windows = seeded(), Windows(100)
    model: dict[int, range] = {}
    for _ in range(500):
        number = choose.randrange(1, 8)
        if choose.random() < 0.7:
            first = number * 300 + choose.randrange(150)
            count = choose.choice([0, 1, 5, 149])
            windows.put(number, first, count)
            model.pop(number, None)
            if count:
                if len(model) == 4:
                    del model[next(iter(model))]
                model[number] = range(first, first + count)
        else:
            windows.drop(number)
            model.pop(number, None)
        owner = choose.randrange(1, 8)
        for group in range(27):
            inside = {at - group * 100 for file, run in model.items() if file != owner
                      for at in run if at // 100 == group}
            assert windows.mask(group, owner) == sum(1 << bit for bit in inside)
    windows.clear()
    assert not any(windows.mask(group, 0) for group in range(27))
