"""Extent trees: trees that mke2fs makes, random trees planted into an image, and every rule that a tree can break."""

import random
import struct
from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from fusewire.ext4 import extents
from fusewire.ext4.errors import Check, Corrupt
from fusewire.ext4.extents import Run
from tests.ext4.driver import Core, Editor, debugfs, image, mapped_blocks, new_path, seeded

FREE = 1000          # blocks from here to the end are free in the small image
LAST = 0xFFFFFFFF
Extent = tuple[int, int, int]  # file block, length as on disk, start


@cache
def small(features: str = "") -> Path:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    (root / "file").write_bytes(b"x" * 100)
    return image(f"-t ext4 -b 1024 -O ^has_journal,^resize_inode {features}", 2048, root)


def pack(entries: list[Extent], depth: int, room: int, magic: int = extents.MAGIC, most: int | None = None,
         count: int | None = None) -> bytes:
    """A node with a header; for inner nodes the entries are (file block, 0, child)."""
    most = (room - 12) // 12 if most is None else most
    raw = struct.pack("<HHHHI", magic, len(entries) if count is None else count, most, depth, 0)
    for file_block, length, start in entries:
        if depth:
            raw += struct.pack("<IIHH", file_block, start & LAST, start >> 32, 0)
        else:
            raw += struct.pack("<IHHI", file_block, length, start >> 32, start & LAST)
    return raw.ljust(room, b"\0")


class Planted:
    """An image in memory whose file /file gets any extent tree; node blocks are taken from the free ones."""

    def __init__(self, features: str = "") -> None:
        self.editor = Editor(small(features))
        self.number = self.editor.number("/file")
        self.next_free = FREE

    def node(self, raw: bytes, at: int | None = None) -> int:
        """The block that now holds a node."""
        block = self.next_free if at is None else at
        self.next_free += at is None
        seal = None if struct.unpack_from("<H", raw, 4)[0] > 84 else True
        with self.editor.extent_block(self.number, block) if seal else self.editor.block(block) as data:
            data[:] = raw
        return block

    def root(self, raw: bytes) -> Core:
        """The core over the image with this root (60 bytes)."""
        self.editor.put_inode(self.number, block=raw[:60], size_lo=LAST, size_hi=0xFF)
        return Core(self.editor.data)

    def find(self, core: Core, file_block: int) -> Run:
        return core.run(extents.find, core.inode(self.number), file_block)


def check_of_root(raw: bytes, check: Check, /, **where: object) -> None:
    planted = Planted()
    core = planted.root(raw)
    with pytest.raises(Corrupt) as caught:
        planted.find(core, 0)
    assert caught.value.check is check
    assert caught.value.where == {"inode": planted.number} | where


# ---- trees that others made ------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 4, 5, 84, 85, 336, 337, 1500])
def test_fragmented_files_lie_where_debugfs_says(count: int) -> None:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    with open(root / "file", "wb") as file:
        for index in range(count):
            file.seek(2 * index * 4096)
            file.write(b"%04d" % index * 1024)
    path = image("-t ext4 -b 4096 -O ^has_journal", 16384, root)
    with Core(path) as core:
        found = core.at("/file")
        assert core.content(found) == (root / "file").read_bytes()
        blocks = mapped_blocks(debugfs(path, "stat /file"))
        assert sorted(blocks) == list(range(0, 2 * count, 2))
        assert {block: core.run(extents.find, found, block).start for block in blocks} == blocks
        assert all(core.run(extents.find, found, 2 * index + 1).start is None for index in range(count))


# ---- random trees ----------------------------------------------------------------------------------------------

def random_extents(chosen: random.Random, count: int) -> list[Extent]:
    """Ascending extents with holes between them, some unwritten, up to the last file block."""
    edges = sorted(chosen.sample(range(LAST), 2 * count))
    found = []
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        length = min(end - first, chosen.choice((1, 3, 700)))
        unwritten = chosen.random() < 0.3
        found.append((first, length + extents.MAX_WRITTEN if unwritten else length, chosen.randrange(2, 1300)))
    return found


def plant(planted: Planted, chosen: random.Random, found: list[Extent], depth: int) -> Core:
    """A tree of ``depth`` over the extents; an index may begin anywhere between the extents around its edge."""
    parts = split(chosen, found, depth, 4)
    rows = [planted_row(planted, chosen, part, depth - 1) for part in parts] if depth else found
    return planted.root(pack(rows, depth, 60))


def planted_row(planted: Planted, chosen: random.Random, part: tuple[int, list[Extent]], depth: int) -> Extent:
    least, found = part
    first = chosen.randint(least, found[0][0])
    parts = split(chosen, found, depth, 84, first)
    rows = [planted_row(planted, chosen, inner, depth - 1) for inner in parts] if depth else found
    return (first, 0, planted.node(pack(rows, depth, 1024)))


