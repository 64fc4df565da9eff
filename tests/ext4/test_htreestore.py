"""Hash trees that grow: their shape as debugfs, e2fsck and the kernel see it, at every depth and with any hash."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fusewire.ext4 import directory, dirhash, dirspace, dirstore, htreestore, inodestore
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.inode import FLAG_INDEX, Inode
from fusewire.ext4.transaction import Transaction
from tests.ext4.driver import ENVIRONMENT, Core, Editor, debugfs, image, new_path
from tests.ext4.test_dirstore import REGULAR, add, assert_views_are_what_decoding_gives, folder, remove
from tests.ext4.twins import OurSide, kernel_side
from tests.ext4.writer import Writer

LONG = b"n" * 240
HASHES = ["legacy", "half_md4", "tea"]


def link_target(writer: Writer) -> int:
    """A file that the tests' names lead to; its link count is put right in the end by ``settle``."""
    assert OurSide(writer).do(("create", b"target")) == 0
    return writer.at("/target").number


def settle(writer: Writer, number: int, target: int) -> None:
    """Count the names that lead to the target."""
    count = sum(name.inode == target for name in writer.read_directory(writer.inode(number))) + 1
    writer.change(lambda tx: inodestore.change(tx, tx.inode(target), links=min(count, 65000)))


def many(writer: Writer, number: int, names: list[bytes], target: int, at_once: int = 50) -> None:
    """Enter names, several in a transaction."""
    def run(tx: Transaction, part: list[bytes]) -> None:
        of = tx.inode(number)
        for name in part:
            of = dirstore.add(tx, of, name, target, REGULAR)

    for start in range(0, len(names), at_once):
        writer.change(run, names[start:start + at_once])


def levels(writer: Writer, number: int) -> int:
    of = writer.inode(number)
    return writer.run(directory.index_root, of).levels if of.flags & FLAG_INDEX else 0


def dumped(writer: Writer, number: int) -> str:
    """What debugfs says of the tree, once it is on disk."""
    writer.commit()
    done = subprocess.run(["debugfs", "-R", f"htree_dump <{number}>", writer.path], capture_output=True,
                          env=ENVIRONMENT, check=True)  # it complains of lacking checksums where there are none
    return done.stdout.decode("latin-1")


def test_a_full_directory_becomes_a_tree() -> None:
    with Writer(image("-t ext4", 8192)) as writer:
        number, target = folder(writer), link_target(writer)
        indexed = []
        for index in range(6):
            indexed.append(bool(add(writer, number, b"%d" % index + LONG, target).flags & FLAG_INDEX))
        assert indexed == [False] * 3 + [True] * 3
        text = dumped(writer, number)
        assert "Reserved zero: 0" in text
        assert "Indirect levels: 0" in text
        assert re.findall(r"Number of entries \(count\): (\d+)", text) == ["2"]
        assert writer.run(dirstore.parent_of, writer.inode(number)) == 2
        settle(writer, number, target)
        writer.check()


@pytest.mark.parametrize("block", [1024, 2048, 4096])
@pytest.mark.parametrize("features", ["", "-O ^metadata_csum", "-O ^filetype,^metadata_csum,^orphan_file"])
def test_a_tree_of_two_levels(block: int, features: str) -> None:
    """The root has no room for more leaves: they get nodes of their own, which split in turn."""
    with Writer(image(f"-t ext4 -b {block} {features}", 65536)) as writer:
        number, target = folder(writer), link_target(writer)
        names = [b"%05d" % index + LONG for index in range({1024: 1200, 2048: 3500, 4096: 12000}[block])]
        many(writer, number, names, target)
        assert levels(writer, number) == 1
        assert_views_are_what_decoding_gives(writer, number)
        settle(writer, number, target)
        writer.check()
        assert "Indirect levels: 1" in dumped(writer, number)
        again = writer.reopened()
        for name in random.Random(block).sample(names, 100):
            assert again.run(dirstore.locate, again.inode(number), name) is not None
        assert again.run(dirstore.locate, again.inode(number), b"none") is None
        assert len(again.read_directory(again.inode(number))) == len(names) + 2
        again.close()


def shape_of(core: Core, path: str) -> list[tuple[int, int, list[bytes]]]:
    """The leaves of a directory's tree in order: hash, block, names in their places."""
    of = core.at(path)
    top = core.run(directory.index_root, of)
    rows = [(value, block, top.levels) for value, block in zip(*top.node, strict=True)]
    while any(level for _, _, level in rows):
        rows = [row for value, block, level in rows for row in (
            [(value, block, 0)] if not level else
            [(inner or value, child, level - 1)
             for inner, child in zip(*core.run(directory.index_node, of, block), strict=True)])]
    return [(value, block, [entry.name for entry in core.run(dirspace.names, of, block).entries])
            for value, block, _ in rows]


