"""Allocating blocks: ENOSPC where the kernel gives it, neighbours where there are any, all layouts of bitmaps, and no
long searches on large file systems.  The kernel and e2fsck are the judges."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fusewire.ext4 import alloc, checksum, group, iomap, iomapwrite, mapping, namestore
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.group import BLOCK_UNINIT
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import CommitFirst, Transaction
from tests import mounting
from tests.ext4.driver import Editor, check_of, image, new_path, run_tool, seeded
from tests.ext4.writer import Writer

LAYOUTS = {
    "1k": ("-t ext4 -b 1024", 20 << 10), "2k": ("-t ext4 -b 2048", 40 << 10), "4k": ("-t ext4 -b 4096", 300 << 10),
    "1k-short-last-group": ("-t ext4 -b 1024 -g 1024", 5000), "small-groups": ("-t ext4 -b 1024 -g 512", 8 << 10),
    "no-flex": ("-t ext4 -b 1024 -O ^flex_bg", 40 << 10), "flex-4": ("-t ext4 -b 1024 -G 4", 80 << 10),
    "meta_bg": ("-t ext4 -b 1024 -g 1024 -O meta_bg,^resize_inode", 70 << 10),
    "sparse_super2": ("-t ext4 -b 1024 -O sparse_super2", 40 << 10),
    "uninit_bg": ("-t ext4 -b 1024 -O ^metadata_csum,uninit_bg", 40 << 10),
    "uninit_bg-no-flex": ("-t ext4 -b 1024 -O ^metadata_csum,uninit_bg,^flex_bg,^sparse_super,^resize_inode", 40 << 10),
    "no-csum": ("-t ext4 -b 1024 -O ^metadata_csum", 40 << 10), "32bit": ("-t ext4 -b 1024 -O ^64bit", 40 << 10),
    "ext3": ("-t ext3 -b 1024", 40 << 10),
    "ext2-old": ("-t ext2 -b 1024 -O ^sparse_super,^resize_inode -I 128", 40 << 10),
}
ROOT = Caller(0, 0)


def layout(name: str) -> Path:
    arguments, kib = LAYOUTS[name]
    return image(arguments, kib)


def blocks_of(run: alloc.Run) -> set[int]:
    return set(range(run.start, run.start + run.length))


def take_everything(writer: Writer, count: int) -> set[int]:
    """All that can be had by asking for ``count`` blocks again and again."""
    taken: set[int] = set()
    while True:
        try:
            run = writer.change(lambda tx: alloc.allocate(tx, 0, count, reserve=True))
        except Refused as error:
            assert error.errno == errno.ENOSPC
            return taken
        assert run.length and not blocks_of(run) & taken
        taken |= blocks_of(run)


def free_blocks(path: Path) -> set[int]:
    """What dumpe2fs lists as free."""
    found: set[int] = set()
    for line in run_tool("dumpe2fs", path).splitlines():
        if line.startswith("  Free blocks: "):
            for part in line.split(":", 1)[1].split(","):
                first, _, last = part.strip().partition("-")
                if first:
                    found |= set(range(int(first), int(last or first) + 1))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_free_block_and_no_other_is_given_out(name: str) -> None:
    path = layout(name)
    with Writer(path) as writer:
        taken = take_everything(writer, 700)
        assert taken == free_blocks(path)
        writer.commit()
        assert not free_blocks(writer.path)
        choose = seeded()
        for run in runs_of(taken, choose.randrange(1, 900)):
            writer.change(lambda tx, run=run: alloc.free(tx, run[0], run[1]))
        writer.check()
        assert free_blocks(writer.path) == taken


def runs_of(blocks: set[int], most: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and sum(runs[-1]) == block and runs[-1][1] < most:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


@pytest.mark.parametrize("name", LAYOUTS)
def test_random_requests_against_a_set(name: str) -> None:
    choose = seeded()
    path = layout(name)
    free_now = free_blocks(path)
    with Writer(path, batch_blocks=30) as writer:
        mine: set[int] = set()
        for _ in range(150):
            if choose.random() < 0.6:
                goal, count = choose.randrange(writer.fs.geometry.blocks), choose.choice([1, 2, 7, 8, 9, 100, 3000])
                expected = goal in free_now and not is_held(writer, goal)
                run = writer.change(lambda tx, g=goal, n=count: alloc.allocate(tx, g, n, reserve=True))
                assert 1 <= run.length <= count and blocks_of(run) <= free_now
                assert run.start == goal or not expected, "the goal was free"
                mine |= blocks_of(run)
                free_now -= blocks_of(run)
            elif mine:
                start = choose.choice(sorted(mine))
                length = next(n for n in range(1, len(mine) + 1) if start + n not in mine)
                length = choose.randrange(1, length + 1)
                writer.change(lambda tx, s=start, n=length: alloc.free(tx, s, n))
                freed = set(range(start, start + length))
                mine -= freed
                free_now |= freed
        writer.commit()
        assert free_blocks(writer.path) == free_now
        for start, length in runs_of(mine, 10000):
            writer.change(lambda tx, s=start, n=length: alloc.free(tx, s, n))
        writer.check()


def is_held(writer: Writer, block: int) -> bool:
    geometry = writer.fs.geometry
    number, bit = divmod(block - geometry.first_data_block, geometry.blocks_per_group)
    assert writer.fs.writing is not None
    return bool(writer.fs.writing.held.mask(number) >> bit & 1)


def naive(unused: int, goal: int | None, count: int, bits: int) -> tuple[int, int]:
    """What ``_run_near`` says, bit by bit."""
    free_at = [bool(unused >> bit & 1) for bit in range(bits)] + [False]
    rows = [next(end for end in range(bit, bits + 1) if not free_at[end]) - bit for bit in range(bits)]
    if goal is not None:
        if goal < bits and rows[goal]:
            return goal, min(rows[goal], count)
        for bit in range(goal, bits):
            if rows[bit] >= count:
                return bit, count
    for bit in range(bits):
        if rows[bit] >= count:
            return bit, count
    longest = max(rows)
    return (rows.index(longest), longest) if longest else (0, 0)


def test_runs_are_found_as_bit_by_bit() -> None:
    choose = seeded()
    for _ in range(3000):
        bits = choose.randrange(1, 70)
        unused = choose.getrandbits(bits) | choose.getrandbits(bits) if choose.random() < 0.5 else choose.getrandbits(
            bits) & choose.getrandbits(bits)
        goal, count = choose.choice([None, choose.randrange(bits)]), choose.randrange(1, 20)
        assert alloc._run_near(unused, goal, count) == naive(unused, goal, count, bits), (bin(unused), goal, count)


def test_a_whole_group_is_one_run() -> None:
    with Writer(layout("small-groups"), batch_blocks=100) as writer:
        geometry = writer.fs.geometry
        number = next(n for n in range(geometry.groups) if writer.run(group.load, n).flags & BLOCK_UNINIT
                      and not writer.fs.superblock.has_copy_in(n))
        goal = geometry.first_block_of(number)
        run = writer.change(lambda tx: alloc.allocate(tx, goal, 1 << 20))
        assert run == (goal, geometry.blocks_per_group)
        assert writer.run(group.load, number).free_blocks == 0
        assert not writer.run(group.load, number).flags & BLOCK_UNINIT


def test_goals_out_of_range_are_no_harm() -> None:
    with Writer(layout("1k-short-last-group")) as writer:
        for goal in (-5, 0, writer.fs.geometry.blocks - 1, writer.fs.geometry.blocks, 1 << 40):
            for count in (0, 1, 50):
                run = writer.change(lambda tx, g=goal, n=count: alloc.allocate(tx, g, n))
                assert 1 <= run.length <= max(count, 1) and run.start + run.length <= writer.fs.geometry.blocks
        writer.change(lambda tx: alloc.allocate(tx, writer.fs.geometry.blocks - 1, 1))


def test_a_long_run_elsewhere_is_better_than_a_short_one_near() -> None:
    with Writer(layout("1k")) as writer:
        geometry = writer.fs.geometry
        base = geometry.first_block_of(1)
        taken = writer.change(lambda tx: alloc.allocate(tx, base, geometry.blocks_per_group))
        for at in range(taken.start + 1, taken.start + 400, 2):
            writer.change(lambda tx, at=at: alloc.free(tx, at, 1))
        writer.commit()
        run = writer.change(lambda tx: alloc.allocate(tx, taken.start, 100))
        assert run.length == 100
        run = writer.change(lambda tx: alloc.allocate(tx, taken.start, 1))
        assert run.start == taken.start + 1


# ---- who gets the last blocks ----------------------------------------------------------------------------------------

def fill_by_kernel(path: Path, user: bool) -> int:
    """How many blocks a caller gets for one file, those of its extent tree counted."""
    with mounting.kernel_mount(path, "rw,noatime") as mount:
        name = mount.root / "file"
        descriptor = os.open(name, os.O_CREAT | os.O_RDWR, 0o666)
        os.fchmod(descriptor, 0o666)
        block = os.fstatvfs(descriptor).f_bsize
        child = os.fork()
        if not child:
            try:
                if user:
                    os.setresgid(1000, 1000, 1000)
                    os.setresuid(1000, 1000, 1000)
                done, step = 0, 256
                while step:
                    try:
                        os.posix_fallocate(descriptor, done * block, step * block)
                        done += step
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            os._exit(1)
                        os.ftruncate(descriptor, done * block)
                        step //= 2
                os._exit(0)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        found = os.fstat(descriptor)
        os.close(descriptor)
        return found.st_blocks * 512 // block


def fill_by_us(path: Path, user: bool) -> int:
    with Writer(path, batch_blocks=200) as writer:
        made = writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"file", 0o666, ROOT))
        writer.privileged = not user
        done = 0
        while True:
            try:
                run = writer.change(lambda tx, at=done: mapping.allocate(
                    tx, tx.inode(made.number), at, 32767, unwritten=True))[1]
            except Refused as error:
                assert error.errno == errno.ENOSPC
                break
            done += run.length
        writer.check()
        return writer.inode(made.number).sectors * 512 // writer.block_bytes


@pytest.mark.parametrize("user", [False, True], ids=["root", "user"])
@pytest.mark.parametrize("arguments, kib", [
    ("-t ext4 -b 1024 -O ^has_journal", 24 << 10), ("-t ext4 -b 4096 -O ^has_journal -m 7", 64 << 10),
    ("-t ext4 -b 1024 -O ^has_journal -m 0", 16 << 10), ("-t ext4 -b 2048 -r 1000", 64 << 10)])
def test_nobody_gets_more_or_less_than_from_the_kernel(mounts: None, arguments: str, kib: int, user: bool) -> None:
    options = arguments.replace("-r 1000", "")
    path = image(options, kib)
    copy = new_path()
    copy.write_bytes(path.read_bytes())
    if "-r 1000" in arguments:
        run_tool("tune2fs", "-r", "1000", copy)
    ours = fill_by_us(copy, user)
    assert fill_by_kernel(copy, user) == ours


def test_metadata_of_written_data_may_use_the_reserve() -> None:
    """The data are there and the last free block is taken: converting them must still find room for a node."""
    with Writer(image("-t ext4 -b 1024 -O ^has_journal", 4096)) as writer:
        made = writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"file", 0o666, ROOT))
        writer.change(lambda tx: mapping.allocate(tx, tx.inode(made.number), 0, 20, unwritten=True))
        while True:
            try:
                writer.change(lambda tx: alloc.allocate(tx, 0, 1000))
            except Refused:
                break
        for at in range(1, 20, 2):
            writer.change(lambda tx, at=at: iomapwrite.ioend(tx, tx.inode(made.number), at << 10, 1024))
        with pytest.raises(Refused):
            writer.change(lambda tx: alloc.allocate(tx, 0, 1))
        found = writer.inode(made.number)
        for at in range(20):
            assert writer.run(iomap.find, found, at).unwritten == (at % 2 == 0)


def test_only_held_blocks_left_means_commit_first() -> None:
    with Writer(image("-t ext2 -b 1024", 2048)) as writer:
        taken = take_everything(writer, 100)
        writer.commit()
        start = min(taken)
        writer.change(lambda tx: alloc.free(tx, start, 1))
        with pytest.raises(CommitFirst), Transaction(writer.fs) as tx:
            alloc.allocate(tx, start, 1)
        assert writer.change(lambda tx: alloc.allocate(tx, start, 1)) == (start, 1)
        with pytest.raises(Refused), Transaction(writer.fs) as tx:
            alloc.allocate(tx, start, 1)


def test_what_failed_transactions_made_full_is_found_again() -> None:
    with Writer(image("-t ext2 -b 1024 -g 512", 4096)) as writer:
        everything = len(free_blocks(writer.path))
        with pytest.raises(KeyError), Transaction(writer.fs) as tx:
            got = 0
            try:
                while True:
                    got += writer.run(lambda _fs: alloc.allocate(tx, 0, 100).length)
            except Refused:
                assert got == everything
            raise KeyError
        assert len(take_everything(writer, 64)) == everything


# ---- hostile images --------------------------------------------------------------------------------------------------

def broken_bitmap(form: str, change: tuple[int, int], sealed: bool) -> bytearray:
    """An image whose first block bitmap has a byte changed, under a right checksum if ``sealed``."""
    editor = Editor(image(form, 4096))
    desc = editor.core.run(group.load, 0)
    at, value = change
    with editor.block(desc.block_bitmap) as raw:
        raw[at] ^= value
        data = bytes(raw)
    if sealed:
        with editor.desc(0) as raw:
            checksum.seal_block_bitmap(data, editor.geometry.blocks_per_group, raw, editor.seed)
    return editor.data


def write_out(data: bytearray) -> Path:
    path = new_path()
    path.write_bytes(data)
    return path


def allocate_in(path: Path) -> Corrupt:
    with Writer(path, copy=False) as writer, pytest.raises(Corrupt) as caught:
        writer.change(lambda tx: alloc.allocate(tx, 0, 5))
    return caught.value


@pytest.mark.parametrize("at", [0, 100, 511])
def test_a_bitmap_with_a_wrong_checksum_is_not_used(at: int) -> None:
    assert allocate_in(write_out(broken_bitmap("-t ext4 -b 1024", (at, 1), False))).check is Check.BITMAP_CHECKSUM


@pytest.mark.parametrize("form", ["-t ext4 -b 1024", "-t ext2 -b 1024"])
def test_a_bitmap_that_the_descriptor_contradicts_is_not_used(form: str) -> None:
    data = broken_bitmap(form, (400, 0xFF), "ext4" in form)
    assert allocate_in(write_out(data)).check is Check.BITMAP_MISMATCH


def test_metadata_are_neither_given_out_nor_freed() -> None:
    with Writer(image("-t ext4 -b 1024", 8 << 10)) as writer:
        desc = writer.run(group.load, 0)
        last = desc.inode_table + writer.fs.geometry.inode_table_blocks() - 1
        for block in (1, 2, desc.block_bitmap, desc.inode_bitmap, desc.inode_table, last):
            with pytest.raises(Corrupt) as caught:
                writer.change(lambda tx, block=block: alloc.free(tx, block, 1))
            assert caught.value.check is Check.BITMAP_MISMATCH
    editor = Editor(image("-t ext4 -b 1024", 8 << 10))
    with editor.block(desc.block_bitmap) as raw:
        table = desc.inode_table - 1
        raw[table // 8] &= ~(1 << table % 8)
        data = bytes(raw)
    with editor.desc(0) as raw:
        checksum.seal_block_bitmap(data, editor.geometry.blocks_per_group, raw, editor.seed)
        raw[0x0C:0x0E] = (desc.free_blocks + 1).to_bytes(2, "little")
    with Writer(write_out(editor.data), copy=False) as writer, pytest.raises(Corrupt) as caught:
        writer.change(lambda tx: alloc.allocate(tx, desc.inode_table, 1))
    assert caught.value.check is Check.BITMAP_MISMATCH


@pytest.mark.parametrize("start, count, check", [
    (0, 1, Check.BLOCK_RANGE), (-4, 2, Check.BLOCK_RANGE), (4095, 2, Check.BLOCK_RANGE),
    (1 << 40, 1, Check.BLOCK_RANGE), (3000, 1, Check.BITMAP_MISMATCH)])
def test_freeing_what_was_not_taken_is_refused(start: int, count: int, check: Check) -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        with pytest.raises(Corrupt) as caught:
            writer.change(lambda tx: alloc.free(tx, start, count))
        assert caught.value.check is check
        writer.check()


def test_a_descriptor_outside_is_refused() -> None:
    editor = Editor(image("-t ext4 -b 1024", 4096))
    with editor.desc(0) as raw:
        raw[0:4] = (1 << 30).to_bytes(4, "little")
    assert check_of(editor.data, lambda core: core.run(group.load, 0)).check is Check.GROUP_LOCATION  # type: ignore[attr-defined]


# ---- large file systems ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tebibyte() -> Path:
    """A sparse image of 1 TiB: 8192 groups."""
    path = new_path()
    os.truncate(path, 1 << 40)
    run_tool("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-N", "131072", "-E", "lazy_itable_init=1", "-O",
             "^has_journal", path)
    return path


def test_thousands_of_full_groups_are_passed_quickly(tebibyte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation behind 3000 full groups costs about what it costs anywhere else."""
    with Writer(tebibyte, copy=False, batch_blocks=1 << 20) as writer:
        geometry = writer.fs.geometry
        assert geometry.groups == 8192
        reads = writer.reads
        for number in range(3000):
            writer.change(fill_group, number)
        assert writer.reads - reads < 1000, "bitmaps are read one by one"
        looked: list[int] = []
        real = group.load
        writer.change(lambda tx: alloc.allocate(tx, 0, 1))
        monkeypatch.setattr(group, "load", lambda fs, number: looked.append(number) or real(fs, number))
        for _ in range(300):
            run = writer.change(lambda tx: alloc.allocate(tx, 0, 1))
            assert geometry.group_of_block(run.start) == 3000
        assert set(looked) == {3000}, "a search looks at full groups again and again"