def split(chosen: random.Random, found: list[Extent], depth: int, most: int,
          least: int = 0) -> list[tuple[int, list[Extent]]]:
    """Parts for the children of a node, each with the least file block that may be its own."""
    if not depth:
        return []
    cuts = sorted({0, len(found), *(chosen.randrange(len(found)) for _ in range(min(most - 1, len(found), 3)))})
    parts = []
    for begin, end in pairwise(cuts):
        parts.append((least, found[begin:end]))
        least = found[end - 1][0] + found[end - 1][1] % extents.MAX_WRITTEN
    return parts


def check_answer(planted: Planted, core: Core, found: list[Extent], file_block: int) -> None:
    """A mapped block is answered with its whole extent, any other with a hole that holds no mapped block."""
    run = planted.find(core, file_block)
    assert run.file_block <= file_block < run.file_block + run.length <= 1 << 32
    index = bisect_right([extent[0] for extent in found], file_block) - 1
    if index >= 0:
        first, length, start = found[index]
        unwritten, length = length > extents.MAX_WRITTEN, length % extents.MAX_WRITTEN
        if file_block < first + length:
            assert run == Run(first, length, start, unwritten)
            return
    assert run.start is None and not run.unwritten
    assert not any(first < run.file_block + run.length and first + length % extents.MAX_WRITTEN > run.file_block
                   for first, length, _ in found), (run, file_block)


@pytest.mark.parametrize("depth", range(extents.MAX_DEPTH + 1))
@pytest.mark.parametrize("features", ["", "-O ^metadata_csum"])
def test_random_trees_are_read_right(depth: int, features: str) -> None:
    chosen = seeded()
    for _ in range(4):
        planted = Planted(features)
        found = random_extents(chosen, chosen.choice((1, 4) if not depth else (1, 5, 40)))
        core = plant(planted, chosen, found, depth)
        edges = [edge + step for first, length, _ in found for edge in (first, first + length % extents.MAX_WRITTEN)
                 for step in (-1, 0)]
        for file_block in [*edges, 0, LAST, *(chosen.randrange(LAST) for _ in range(30))]:
            if 0 <= file_block <= LAST:
                check_answer(planted, core, found, file_block)


def test_an_empty_root_is_one_hole() -> None:
    for depth in (0, 3):
        planted = Planted()
        assert planted.find(planted.root(pack([], depth, 60)), 77).start is None


def test_the_largest_extents() -> None:
    """32768 blocks is a written extent, 32769 on disk an unwritten one of one block."""
    path = image("-t ext4 -b 1024 -O ^has_journal,^resize_inode", 65536, small_tree())
    editor = Editor(path)
    number = editor.number("/file")
    rows = [(0, 32768, 20000), (32768, 32769, 5000), (32769, 65535, 7000)]
    editor.put_inode(number, block=pack(rows, 0, 60))
    core = Core(editor.data)
    found = [core.run(extents.find, core.inode(number), block) for block in (5, 32768, 32769)]
    assert found == [Run(0, 32768, 20000, False), Run(32768, 1, 5000, True), Run(32769, 32767, 7000, True)]


@cache
def small_tree() -> Path:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    (root / "file").write_bytes(b"x" * 100)
    return root


# ---- broken roots ----------------------------------------------------------------------------------------------

def test_bad_magic() -> None:
    check_of_root(pack([(0, 1, FREE)], 0, 60, magic=0xF30B), Check.EXTENT_MAGIC, magic="0xf30b")


@pytest.mark.parametrize("depth", [6, 9, 0xFFFF])
def test_too_deep(depth: int) -> None:
    check_of_root(pack([(0, 1, FREE)], depth, 60), Check.EXTENT_DEPTH, depth=depth, expected=None)


@pytest.mark.parametrize(("count", "most"), [(5, 4), (5, 5), (0xFFFF, 4), (2, 1), (1, 0xFFFF)])
def test_more_entries_than_fit(count: int, most: int) -> None:
    check_of_root(pack([(0, 1, FREE)], 0, 60, most=most, count=count), Check.EXTENT_ENTRIES,
                  entries=count, max=most, fits=4)


def test_overlapping_extents() -> None:
    check_of_root(pack([(0, 5, FREE), (4, 1, FREE)], 0, 60), Check.EXTENT_ORDER, file_block=4, count=1)


def test_descending_extents() -> None:
    check_of_root(pack([(9, 1, FREE), (4, 1, FREE)], 0, 60), Check.EXTENT_ORDER, file_block=4, count=1)


def test_an_extent_past_the_last_file_block() -> None:
    check_of_root(pack([(LAST, 2, FREE)], 0, 60), Check.EXTENT_ORDER, file_block=LAST, count=2)