@pytest.mark.parametrize("features", ["", "-O ^metadata_csum"])
def test_a_tree_grows_into_the_kernels_shape(mounts: None, features: str) -> None:
    """Names come, go and are renamed on both sides: the same names end up in the same blocks."""
    print("seed 5")
    chance, source = random.Random(5), image(f"-t ext4 -b 1024 -N 4096 {features}", 16384)
    theirs, known = Path(shutil.copy(source, new_path())), [b"first"]
    with Writer(source) as writer:
        ours = OurSide(writer)
        with kernel_side(theirs) as kernel:
            kernel.hurried = True
            operations = [("mkdir", b"d"), ("create", b"d/first")]
            for index in range(2000):
                name = b"%05d" % index + b"n" * chance.choice([80, 180, 240])
                kind = chance.choice(["create"] * 5 + ["unlink", "rename"])
                victim = chance.choice(known)
                if kind != "create":
                    known.remove(victim)
                if kind != "unlink":
                    known.append(name)
                operations.append({"create": ("create", b"d/" + name), "unlink": ("unlink", b"d/" + victim),
                                   "rename": ("rename", b"d/" + victim, b"d/" + name)}[kind])
                known = known or [b"first"]
            for operation in operations:
                assert kernel.do(operation) == ours.do(operation)
        with Core(theirs) as core:
            wanted = shape_of(core, "/d")
        assert levels(writer, writer.at("/d").number) == 1
        assert shape_of(writer, "/d") == wanted
        writer.check()


def test_a_tree_that_is_full_gives_enospc_and_with_large_dir_a_third_level(mounts: None) -> None:
    with Writer(image("-t ext4 -b 1024", 131072), batch_blocks=4000) as writer:
        number, target = folder(writer), link_target(writer)
        entered = fill_the_tree(writer, number, target)
        assert levels(writer, number) == 1
        settle(writer, number, target)
        writer.check()
        debugfs(writer.path, "feature large_dir", write=True)
        larger = Writer(writer.path, copy=False)
    with larger as writer:
        add(writer, number, b"%06d" % entered + LONG, target)
        assert levels(writer, number) == 2
        many(writer, number, [b"%06d" % index + LONG for index in range(entered + 1, entered + 200)], target)
        settle(writer, number, target)
        writer.check()
        assert_views_are_what_decoding_gives(writer, number)
        with kernel_side(writer.path) as kernel:
            assert len(os.listdir(kernel.at(b"d"))) == entered + 200
            for index in (0, entered, entered + 199):
                assert kernel.do(("unlink", b"d/%06d" % index + LONG)) == 0


def fill_the_tree(writer: Writer, number: int, target: int) -> int:
    """Enter names until the tree refuses; how many."""
    entered, at_once = 0, 100
    while True:
        names = [b"%06d" % index + LONG for index in range(entered, entered + at_once)]
        try:
            many(writer, number, names, target, at_once)
        except Refused as refusal:
            assert refusal.errno == errno.ENOSPC
            if at_once == 1:
                return entered
            at_once = 1
        else:
            entered += at_once


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("name", HASHES)
def test_names_are_ordered_by_the_hash_that_the_disk_asks_for(name: str, unsigned: bool) -> None:
    """Bytes above 127 hash differently where characters are signed; e2fsck says whether a leaf's names belong there."""
    editor = Editor(image("-t ext4 -b 1024", 16384)).put_super(
        def_hash_version=HASHES.index(name), flags=2 if unsigned else 1)
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        number, target = folder(writer), link_target(writer)
        chance = random.Random(7)
        letters = b"ab\x80\xc3\xff\xe9"
        names = {bytes(chance.choices(letters, k=chance.randrange(3, 60))) for _ in range(800)}
        many(writer, number, sorted(names), target)
        settle(writer, number, target)
        writer.check()
        assert f"Hash Version: {HASHES.index(name)}" in dumped(writer, number)
        again = writer.reopened()
        assert all(again.run(dirstore.locate, again.inode(number), found) is not None for found in names)
        again.close()


def test_a_disk_without_a_usable_hash_keeps_its_directories_linear() -> None:
    editor = Editor(image("-t ext4", 8192)).put_super(def_hash_version=9)
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        number = folder(writer)
        for index in range(20):
            assert not add(writer, number, b"%d" % index + LONG).flags & FLAG_INDEX


# ---- equal hashes --------------------------------------------------------------------------------------------------

def with_constant_hash(monkeypatch: pytest.MonkeyPatch, value: int = 0x12345678) -> None:
    """Let all names have one hash, as an attacker's would; the disk cannot tell."""
    monkeypatch.setattr(htreestore, "_hash", lambda name, version, seed: (value, 0))
    monkeypatch.setattr(dirhash, "dirhash", lambda name, version, seed: (value, 0))


