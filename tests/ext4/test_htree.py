"""Hash trees: those of kernel and e2fsck, lookups by hash alone, colliding names, and every rule about nodes."""

import random
import re
import struct
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from fusewire.ext4 import directory, dirhash, htree
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.htree import CONTINUED, Node, Root
from fusewire.ext4.inode import FLAG_INDEX, Inode
from tests import populate
from tests.ext4.driver import Core, Editor, copied, image, new_path, rebuilt, run_tool, seeded
from tests.mounting import kernel_mount

PLAIN = "-t ext4 -b 1024 -O ^has_journal,^resize_inode"
HASHES = [(version, sign) for version in ("legacy", "half_md4", "tea") for sign in (1, 2)]


@cache
def tree(count: int = 300) -> Path:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    populate.hashed(count)(root)
    (root / "few").mkdir()
    return root


@cache
def indexed(arguments: str = PLAIN, count: int = 300) -> Path:
    """An image whose directory /hashed-N e2fsck has indexed."""
    path = copied(image(arguments, 8192, tree(count)))
    return rebuilt(path)


@pytest.fixture
def no_linear_search(monkeypatch: pytest.MonkeyPatch) -> None:
    search = directory._find_linear

    def refuse(fs: Ext4, found: Inode, sought: directory.Sought) -> object:
        assert not found.flags & FLAG_INDEX, "searched from end to end"
        return search(fs, found, sought)
    monkeypatch.setattr(directory, "_find_linear", refuse)


def names_in(core: Core, path: str) -> dict[bytes, int]:
    return {name.name: name.inode for name in core.read_directory(core.at(path))}


def find_all(core: Core, path: str, names: dict[bytes, int]) -> None:
    found = core.at(path)
    for name, number in names.items():
        assert core.run(directory.find, found, name) == number, name
    for name in list(names)[:50]:
        with pytest.raises(Refused):
            core.run(directory.find, found, name + b"!")


# ---- trees that others made ------------------------------------------------------------------------------------

@pytest.mark.usefixtures("no_linear_search")
@pytest.mark.parametrize(("version", "sign"), HASHES)
def test_the_hash_alone_finds_every_name(mounts: None, version: str, sign: int) -> None:
    path = copied(image("-t ext4 -b 1024", 32768, None, (f"ssv def_hash_version {version}", f"ssv flags {sign}")))
    with kernel_mount(path, "rw") as mounted:
        populate.hashed(600)(mounted.root)
    with Core(path) as core:
        names = names_in(core, "/hashed-600")
        assert len(names) == 602
        find_all(core, "/hashed-600", names)


@pytest.mark.usefixtures("no_linear_search")
@pytest.mark.parametrize("features", ["", ",^metadata_csum,^64bit", ",metadata_csum_seed", ",large_dir"])
def test_trees_of_two_levels(mounts: None, features: str) -> None:
    path = copied(image(f"-t ext4 -b 1024 -O ^has_journal{features}", 32768))
    with kernel_mount(path, "rw") as mounted:
        populate.hashed(2600, 60)(mounted.root)
    with Core(path) as core:
        found = core.at("/hashed-2600")
        assert core.run(directory.index_root, found).levels == 1
        names = names_in(core, "/hashed-2600")
        assert len(names) == 2602
        find_all(core, "/hashed-2600", names)


@pytest.mark.usefixtures("no_linear_search")
@pytest.mark.parametrize("arguments", [PLAIN, "-t ext4 -b 2048", "-t ext3 -b 1024", f"{PLAIN},^metadata_csum"])
def test_nodes_are_those_that_debugfs_dumps(arguments: str) -> None:
    path = indexed(arguments)
    with Core(path) as core:
        shown = run_tool("debugfs", "-R", "htree_dump /hashed-300", path).split("Reading directory block")[0]
        entries = re.findall(r"Entry #\d+: Hash 0x([0-9a-f]+), block (\d+)", shown.split("\n\n")[0])
        top = core.run(directory.index_root, core.at("/hashed-300"))
        assert top.node.hashes == [int(value, 16) for value, _ in entries]
        assert top.node.blocks == [int(block) for _, block in entries]
        assert f"Hash Version: {top.version % 3}\n" in shown and f"Indirect levels: {top.levels}\n" in shown
        find_all(core, "/hashed-300", names_in(core, "/hashed-300"))


@pytest.mark.usefixtures("no_linear_search")
def test_a_cold_lookup_reads_the_way_to_one_leaf() -> None:
    with Core(indexed()) as core:
        names = names_in(core, "/hashed-300")
    for name in list(names)[5:10]:
        with Core(indexed()) as core:
            found = core.at("/hashed-300")
            assert core.run(directory.find, found, name) == names[name]
            assert core.restarts <= 2