def test_descending_indexes() -> None:
    check_of_root(pack([(9, 0, FREE), (9, 0, FREE)], 1, 60), Check.EXTENT_ORDER, file_block=9)


def test_an_extent_without_blocks() -> None:
    check_of_root(pack([(3, 0, FREE)], 0, 60), Check.EXTENT_LENGTH, file_block=3)


@pytest.mark.parametrize(("length", "start"), [(1, 0), (1, 2048), (2, 2047), (1, 1 << 47), (3, 2**32 + 1500)])
def test_an_extent_outside_the_file_system(length: int, start: int) -> None:
    check_of_root(pack([(0, length, start)], 0, 60), Check.EXTENT_RANGE, block=start, count=length)


@pytest.mark.parametrize("child", [0, 1, 2048, 1 << 47])
def test_an_index_outside_the_file_system(child: int) -> None:
    check_of_root(pack([(0, 0, child)], 1, 60), Check.EXTENT_RANGE, block=child)


# ---- broken nodes below the root -------------------------------------------------------------------------------

def check_below(make: Callable[[Planted], int], level: int, check: Check, /, **where: object) -> None:
    """The error for a root of depth ``level`` whose one index, from file block 10 on, leads to the made node."""
    planted = Planted()
    core = planted.root(pack([(10, 0, make(planted))], level, 60))
    with pytest.raises(Corrupt) as caught:
        planted.find(core, 12)
    assert caught.value.check is check, caught.value
    assert caught.value.where == {"inode": planted.number} | where


def test_a_node_of_the_wrong_depth() -> None:
    check_below(lambda planted: planted.node(pack([(10, 1, FREE)], 0, 1024)), 2, Check.EXTENT_DEPTH,
                depth=0, expected=1)


def test_a_node_that_leads_to_itself() -> None:
    """Depth falls by one per level, so a loop ends where it closes."""
    check_below(lambda planted: planted.node(pack([(10, 0, FREE)], 1, 1024), FREE), 2, Check.EXTENT_DEPTH,
                depth=1, expected=0)


def test_a_node_whose_checksum_is_wrong() -> None:
    def make(planted: Planted) -> int:
        block = planted.node(pack([(10, 1, FREE)], 0, 1024))
        planted.editor.data[block * 1024 + 20] ^= 1
        return block
    check_below(make, 1, Check.EXTENT_CHECKSUM, block=FREE)


def test_a_node_of_another_file() -> None:
    def make(planted: Planted) -> int:
        block = planted.next_free
        with planted.editor.extent_block(2, block) as raw:
            raw[:] = pack([(10, 1, FREE)], 0, 1024)
        return block
    check_below(make, 1, Check.EXTENT_CHECKSUM, block=FREE)


def test_an_empty_node() -> None:
    check_below(lambda planted: planted.node(pack([], 0, 1024)), 1, Check.EXTENT_ENTRIES, entries=0, max=84, fits=84)


@pytest.mark.parametrize("first", [0, 9])
def test_a_leaf_that_begins_before_its_index(first: int) -> None:
    check_below(lambda planted: planted.node(pack([(first, 1, FREE)], 0, 1024)), 1, Check.EXTENT_ORDER,
                file_block=first, count=1)


def test_a_leaf_that_reaches_into_the_next() -> None:
    planted = Planted()
    leaf = planted.node(pack([(12, 9, FREE)], 0, 1024))
    core = planted.root(pack([(10, 0, leaf), (20, 0, leaf)], 1, 60))
    with pytest.raises(Corrupt) as caught:
        planted.find(core, 12)
    assert caught.value.check is Check.EXTENT_ORDER


def test_one_block_cannot_serve_two_ranges() -> None:
    """What was decoded for one range of the file is not taken for another."""
    planted = Planted()
    leaf = planted.node(pack([(12, 1, FREE)], 0, 1024))
    core = planted.root(pack([(10, 0, leaf), (20, 0, leaf)], 1, 60))
    assert planted.find(core, 12).start == FREE
    with pytest.raises(Corrupt) as caught:
        planted.find(core, 22)
    assert caught.value.check is Check.EXTENT_ORDER


def test_leaves_are_read_ahead() -> None:
    """A walk over many leaves waits once per 32 of them."""
    planted = Planted()
    rows = [(10 * index, 0, planted.node(pack([(10 * index, 1, 5)], 0, 1024))) for index in range(80)]
    core = planted.root(pack([(0, 0, planted.node(pack(rows, 1, 1024)))], 2, 60))
    waits = 0
    for index in range(80):
        planted.find(core, 10 * index)
        waits += core.restarts
    assert waits <= 2 + 80 // extents.READAHEAD_NODES + 1
