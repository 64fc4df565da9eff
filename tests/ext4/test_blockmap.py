"""Block maps of ext2 and ext3: what mke2fs and the kernel write, random maps, and pointers that lead nowhere."""

import random
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from fusewire.ext4 import blockmap, iomap
from fusewire.ext4.errors import Check, Corrupt
from fusewire.ext4.extents import Run
from tests.ext4.driver import Core, Editor, debugfs, image, mapped_blocks, new_path, seeded

POINTERS = 256       # in a block of 1 KiB
DIRECT = blockmap.DIRECT
LEVEL_STARTS = (DIRECT, DIRECT + POINTERS, DIRECT + POINTERS + POINTERS**2)
END = DIRECT + POINTERS + POINTERS**2 + POINTERS**3
FREE = 600


@cache
def tree() -> Path:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    (root / "file").write_bytes(b"x" * 100)
    with open(root / "levels", "wb") as file:
        for start in (0, *LEVEL_STARTS):
            for step in (-1, 0, 1):
                if start + step >= 0:
                    file.seek((start + step) * 1024)
                    file.write(b"%08d" % (start + step) * 128)
    return root


@cache
def small(arguments: str = "-t ext2 -b 1024 -O ^resize_inode") -> Path:
    return image(arguments, 2048, tree())


class Planted:
    """An image in memory whose file /file gets any map; tables are taken from the free blocks."""

    def __init__(self) -> None:
        self.editor = Editor(small())
        self.number = self.editor.number("/file")
        self.next_free = FREE

    def table(self, pointers: dict[int, int]) -> int:
        """The block of a new table with these pointers."""
        block = self.next_free
        self.next_free += 1
        with self.editor.block(block) as raw:
            raw[:] = bytes(1024)
            for index, pointer in pointers.items():
                struct.pack_into("<I", raw, 4 * index, pointer)
        return block

    def root(self, pointers: dict[int, int]) -> Core:
        raw = bytearray(60)
        for index, pointer in pointers.items():
            struct.pack_into("<I", raw, 4 * index, pointer)
        self.editor.put_inode(self.number, block=bytes(raw), size_lo=0, size_hi=4)
        return Core(self.editor.data)

    def find(self, core: Core, file_block: int) -> Run:
        return core.run(blockmap.find, core.inode(self.number), file_block)


# ---- what others made ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", ["-t ext2 -b 1024 -O ^resize_inode", "-t ext3 -b 1024", "-t ext2 -r 0 -b 1024"])
def test_every_level_lies_where_debugfs_says(arguments: str) -> None:
    path = small(arguments)
    with Core(path) as core:
        found = core.at("/levels")
        assert not found.has_extents
        blocks = mapped_blocks(debugfs(path, "stat /levels"))
        edges = {start + step for start in (0, *LEVEL_STARTS) for step in (-1, 0, 1) if start + step >= 0}
        assert blocks.keys() == edges
        for file_block in edges:
            run = core.run(blockmap.find, found, file_block)
            assert run.start is not None and not run.unwritten
            assert run.start + file_block - run.file_block == blocks[file_block]
        assert core.content(found) == (tree() / "levels").read_bytes()


# ---- random maps -----------------------------------------------------------------------------------------------

def plant(planted: Planted, chosen: random.Random) -> tuple[Core, dict[int, int]]:
    """A map with a few tables on each level; runs of neighbours, holes and lone blocks. Returns file block → block."""
    expected: dict[int, int] = {}
    root = fill(chosen, expected, 0, DIRECT)
    for level, base in enumerate(LEVEL_STARTS, 1):
        if chosen.random() < 0.8:
            root[DIRECT + level - 1] = plant_level(planted, chosen, expected, base, level)
    return planted.root(root), expected


def plant_level(planted: Planted, chosen: random.Random, expected: dict[int, int], base: int, level: int) -> int:
    if level == 1:
        return planted.table(fill(chosen, expected, base, POINTERS))
    span = POINTERS ** (level - 1)
    used = {0, POINTERS - 1, chosen.randrange(POINTERS)} - ({0} if chosen.random() < 0.5 else set())
    children = {index: plant_level(planted, chosen, expected, base + index * span, level - 1) for index in used}
    return planted.table(children)


def fill(chosen: random.Random, expected: dict[int, int], base: int, count: int) -> dict[int, int]:
    pointers, at = {}, 0
    while at < count:
        length, start = min(chosen.choice((1, 2, 7, 40)), count - at), chosen.choice((0, chosen.randrange(2, 1900)))
        for index in range(length if start else 0):
            pointers[at + index] = expected[base + at + index] = start + index
        at += length
    return pointers