# ---- planted trees ---------------------------------------------------------------------------------------------

class Planted:
    """A directory of one leaf per group of names, under nodes that a test lays out; block 0 is the root."""

    def __init__(self, blocks: int = 120, features: str = "") -> None:
        self.editor = Editor(image(f"-t ext4 -b 1024 -O ^has_journal,^resize_inode{features}", 4096, tree(5)))
        self.number, self.start = self.editor.number("/few"), 2000
        extent = struct.pack("<IHHI", 0, blocks, 0, self.start)
        self.editor.put_inode(self.number, size_lo=blocks * 1024, flags=0x80000 | FLAG_INDEX,
                              block=struct.pack("<HHHHI", 0xF30A, 1, 4, 0, 0) + extent)
        self.editor.core = Core(self.editor.data)
        for block in range(1, blocks):
            self.leaf(block, [])

    def leaf(self, block: int, names: list[bytes]) -> None:
        with self.editor.dir_block(self.number, block) as raw:
            end, at = len(raw) - (12 if self.editor.sealed else 0), 0
            raw[:end] = bytes(end)
            for index, name in enumerate(names):
                length = (8 + len(name) + 3) // 4 * 4 if index < len(names) - 1 else end - at
                struct.pack_into("<IHBB", raw, at, 13, length, len(name), 1)
                raw[at + 8:at + 8 + len(name)] = name
                at += length
            if not names:
                struct.pack_into("<IHBB", raw, 0, 0, end, 0, 0)

    def node(self, block: int, entries: list[tuple[int, int]], head: bytes, at: int) -> None:
        with self.editor.htree_node(self.number, block) as raw:
            limit = (1024 - at - (8 if self.editor.sealed else 0)) // 8
            raw[:] = head.ljust(1024, b"\0")
            for index, (value, child) in enumerate(entries):
                struct.pack_into("<II", raw, at + 8 * index, value, child)
            struct.pack_into("<HH", raw, at, limit, len(entries))

    def inner(self, block: int, entries: list[tuple[int, int]]) -> None:
        self.node(block, entries, struct.pack("<IHBB", 0, 1024, 0, 0), htree.NODE_ENTRIES_AT)

    def root(self, entries: list[tuple[int, int]], levels: int = 0, version: int = dirhash.HALF_MD4, *,
             zero: int = 0, info_length: int = 8, flags: int = 0) -> Core:
        dots = struct.pack("<IHBB4s", self.number, 12, 1, 2, b".") + struct.pack("<IHBB4s", 2, 1012, 2, 2, b"..")
        info = struct.pack("<IBBBB", zero, version, info_length, levels, flags)
        self.node(0, entries, dots + info, htree.ROOT_ENTRIES_AT)
        return Core(self.editor.data)

    def hash_of(self, name: bytes, version: int = dirhash.HALF_MD4) -> int:
        superblock = self.editor.fs.superblock
        return dirhash.dirhash(name, superblock.hash_version(version), superblock.hash_seed)[0]

    def find(self, core: Core, name: bytes) -> int:
        return core.run(directory.find, core.inode(self.number), name)


def in_hash_order(planted: Planted, count: int) -> list[list[bytes]]:
    """Names in leaves of about five, ascending by hash, and no hash in two leaves."""
    names = sorted((b"name-%d" % index for index in range(count)), key=planted.hash_of)
    return [names[at:at + 5] for at in range(0, count, 5)]


@pytest.mark.usefixtures("no_linear_search")
@pytest.mark.parametrize(("levels", "features"), [(0, ""), (1, ""), (2, ",large_dir"), (1, ",^metadata_csum")])
def test_planted_trees_of_every_depth(levels: int, features: str) -> None:
    planted = Planted(features=features)
    leaves = in_hash_order(planted, 200)
    row = []
    for block, names in enumerate(leaves, 1):
        planted.leaf(block, names)
        row.append((planted.hash_of(names[0]) if block > 1 else 0, block))
    next_block = len(leaves) + 1
    for _ in range(levels):
        parents = []
        for at in range(0, len(row), 7):
            planted.inner(next_block, row[at:at + 7])
            parents.append((row[at][0], next_block))
            next_block += 1
        row = parents
    core = planted.root(row, levels)
    for names in leaves:
        for name in names:
            assert planted.find(core, name) == 13
    with pytest.raises(Refused):
        planted.find(core, b"missing")
    assert planted.find(core, b"..") == 2


