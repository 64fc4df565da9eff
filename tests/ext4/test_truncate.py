"""Sizes, reserved room and holes, in steps that can be run again; the kernel says what is too large."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from fusewire.ext4 import inode, inodestore, iomap, iomapwrite, mapping, namestore, orphan, truncate
from fusewire.ext4.errors import Refused
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import Transaction
from tests import mounting
from tests.ext4.driver import image, new_path, seeded
from tests.ext4.writer import Writer

ROOT = Caller(0, 0)
FORMS = ["-t ext4 -b 1024", "-t ext4 -b 4096 -O ^orphan_file", "-t ext3 -b 1024", "-t ext2 -b 1024 -I 128"]


def new_file(writer: Writer, name: bytes = b"file") -> int:
    return int(writer.change(lambda tx: namestore.create(tx, tx.inode(2), name, 0o644, ROOT)).number)


def write(writer: Writer, number: int, pos: int, count: int) -> None:
    """Blocks for the bytes, written; the data themselves are left out."""
    at, end = pos, pos + count
    while at < end:
        _, found = writer.change(lambda tx, a=at: iomapwrite.begin(tx, tx.inode(number), a, end - a))
        stop = min(found.offset + found.length, end)
        writer.change(lambda tx, a=at, n=stop - at: iomapwrite.ioend(tx, tx.inode(number), a, n))
        at = stop


def mapped(writer: Writer, number: int) -> dict[int, bool]:
    """File block → whether it is unwritten."""
    of, at, found = writer.inode(number), 0, dict[int, bool]()
    while at < (1 << 20):
        run = writer.run(iomap.find, of, at)
        if run.start is not None:
            found.update(dict.fromkeys(range(run.file_block, run.file_block + run.length), run.unwritten))
        at = run.file_block + run.length
    return found


def cut(writer: Writer, number: int, size: int) -> int:
    """Set a size and free what lies behind; how many transactions that took."""
    writer.change(lambda tx: truncate.set_size(tx, tx.inode(number), size))
    steps = 1
    while not writer.change(lambda tx: truncate.shrink(tx, tx.inode(number)))[1]:
        steps += 1
    return steps


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_being_cut_is_an_orphan_until_the_end(form: str) -> None:
    with Writer(image(form, 16 << 10)) as writer:
        number, block = new_file(writer), writer.block_bytes
        for at in range(0, 100, 2):
            write(writer, number, at * block, 1)
        writer.check()
        writer.change(lambda tx: truncate.set_size(tx, tx.inode(number), 0))
        assert writer.run(orphan.numbers) == [number]
        seen = 0
        while not writer.change(lambda tx: truncate.shrink(tx, tx.inode(number)))[1]:
            assert writer.run(orphan.numbers) == [number]
            seen += 1
        assert seen >= 2, "one transaction freed it all"
        assert writer.run(orphan.numbers) == []
        found = writer.inode(number)
        assert found.size == found.sectors == 0
        writer.change(lambda tx: truncate.shrink(tx, tx.inode(number)))
        writer.check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("second", [0, 1])
def test_a_file_that_is_cut_again_while_its_tail_is_cleared_stays_an_orphan(form: str, second: int) -> None:
    with Writer(image(form, 16 << 10)) as writer:
        number, block = new_file(writer), writer.block_bytes
        for at in range(0, 100, 2):
            write(writer, number, at * block, block)
        assert writer.fs.writing is not None
        cuts = writer.fs.writing.cuts
        cut(writer, number, 98 * block + 1)
        assert writer.run(orphan.numbers) == [number]
        cuts.remove(number)     # as when clearing has begun
        writer.change(lambda tx: truncate.set_size(tx, tx.inode(number), second))
        assert not writer.change(lambda tx: truncate.shrink(tx, tx.inode(number)))[1], "all was freed at once"
        writer.change(lambda tx: truncate.cleared(tx, tx.inode(number)))
        writer.commit()
        assert writer.run(orphan.numbers) == [number]
        while not writer.change(lambda tx: truncate.shrink(tx, tx.inode(number)))[1]:
            pass
        assert writer.run(orphan.numbers) == ([number] if second else [])
        writer.settle()
        assert writer.run(orphan.numbers) == []
        writer.check()


@pytest.mark.parametrize("form", FORMS)
def test_every_step_can_be_run_again(form: str) -> None:
    """Random sizes, holes and reservations, each step twice, against a dictionary."""
    choose = seeded()
    with Writer(image(form, 16 << 10), batch_blocks=50) as writer:
        number, block = new_file(writer), writer.block_bytes
        model: dict[int, bool] = {}
        size = 0
        for _ in range(60):
            pos, count = choose.randrange(300 * block), choose.randrange(1, 40 * block)
            kind = choose.choice(["write", "write", "size", "punch", "reserve", "zero"])
            if kind in ("reserve", "zero") and "ext4" not in form:
                continue
            for _ in range(2):
                apply(writer, number, kind, pos, count)
            size = expect(model, kind, pos, count, size, block)
            assert mapped(writer, number) == model, kind
            assert writer.inode(number).size == size
        cut(writer, number, size)
        writer.check()


def apply(writer: Writer, number: int, kind: str, pos: int, count: int) -> None:
    if kind == "write":
        write(writer, number, pos, count)
    elif kind == "size":
        cut(writer, number, pos)
    elif kind == "punch":
        while not writer.change(lambda tx: truncate.punch(tx, tx.inode(number), pos, count))[1]:
            pass
    else:
        step = truncate.reserve if kind == "reserve" else truncate.make_unwritten
        reached, end = pos, pos + count
        while reached < end:
            before = reached
            _, reached = writer.change(lambda tx, at=before: step(tx, tx.inode(number), at, end - at))
            assert before < reached <= end


def expect(model: dict[int, bool], kind: str, pos: int, count: int, size: int, block: int) -> int:
    """Do to the model what ``apply`` does; the size then."""
    inside = range(-(-pos // block), (pos + count) // block)
    touched = range(pos // block, -(-(pos + count) // block))
    if kind == "write":
        model.update(dict.fromkeys(touched, False))
        return max(size, pos + count)
    if kind == "size":
        for at in [at for at in model if at >= -(-pos // block)]:
            del model[at]
        return pos
    if kind == "punch":
        for at in inside:
            model.pop(at, None)
    elif kind == "reserve":
        for at in touched:
            model.setdefault(at, True)
    else:
        model.update({at: True for at in inside if at in model})
    return size


@pytest.mark.parametrize("form", FORMS)
def test_growing_and_shrinking_under_the_kernel(mounts: None, form: str) -> None:
    choose = random.Random(form)
    with Writer(image(form, 16 << 10)) as writer:
        sizes = {}
        for at in range(12):
            number = new_file(writer, b"%d" % at)
            write(writer, number, choose.randrange(20000), choose.randrange(1, 90000))
            sizes[at] = choose.choice([0, 1, 1023, 1024, 4096, 50000, 1 << 20])
            cut(writer, number, sizes[at])
        writer.check()
        with mounting.kernel_mount(writer.path) as mount:
            for at, size in sizes.items():
                assert (mount.root / str(at)).stat().st_size == size
                assert len((mount.root / str(at)).read_bytes()) == size


def test_reserving_passes_what_is_there_in_bounded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncate, "RUNS_AT_ONCE", 4)
    with Writer(image("-t ext4 -b 1024", 16 << 10)) as writer:
        number = new_file(writer)
        for at in range(0, 40, 2):
            writer.change(lambda tx, at=at: mapping.allocate(tx, tx.inode(number), at, 1, unwritten=False,
                                                             goal=6000 + at))
            writer.change(lambda tx, at=at: mapping.allocate(tx, tx.inode(number), at + 1, 1, unwritten=False,
                                                             goal=9000 + at))
        _, reached = writer.change(lambda tx: truncate.reserve(tx, tx.inode(number), 0, 40 << 10))
        assert 0 < reached < 40 << 10
        apply(writer, number, "reserve", 0, 50 << 10)
        assert len(mapped(writer, number)) == 50


def test_files_without_extents_have_nothing_unwritten() -> None:
    with Writer(image("-t ext3 -b 1024", 4096)) as writer:
        number = new_file(writer)
        for step in (truncate.reserve, truncate.make_unwritten):
            with pytest.raises(Refused) as caught:
                writer.change(lambda tx, step=step: step(tx, tx.inode(number), 0, 5000))
            assert caught.value.errno == errno.EOPNOTSUPP


def test_unlinked_files_are_no_second_time_orphans() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = int(writer.change(lambda tx: namestore.tmpfile(tx, tx.inode(2), 0o600, ROOT)).number)
        write(writer, number, 0, 5000)
        cut(writer, number, 100)
        assert writer.run(orphan.numbers) == [number]


# ---- how large a file can be -----------------------------------------------------------------------------------------

LIMITS = ["-t ext4 -b 1024", "-t ext4 -b 2048", "-t ext4 -b 4096", "-t ext4 -b 1024 -O ^huge_file",
          "-t ext4 -b 4096 -O ^huge_file", "-t ext3 -b 1024", "-t ext3 -b 2048", "-t ext3 -b 4096",
          "-t ext3 -b 1024 -O huge_file", "-t ext3 -b 2048 -O huge_file", "-t ext3 -b 4096 -O huge_file"]


def refused_by_kernel(path: Path, size: int) -> bool:
    with (path / "file").open("r+b") as file:
        try:
            os.truncate(file.fileno(), size)
        except OSError as error:
            assert error.errno == errno.EFBIG
            return True
        os.truncate(file.fileno(), 0)
    return False


@pytest.mark.parametrize("form", LIMITS)
def test_the_largest_file_is_the_kernels(mounts: None, form: str) -> None:
    with Writer(image(form, 4096)) as writer:
        number = new_file(writer)
        of = writer.inode(number)
        most = writer.fs.max_file_bytes(of)
        assert writer.change(lambda tx: truncate.set_size(tx, tx.inode(number), most)).size == most
        for refused in (lambda tx: truncate.set_size(tx, tx.inode(number), most + 1),
                        lambda tx: iomapwrite.begin(tx, tx.inode(number), most, 1),
                        lambda tx: iomapwrite.ioend(tx, tx.inode(number), most - 5, 6),
                        lambda tx: mapping.allocate(tx, tx.inode(number), most // writer.block_bytes, 1,
                                                    unwritten=False)):
            with pytest.raises(Refused) as caught:
                writer.change(refused)
            assert caught.value.errno == errno.EFBIG
        if of.has_extents:
            with pytest.raises(Refused) as caught:
                writer.change(lambda tx: truncate.reserve(tx, tx.inode(number), most - 10, 11))
            assert caught.value.errno == errno.EFBIG
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), size=0))
        write(writer, number, most - 3000, 3000)
        assert writer.inode(number).size == most
        cut(writer, number, 0)
        writer.check()
        copy = new_path()
        copy.write_bytes(writer.path.read_bytes())
        with mounting.kernel_mount(copy, "rw,noatime") as mount:
            assert not refused_by_kernel(mount.root, most)
            assert refused_by_kernel(mount.root, most + 1)


def test_sizes_of_inodes_that_are_no_files_stay() -> None:
    """A transaction that sets a size twice ends with the last."""
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = new_file(writer)

        def twice(tx: Transaction) -> inode.Inode:
            return truncate.set_size(tx, truncate.set_size(tx, tx.inode(number), 5000), 100)

        assert writer.change(twice).size == 100
        assert writer.run(orphan.numbers) == [number]
        assert cut(writer, number, 100) == 1
        writer.check()


@pytest.mark.parametrize(("form", "most"), [("-t ext4", 1 << 64), ("-t ext3 -I 128", 1 << 32)])
def test_a_new_size_is_a_new_version_and_versions_wrap_around(form: str, most: int) -> None:
    with Writer(image(f"{form} -b 1024 -O ^has_journal", 4096)) as writer:
        number = writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"file", 0o644, Caller(0, 0))).number
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), version=most - 2))
        versions = []
        for size in (1000, 1000, 5000, 0):
            writer.change(lambda tx, size=size: truncate.set_size(tx, tx.inode(number), size))
            versions.append(writer.inode(number).version)
        assert versions == [most - 1, most - 1, 0, 1]
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), version=most - 1))
        writer.change(lambda tx: namestore.unlink(tx, tx.inode(2), b"file"))
        writer.commit()