def test_random_maps_are_read_right() -> None:
    chosen = seeded()
    for _ in range(10):
        planted = Planted()
        core, expected = plant(planted, chosen)
        mapped = chosen.sample(sorted(expected), min(len(expected), 80))
        near = [block + step for block in mapped for step in (-1, 0, 1)]
        for file_block in [*near, *(chosen.randrange(END) for _ in range(50)), *LEVEL_STARTS, END - 1]:
            if not 0 <= file_block < END:
                continue
            run = planted.find(core, file_block)
            assert run.file_block <= file_block < run.file_block + run.length
            assert not run.unwritten
            check_run(expected, run)


def check_run(expected: dict[int, int], run: Run) -> None:
    """Every block of a mapped run is where the map says; a hole holds no mapped block."""
    if run.start is None:
        inside = range(run.file_block, run.file_block + run.length)
        assert not any(block in inside for block in expected)
        return
    for index in range(run.length):
        assert expected[run.file_block + index] == run.start + index


def test_beyond_the_last_level_there_is_nothing() -> None:
    planted = Planted()
    core = planted.root({0: FREE})
    for file_block in (END, END + 5, 1 << 32):
        assert planted.find(core, file_block) == Run(file_block, 1, None)
    assert core.fs.max_file_bytes(core.inode(planted.number)) == END * 1024


def test_missing_tables_are_holes_of_their_whole_span() -> None:
    planted = Planted()
    core = planted.root({})
    starts = [*LEVEL_STARTS, END]
    for level in range(3):
        hole = Run(starts[level], starts[level + 1] - starts[level], None)
        assert planted.find(core, starts[level] + 200) == hole


# ---- pointers that lead nowhere --------------------------------------------------------------------------------

@pytest.mark.parametrize("pointer", [1, 2048, 1 << 31, 0xFFFFFFFF])
@pytest.mark.parametrize("make", [
    lambda planted, pointer: ({0: pointer}, 0),
    lambda planted, pointer: ({DIRECT: pointer}, DIRECT),
    lambda planted, pointer: ({DIRECT: planted.table({3: pointer})}, DIRECT + 3),
    lambda planted, pointer: ({DIRECT + 1: planted.table({0: pointer})}, LEVEL_STARTS[1]),
    lambda planted, pointer: ({DIRECT + 2: planted.table({5: planted.table({0: pointer})})},
                              LEVEL_STARTS[2] + 5 * POINTERS**2),
], ids=["direct", "table", "in a table", "second level", "third level"])
def test_a_pointer_outside_the_file_system(make: Callable[[Planted, int], tuple[dict[int, int], int]],
                                           pointer: int) -> None:
    planted = Planted()
    root, file_block = make(planted, pointer)
    core = planted.root(root)
    with pytest.raises(Corrupt) as caught:
        planted.find(core, file_block)
    assert caught.value.check is Check.BLOCKMAP_RANGE
    assert caught.value.where["inode"] == planted.number
    assert caught.value.where["block"] == pointer


def test_a_run_that_leaves_the_file_system() -> None:
    planted = Planted()
    core = planted.root({0: 2046, 1: 2047, 2: 2048})
    with pytest.raises(Corrupt) as caught:
        planted.find(core, 0)
    assert caught.value.check is Check.BLOCKMAP_RANGE
    assert caught.value.where == {"inode": planted.number, "block": 2046, "count": 3}


def test_tables_that_lead_to_themselves_end() -> None:
    """Levels are counted down: a table that is its own child gives some block, and no loop."""
    planted = Planted()
    block = planted.next_free
    planted.table(dict.fromkeys(range(POINTERS), block))
    core = planted.root({DIRECT + 2: block})
    assert planted.find(core, LEVEL_STARTS[2] + 12345).start == block


def test_tables_are_read_ahead() -> None:
    """Finding the end of a file of many tables waits once per 64 of them."""
    planted = Planted()
    inner = {index: planted.table(dict.fromkeys(range(POINTERS), 5)) for index in range(POINTERS)}
    core = planted.root({DIRECT + 1: planted.table(inner)})
    found, waits = core.inode(planted.number), 0
    for index in range(POINTERS):
        core.run(iomap.begin, found, (LEVEL_STARTS[1] + index * POINTERS) * 1024, 1)
        waits += core.restarts
    assert waits <= 1 + POINTERS // blockmap.READAHEAD_TABLES
