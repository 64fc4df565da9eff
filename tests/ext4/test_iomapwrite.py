"""Writing by mappings: what was on the device before is never shown, steps can be run again, and a full disk takes as
many bytes as the kernel's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fusewire.ext4 import alloc, extents, inodestore, iomap, iomapwrite, mapping, namestore, truncate
from fusewire.ext4.errors import Refused
from fusewire.ext4.inode import FLAG_IMMUTABLE
from fusewire.ext4.iomap import HOLE, MAPPED, UNWRITTEN, Mapping
from fusewire.ext4.iomapwrite import DIRTY, NEW, OP_OVERWRITE_ONLY, OP_ZERO
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import Transaction
from tests import mounting
from tests.ext4.driver import image, new_path, seeded
from tests.ext4.writer import Writer

ROOT = Caller(0, 0)
FORMS = ["-t ext4 -b 1024", "-t ext4 -b 4096", "-t ext3 -b 1024", "-t ext2 -b 4096 -I 128"]


def new_file(writer: Writer, name: bytes = b"file") -> int:
    return int(writer.change(lambda tx: namestore.create(tx, tx.inode(2), name, 0o666, ROOT)).number)


class Mover:
    """Moves data as whoever obeys the contract: zeroes around data in fresh blocks, and behind the end of the file."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.device = os.open(writer.path, os.O_RDWR)

    def close(self) -> None:
        os.close(self.device)

    def begin(self, number: int, pos: int, count: int, op: int = iomapwrite.OP_WRITE) -> Mapping:
        return self.writer.change(lambda tx: iomapwrite.begin(tx, tx.inode(number), pos, count, op))[1]

    def write(self, number: int, pos: int, data: bytes, *, finish: bool = True) -> None:
        writer, at = self.writer, pos
        of = writer.inode(number)
        if pos > of.size:
            self.clear(number)
        while at < pos + len(data):
            found = self.begin(number, at, pos + len(data) - at)
            assert found.offset <= at < found.offset + found.length
            piece = data[at - pos:found.offset + found.length - pos]
            address, block = found.addr + at - found.offset, writer.block_bytes
            before, behind = (at % block, -(at + len(piece)) % block)
            if found.type == UNWRITTEN or found.flags & NEW:
                os.pwrite(self.device, bytes(before) + piece + bytes(behind), address - before)
            else:
                assert found.type == MAPPED
                os.pwrite(self.device, piece, address)
            if finish:
                self.finish(number, at, len(piece))
            at += len(piece)

    def finish(self, number: int, pos: int, count: int) -> None:
        for _ in range(2):  # doing it again changes nothing
            self.writer.change(lambda tx: iomapwrite.ioend(tx, tx.inode(number), pos, count))

    def clear(self, number: int) -> None:
        tail = self.writer.change(lambda tx: iomapwrite.tail_to_clear(tx, tx.inode(number)))
        if tail is not None:
            os.pwrite(self.device, bytes(tail[1]), tail[0])

    def resize(self, number: int, size: int) -> None:
        if size > self.writer.inode(number).size:
            self.clear(number)
        self.writer.change(lambda tx: truncate.set_size(tx, tx.inode(number), size))
        while not self.writer.change(lambda tx: truncate.shrink(tx, tx.inode(number)))[1]:
            pass


def dirty(path: Path) -> Path:
    """A copy whose free blocks hold what nobody may see."""
    copy = new_path()
    copy.write_bytes(path.read_bytes())
    with Writer(copy, copy=False) as writer, copy.open("r+b") as device:
        for number in range(writer.fs.geometry.groups):
            base = writer.fs.geometry.first_block_of(number)
            unused = writer.change(lambda tx, n=number: alloc.free_bits(tx, n))
            for bit in range(unused.bit_length()):
                if unused >> bit & 1:
                    device.seek((base + bit) * writer.block_bytes)
                    device.write(b"\xee" * writer.block_bytes)
    return copy


@pytest.mark.parametrize("form", FORMS)
def test_random_writes_read_back_by_us_and_the_kernel(mounts: None, form: str) -> None:
    choose = seeded()
    with Writer(dirty(image(form, 16 << 10)), copy=False, batch_blocks=80) as writer:
        mover = Mover(writer)
        numbers = [new_file(writer, b"%d" % n) for n in range(3)]
        models = {number: bytearray() for number in numbers}
        for step in range(150):
            number = choose.choice(numbers)
            model = models[number]
            pos, count = choose.randrange(100000), choose.choice([1, 100, 1024, 5000, 30000])
            if choose.random() < 0.75:
                data = choose.randbytes(count)
                mover.write(number, pos, data)
                model.extend(bytes(max(pos + count - len(model), 0)))
                model[pos:pos + count] = data
            else:
                mover.resize(number, pos)
                del model[pos:]
                model.extend(bytes(pos - len(model)))
            if step % 15 == 0:
                assert writer.content(writer.inode(number)) == bytes(model), step
        mover.close()
        writer.check()
        with mounting.kernel_mount(writer.path) as mount:
            for at, number in enumerate(numbers):
                assert (mount.root / str(at)).read_bytes() == bytes(models[number])