def test_equal_hashes_go_on_in_the_next_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    with Writer(image("-t ext4 -b 1024", 16384)) as writer:
        number = folder(writer)
        with_constant_hash(monkeypatch)
        names = [b"%d" % index + LONG for index in range(60)]
        for name in names:
            add(writer, number, name)
        top = writer.run(directory.index_root, writer.inode(number)).node
        assert len(top.blocks) > 10
        assert all(value & 1 for value in top.hashes[1:])
        assert_views_are_what_decoding_gives(writer, number)
        for name in names:
            assert writer.run(dirstore.locate, writer.inode(number), name) is not None
        for name in names[::2]:
            remove(writer, number, name)
        left = {name.name for name in writer.read_directory(writer.inode(number))}
        assert left == {*names[1::2], b".", b".."}


# Behind 234 times "n", these have the same legacy hash two by two.
COLLIDING = (b"aafcb abgca abjjo abojo acdpl achpl adieo adioe adiee adioo admeo admoe admee admoo aeedk aeefi "
             b"aeedi aeefk aehog aepog aadjk afbjp afdpd afmic agknk agnnk agjfk agofk ahcdh ahgdh aioap aioel").split()


def test_names_that_collide_in_truth_are_found_by_the_kernel(mounts: None) -> None:
    """Four names fill a leaf; with others between them pairs are torn apart, and the tree says where a hash goes on."""
    editor = Editor(image("-t ext4 -b 1024", 8192)).put_super(def_hash_version=dirhash.LEGACY, flags=1)
    path = new_path()
    path.write_bytes(editor.data)
    names = [b"n" * 234 + name for name in COLLIDING]
    seed = editor.fs.superblock.hash_seed
    assert len({dirhash.dirhash(name, dirhash.LEGACY, seed)[0] for name in names}) == len(names) // 2
    with Writer(path, copy=False) as writer:
        number, target = folder(writer), link_target(writer)
        names += [b"n" * 234 + b"alone%d" % index for index in range(10)]
        random.Random(1).shuffle(names)
        many(writer, number, names, target, 1)
        assert any(value & 1 for value in writer.run(directory.index_root, writer.inode(number)).node.hashes)
        settle(writer, number, target)
        writer.check()
        with kernel_side(path) as kernel:
            assert sorted(os.listdir(kernel.at(b"d"))) == sorted(names)
            for name in names:
                assert kernel.do(("unlink", b"d/" + name)) == 0


# ---- broken indexes ------------------------------------------------------------------------------------------------

def broken(features: str) -> tuple[Writer, int]:
    """A directory whose index claims a hash that does not exist."""
    with Writer(image(f"-t ext4 -b 1024 {features}", 8192)) as writer:
        number = folder(writer)
        for index in range(12):
            add(writer, number, b"%d" % index + LONG, 11)
        writer.commit()
        editor = Editor(writer.path)
    with editor.htree_node(number) as raw:
        raw[28] = 77
    path = new_path()
    path.write_bytes(editor.data)
    return Writer(path, copy=False), number


def test_a_broken_index_is_given_up_where_no_checksum_vouches_for_it() -> None:
    writer, number = broken("-O ^metadata_csum")
    with writer:
        after = add(writer, number, b"new" + LONG)
        assert not after.flags & FLAG_INDEX
        assert {b"new" + LONG, b"3" + LONG} <= {name.name for name in writer.read_directory(after)}


def test_a_broken_index_under_a_checksum_refuses_names() -> None:
    writer, number = broken("-O metadata_csum")
    with writer:
        with pytest.raises(Corrupt) as caught:
            add(writer, number, b"new" + LONG)
        assert caught.value.check is Check.HTREE_ROOT
        assert not isinstance(writer.run(dirstore.locate, writer.inode(number), b"3" + LONG), type(None))


# ---- size ----------------------------------------------------------------------------------------------------------

def blocks_touched(writer: Writer, operation: object, number: int, name: bytes) -> int:
    """How many blocks one operation edits."""
    of: Inode = writer.inode(number)
    with Transaction(writer.fs) as tx:
        operation(tx, of, name)  # type: ignore[operator]
        return len(tx.overlay.edited)


def test_a_large_directory_costs_a_name_no_more_blocks_than_a_small_one() -> None:
    with Writer(image("-t ext4 -b 1024", 65536), batch_blocks=8000) as writer:
        number, target = folder(writer), link_target(writer)
        many(writer, number, [b"file-%06d" % index for index in range(20_000)], target, 500)
        assert levels(writer, number) == 1
        touched = [blocks_touched(writer, lambda tx, of, name: dirstore.add(tx, of, name, target, REGULAR), number,
                                  b"another-%d" % index) for index in range(21)]
        assert sorted(touched)[10] == 2
        for index in range(0, 20_000, 200):
            remove(writer, number, b"file-%06d" % index)
        settle(writer, number, target)
        writer.check()
        assert len(writer.read_directory(writer.inode(number))) == 20_000 - 100 + 21 + 2