def fill_group(tx: Transaction, number: int) -> None:
    base = tx.geometry.first_block_of(number)
    while unused := alloc.free_bits(tx, number):
        alloc.allocate(tx, base + (unused & -unused).bit_length() - 1, tx.geometry.blocks_per_group)


def test_a_large_request_passes_few_groups_and_bitmaps(tebibyte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there is something, others that have less are passed for a while only; what they lack is remembered."""
    with Writer(tebibyte, copy=False, batch_blocks=1 << 20) as writer:
        geometry, left = writer.fs.geometry, 2000
        for number in range(4000, 4200):
            writer.change(fill_group, number)
            last = geometry.first_block_of(number + 1) - left
            for at in range(last, last + left - 100, 101):
                writer.change(lambda tx, at=at: alloc.free(tx, at, 100))
            left = 1000
        writer.commit()
        goal, bitmaps, groups = geometry.first_block_of(4000), list[int](), list[int]()
        real_run, real_load = alloc._run_near, group.load
        monkeypatch.setattr(alloc, "_run_near", lambda *given: bitmaps.append(1) or real_run(*given))
        monkeypatch.setattr(group, "load", lambda fs, number: groups.append(number) or real_load(fs, number))
        for _ in range(12):
            bitmaps.clear()
            groups.clear()
            assert writer.change(lambda tx: alloc.allocate(tx, goal, 5000)).length == 100
            assert len(bitmaps) <= alloc.MOST_BITMAPS and len(set(groups)) <= alloc.MOST_GROUPS + 2
        assert len(bitmaps) == 1


def test_a_fragmented_disk_is_not_searched_to_its_end(tebibyte: Path) -> None:
    """Every group has only single free blocks: a large request takes what it finds soon."""
    with Writer(tebibyte, copy=False, batch_blocks=1 << 20) as writer:
        assert writer.fs.writing is not None
        geometry = writer.fs.geometry
        for number in range(64):
            base = geometry.first_block_of(number)
            run = writer.change(lambda tx, b=base: alloc.allocate(tx, b, geometry.blocks_per_group))
            for at in range(run.start, run.start + min(run.length, 200), 2):
                writer.change(lambda tx, at=at: alloc.free(tx, at, 1))
        writer.fs.writing.held._masks.clear()
        reads = writer.reads
        run = writer.change(lambda tx: alloc.allocate(tx, 0, 2000))
        assert run.length >= 1 and writer.reads - reads <= 1