def test_fresh_blocks_read_as_zeroes_until_their_data_are_there() -> None:
    with Writer(dirty(image("-t ext4 -b 1024", 8 << 10)), copy=False) as writer:
        number, mover = new_file(writer), Mover(writer)
        mover.write(number, 0, b"a" * 3000)
        mover.write(number, 3000, b"b" * 5000, finish=False)
        assert writer.inode(number).size == 3000
        assert writer.content(writer.inode(number)) == b"a" * 3000
        writer.change(lambda tx: truncate.set_size(tx, tx.inode(number), 9000))
        assert writer.content(writer.inode(number))[3072:] == bytes(9000 - 3072)
        mover.finish(number, 3000, 5000)
        assert writer.content(writer.inode(number)) == b"a" * 3000 + b"b" * 5000 + bytes(1000)
        mover.close()
        writer.check()


@pytest.mark.parametrize("form", FORMS)
def test_begin_gives_the_same_again(form: str) -> None:
    with Writer(image(form, 8 << 10)) as writer:
        number, block = new_file(writer), writer.block_bytes
        mover = Mover(writer)
        first = mover.begin(number, 5 * block + 7, 3 * block)
        assert first.offset == 5 * block and first.length == 4 * block and first.flags & DIRTY
        assert bool(first.flags & NEW) == ("ext4" not in form)
        again = mover.begin(number, 5 * block + 7, 3 * block)
        assert again[:3] == first[:3] and again.type == first.type
        assert not again.flags & DIRTY
        mover.finish(number, 5 * block + 7, 3 * block)
        assert mover.begin(number, 5 * block, 1).type == MAPPED
        assert writer.inode(number).size == 8 * block + 7
        mover.close()


@pytest.mark.parametrize("form", FORMS)
def test_who_writes_before_the_transaction_applies_needs_no_unwritten_blocks(form: str) -> None:
    with Writer(image(form, 8 << 10)) as writer:
        number, block = new_file(writer), writer.block_bytes

        def at_once(tx: Transaction) -> Mapping:
            of, found = iomapwrite.begin(tx, tx.inode(number), 0, 2 * block, unwritten=False)
            iomapwrite.ioend(tx, of, 0, 2 * block)
            return found

        found = writer.change(at_once)
        assert found.type == MAPPED and found.flags & NEW and found.length == 2 * block
        assert writer.inode(number).size == 2 * block
        assert writer.run(iomap.begin, writer.inode(number), 0, 2 * block).type == MAPPED


@pytest.mark.parametrize("form", FORMS)
def test_what_the_flags_ask_for(form: str) -> None:
    with Writer(image(form, 8 << 10)) as writer:
        number, block = new_file(writer), writer.block_bytes
        mover = Mover(writer)
        assert mover.begin(number, 5000, 10, OP_ZERO).type == HOLE
        assert writer.inode(number).sectors == 0
        for pos in (0, 5 * block):
            with pytest.raises(Refused) as caught:
                mover.begin(number, pos, 10, iomapwrite.OP_WRITE | OP_OVERWRITE_ONLY)
            assert caught.value.errno == errno.EAGAIN
        mover.write(number, 0, b"x" * block)
        assert mover.begin(number, 0, 10, iomapwrite.OP_WRITE | OP_OVERWRITE_ONLY).type == MAPPED
        assert mover.begin(number, 0, 0).type == MAPPED
        assert mover.begin(number, 9 * block, 0).length == block
        mover.close()


def test_large_requests_get_few_extents() -> None:
    with Writer(image("-t ext4 -b 1024", 64 << 10)) as writer:
        number, mover = new_file(writer), Mover(writer)
        position, pieces = 0, 0
        while position < 30 << 20:
            found = mover.begin(number, position, (30 << 20) - position)
            position, pieces = found.offset + found.length, pieces + 1
        assert pieces <= 6
        mover.finish(number, 0, 30 << 20)
        assert writer.run(extents.root_of, writer.inode(number)).depth <= 1
        mover.close()
        writer.check()


def test_ioend_leaves_holes_alone_and_grows_only() -> None:
    with Writer(image("-t ext4 -b 1024", 8 << 10)) as writer:
        number, mover = new_file(writer), Mover(writer)
        for block in range(0, 10, 2):
            mover.begin(number, block << 10, 1024)
        writer.change(lambda tx: mapping.unmap(tx, tx.inode(number), 4, 5))
        mover.finish(number, 0, 10 << 10)
        found = writer.inode(number)
        kinds = [writer.run(iomap.find, found, block) for block in range(10)]
        assert [run.start is not None for run in kinds] == [n % 2 == 0 and n != 4 for n in range(10)]
        assert not any(run.unwritten for run in kinds) and found.size == 10 << 10
        mover.finish(number, 0, 100)
        mover.finish(number, 0, 0)
        mover.finish(number, 50, -3)
        assert writer.inode(number).size == 10 << 10
        with pytest.raises(Refused):
            mover.finish(number, -5, 100)
        assert writer.fs.writing is not None and writer.fs.writing.batch.wrote_data
        mover.close()