@pytest.mark.usefixtures("no_linear_search")
@pytest.mark.parametrize("begins_before", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_names_of_one_hash_in_several_leaves(begins_before: bool, deep: bool) -> None:
    """The lowest bit of an entry says that the hash before it goes on; the first leaf may begin with smaller ones."""
    planted = Planted()
    value = planted.hash_of(b"wanted")
    planted.leaf(3, [b"wanted"])
    first = value - 2 if begins_before else value
    row = [(0, 5), (first, 1), (value | CONTINUED, 2), (value | CONTINUED, 3), (value + 2, 4)]
    if deep:
        planted.inner(10, row[:2])
        planted.inner(11, row[2:3])
        planted.inner(12, row[3:])
        core = planted.root([(0, 10), (row[2][0], 11), (row[3][0], 12)], 1)
    else:
        core = planted.root(row)
    assert planted.find(core, b"wanted") == 13


def test_more_colliding_leaves_than_are_followed_are_searched_from_end_to_end() -> None:
    planted = Planted()
    value = planted.hash_of(b"wanted")
    planted.leaf(100, [b"wanted"])
    core = planted.root([(0, 101), (value, 1), *((value | CONTINUED, block) for block in range(2, 101))])
    top = core.run(directory.index_root, core.inode(planted.number))
    with pytest.raises(Corrupt) as caught:
        list(htree.leaves(top, lambda block: top.node, value))
    assert caught.value.check is Check.HTREE_DEPTH
    assert caught.value.where == {"hash": f"{value:#x}", "leaves": htree.MAX_CONTINUED}
    assert planted.find(core, b"wanted") == 13
    with pytest.raises(Refused):
        planted.find(core, b"missing")


def test_a_hash_that_needs_a_key_is_searched_from_end_to_end() -> None:
    planted = Planted()
    planted.leaf(7, [b"wanted"])
    core = planted.root([(0, 1)], version=dirhash.SIPHASH)
    assert planted.find(core, b"wanted") == 13


# ---- the walk over leaves, against a plain reading of the rules ------------------------------------------------

def random_tree(chosen: random.Random, levels: int) -> tuple[Root, dict[int, Node], list[tuple[int, int]]]:
    """A tree of nodes in memory, and its leaves in order as (hash with its lowest bit, block)."""
    hashes, count = [0], chosen.choice((1, 3, 30))
    while len(hashes) < count:
        last = hashes[-1] & ~CONTINUED
        goes_on = len(hashes) > 1 and chosen.random() < 0.5
        hashes.append(last | CONTINUED if goes_on else last + 2 * chosen.choice((1, 5)))
    row = leaves = [(value, 1000 + index) for index, value in enumerate(hashes)]
    nodes: dict[int, Node] = {}
    for level in range(levels):
        parents = []
        for at in range(0, len(row), 4):
            part = row[at:at + 4]
            number = 10 * level + at
            nodes[number] = Node([0] + [value for value, _ in part[1:]], [block for _, block in part])
            parents.append((part[0][0], number))
        row = parents
    return Root(Node([0] + [value for value, _ in row[1:]], [block for _, block in row]), 1, levels), nodes, leaves


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_the_leaves_of_a_hash(levels: int) -> None:
    chosen = seeded()
    for _ in range(200):
        top, nodes, leaves = random_tree(chosen, levels)
        for value in {value & ~CONTINUED for value, _ in leaves} | {0, 4, 1 << 31}:
            started = max(index for index, (found, _) in enumerate(leaves) if found <= value)
            expected = [leaves[started][1]]
            for _, (found, block) in pairwise(leaves[started:]):
                if found != value | CONTINUED:
                    break
                expected.append(block)
            assert list(htree.leaves(top, nodes.__getitem__, value)) == expected


# ---- broken nodes: the name is found without the tree ----------------------------------------------------------

def check_root(make: Callable[[Planted], Core], check: Check, /, **where: object) -> None:
    """The tree is refused for ``check``, and the directory is searched from end to end."""
    planted = Planted()
    planted.leaf(50, [b"wanted"])
    core = make(planted)
    found = core.inode(planted.number)
    with pytest.raises(Corrupt) as caught:
        core.run(walk, found, planted.hash_of(b"wanted"))
    assert caught.value.check is check, caught.value
    assert caught.value.where == {"inode": planted.number} | where
    assert planted.find(core, b"wanted") == 13
    assert [name.name for name in core.read_directory(found)] == [b".", b"..", b"wanted"]


def walk(fs: Ext4, found: Inode, value: int) -> list[int]:
    top = directory.index_root(fs, found)
    return list(htree.leaves(top, lambda block: directory.index_node(fs, found, block), value))


@pytest.mark.parametrize(("fields", "where"), [
    ({"zero": 1}, {}), ({"info_length": 0}, {"info_length": 0}), ({"info_length": 9}, {"info_length": 9}),
    ({"flags": 1}, {"flags": 1}), ({"version": 3}, {"version": 3}), ({"version": 255}, {"version": 255})])
def test_a_malformed_root(fields: dict[str, int], where: dict[str, int]) -> None:
    expected = {"version": 1, "info_length": 8, "flags": 0} | where
    check_root(lambda planted: planted.root([(0, 1)], **fields), Check.HTREE_ROOT, **expected)


@pytest.mark.parametrize("levels", [2, 3, 255])
def test_a_tree_too_deep(levels: int) -> None:
    check_root(lambda planted: planted.root([(0, 1)], levels), Check.HTREE_DEPTH, levels=levels)


def test_three_levels_only_with_large_dir() -> None:
    planted = Planted(features=",large_dir")
    with pytest.raises(Corrupt) as caught:
        core = planted.root([(0, 1)], 3)
        core.run(directory.index_root, core.inode(planted.number))
    assert caught.value.check is Check.HTREE_DEPTH and caught.value.where["levels"] == 3


@pytest.mark.parametrize("block", [0, 120, 121, 0x0FFFFFFF])
def test_an_entry_that_leaves_the_directory(block: int) -> None:
    """0 is the root itself: a loop."""
    check_root(lambda planted: planted.root([(0, 1), (2, block)]), Check.HTREE_NODE, file_block=0, blocks=120)


def test_hashes_out_of_order() -> None:
    check_root(lambda planted: planted.root([(0, 1), (8, 2), (6, 3)]), Check.HTREE_NODE, file_block=0,
               hashes="not ascending")


@pytest.mark.parametrize(("limit", "count"), [(123, 1), (125, 1), (0, 0), (124, 0), (124, 125)])
def test_a_count_or_limit_that_cannot_be(limit: int, count: int) -> None:
    """Without checksums: with them these fields also say where the checksum stands."""
    planted = Planted(features=",^metadata_csum")
    planted.leaf(50, [b"wanted"])
    planted.root([(0, 1)])
    with planted.editor.block(planted.start) as raw:
        struct.pack_into("<HH", raw, htree.ROOT_ENTRIES_AT, limit, count)
    core = Core(planted.editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(directory.index_root, core.inode(planted.number))
    assert caught.value.check is Check.HTREE_NODE
    assert caught.value.where == {"inode": planted.number, "file_block": 0, "limit": limit, "count": count}
    assert planted.find(core, b"wanted") == 13


def test_inner_nodes_that_lead_to_themselves_end() -> None:
    """Levels are counted, so a loop ends at a block that is no leaf, and the name is searched from end to end."""
    planted = Planted()
    planted.leaf(50, [b"wanted"])
    planted.inner(60, [(0, 60)])
    core = planted.root([(0, 60)], 1)
    with pytest.raises(Refused):
        planted.find(core, b"wanted")
    assert b"wanted" in [name.name for name in core.read_directory(core.inode(planted.number))]


def test_a_leaf_where_a_node_should_be() -> None:
    """Its checksum is one of a leaf."""
    planted = Planted()
    core = planted.root([(0, 7)], 1)
    with pytest.raises(Corrupt) as caught:
        planted.find(core, b"wanted")
    assert caught.value.check is Check.HTREE_CHECKSUM
    assert caught.value.where == {"inode": planted.number, "file_block": 7}


@pytest.mark.parametrize("block", [0, 60])
def test_a_node_whose_checksum_is_wrong(block: int) -> None:
    planted = Planted()
    planted.inner(60, [(0, 1)])
    planted.root([(0, 60)], 1)
    planted.editor.data[(planted.start + block) * 1024 + (36 if block == 0 else 12)] ^= 1
    core = Core(planted.editor.data)
    with pytest.raises(Corrupt) as caught:
        planted.find(core, b"wanted")
    assert caught.value.check is Check.HTREE_CHECKSUM
    assert caught.value.where == {"inode": planted.number, "file_block": block}
    with pytest.raises(Corrupt) as caught:
        core.read_directory(core.inode(planted.number))
    assert caught.value.check is Check.HTREE_CHECKSUM


def test_random_nodes_find_names_or_give_one_clear_error() -> None:
    chosen, planted = seeded(), Planted(features=",^metadata_csum")
    for block, names in enumerate(in_hash_order(planted, 100), 1):
        planted.leaf(block, names)
    planted.inner(60, [(0, 1), *((2 * block, block) for block in range(2, 20))])
    planted.root([(0, 60)], 1)
    original = bytes(planted.editor.data)
    for _ in range(300):
        planted.editor.data[:] = original
        for _ in range(chosen.choice((1, 3, 10))):
            block = chosen.choice((0, 60))
            at = (planted.start + block) * 1024 + chosen.randrange(24 if block == 0 else 0, 200)
            planted.editor.data[at] = chosen.choice((0, 1, 255, chosen.randrange(256)))
        core = Core(planted.editor.data)
        try:
            assert planted.find(core, b"name-50") == 13
        except Refused:
            pass
        except Corrupt as error:
            assert error.check.name.startswith("DIRENT")