def test_what_stands_behind_the_end_of_a_file() -> None:
    with Writer(image("-t ext4 -b 1024", 8 << 10)) as writer:
        number, mover = new_file(writer), Mover(writer)
        mover.write(number, 0, b"x" * 2500)
        tail = writer.run(lambda fs: iomapwrite.tail_to_clear(fs, fs.inode(number)))
        start = writer.run(iomap.find, writer.inode(number), 2)
        assert start.start is not None and tail is not None
        assert tail == ((start.start + 2 - start.file_block) * 1024 + 452, 572)
        mover.begin(number, 8 << 10, 1024)
        for size in (3072, 5000, (8 << 10) + 5, 1 << 30, 1024, 0):
            writer.change(lambda tx, s=size: truncate.set_size(tx, tx.inode(number), s))
            assert writer.run(lambda fs: iomapwrite.tail_to_clear(fs, fs.inode(number))) is None
        mover.close()


def test_immutable_files_are_not_written() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = new_file(writer)
        iomapwrite.check_writable(writer.inode(number))
        made = writer.change(lambda tx: inodestore.change(tx, tx.inode(number), flags=FLAG_IMMUTABLE | 0x80000))
        with pytest.raises(Refused) as caught:
            iomapwrite.check_writable(made)
        assert caught.value.errno == errno.EPERM


# ---- a full disk -----------------------------------------------------------------------------------------------------

PIECE = 64 << 10


def written_by_kernel(path: Path, user: bool, stride: int) -> tuple[int, int]:
    """Bytes that a caller could write to a file before ENOSPC, and bytes that it takes with its metadata.

    With a ``stride`` there are holes between them."""
    reader, writer = os.pipe()
    with mounting.kernel_mount(path, "rw,noatime") as mount:
        descriptor = os.open(mount.root / "file", os.O_CREAT | os.O_RDWR | (os.O_SYNC if stride else 0), 0o666)
        child = os.fork()
        if not child:
            try:
                if user:
                    os.setresgid(1000, 1000, 1000)
                    os.setresuid(1000, 1000, 1000)
                os.write(writer, b"%d" % write_until_full(descriptor, stride))
                os._exit(0)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        found = os.fstat(descriptor)
        os.close(descriptor)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return int(pipe.read()), found.st_blocks * 512


def write_until_full(descriptor: int, stride: int) -> int:
    done, size = 0, stride or PIECE
    while size >= (stride or 1024):
        try:
            done += os.pwrite(descriptor, bytes(size), done * 2 if stride else done)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            os.fsync(descriptor)
            size //= 2
    return done


def written_by_us(path: Path, user: bool, stride: int) -> tuple[int, int]:
    with Writer(path, batch_blocks=100) as writer:
        number, mover = new_file(writer), Mover(writer)
        writer.privileged = not user
        done, size = 0, stride or PIECE
        try:
            while True:
                at = done * 2 if stride else done
                found = mover.begin(number, at, size)
                got = min(found.offset + found.length - at, size)
                writer.change(finished, number, at, got)
                done += got
        except Refused as error:
            assert error.errno == errno.ENOSPC
        mover.close()
        writer.check()
        return done, writer.inode(number).sectors * 512


def finished(tx: Transaction, number: int, pos: int, count: int) -> None:
    iomapwrite.ioend(tx, tx.inode(number), pos, count)


@pytest.mark.parametrize("user", [False, True], ids=["root", "user"])
@pytest.mark.parametrize("form, stride", [
    ("-t ext4 -b 1024 -O ^has_journal", 0), ("-t ext4 -b 4096", 0), ("-t ext4 -b 1024 -O ^has_journal", 1024),
    ("-t ext2 -b 1024", 0), ("-t ext3 -b 1024 -m 10", 0), ("-t ext2 -b 1024", 1024)])
def test_a_full_disk_has_taken_as_much_as_the_kernels(mounts: None, form: str, stride: int, user: bool) -> None:
    path = image(f"{form} -N 16", 1000 if stride else 16 << 10)
    copy = new_path()
    copy.write_bytes(path.read_bytes())
    theirs, ours = written_by_kernel(copy, user, stride), written_by_us(path, user, stride)
    assert ours[1] == theirs[1]
    if stride or "ext4" not in form:  # the same mapping takes the same metadata
        assert ours[0] == theirs[0]


