"""Orphans: noted where the kernel and e2fsck look for them, found where these note them."""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path
from unittest.mock import patch

import pytest

from fusewire.ext4 import dirspace, inode, inodefree, namestore, orphan, superstore
from fusewire.ext4.errors import Check, Corrupt
from fusewire.ext4.features import Feature
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.inode import Inode
from fusewire.ext4.transaction import Transaction
from tests.ext4.driver import Editor, debugfs, image, new_path, run_tool
from tests.ext4.twins import ROOT, OurSide, kernel_side
from tests.ext4.writer import Writer

LIST = "-t ext4 -b 1024 -N 1024 -O ^orphan_file"
FILE = "-t ext4 -b 1024 -N 1024 -O orphan_file -E orphan_file_size=32"
OLD = "-t ext3 -b 1024 -I 128 -N 1024"
FORMS = [LIST, FILE, OLD, "-t ext4 -b 4096 -N 1024 -O orphan_file,^metadata_csum"]
FIRST, LAST = 20, 200       # inodes that exist in the images of these tests


def populated(form: str, kib: int = 8192) -> Path:
    """An image with files up to inode ``LAST`` at least."""
    return image(form, kib, commands=tuple(f"write /dev/null f{index}" for index in range(LAST)))


def set_present(tx: Transaction, present: bool) -> None:
    """Say in the superblock whether the orphan file may hold anything, as a mount does."""
    flags, mask = superstore.get(tx, "feature_ro_compat"), Feature.ORPHAN_PRESENT.mask
    superstore.change(tx, feature_ro_compat=flags | mask if present else flags & ~mask)


def noted(writer: Writer) -> list[int]:
    return writer.run(orphan.numbers)


def in_file(writer: Writer) -> bool:
    return Feature.ORPHAN_FILE in writer.fs.superblock.features


# ---- notes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_notes_are_a_set(form: str, memory: bool, seed: int) -> None:
    """Added and removed in any order; with and without what is remembered of where each was noted."""
    print(f"seed {seed}")
    chance, model = random.Random(seed), list[int]()
    with Writer(populated(form)) as writer:
        assert writer.fs.writing is not None
        for _ in range(300):
            if model and chance.random() < 0.45:
                number = chance.choice([model[0], model[-1], chance.choice(model)])
                model.remove(number)
                writer.change(orphan.remove, number)
            else:
                number = chance.randrange(FIRST, LAST)
                writer.change(orphan.add, number)
                if number not in model:
                    model.append(number)
            if not memory:
                writer.fs.writing.orphans.update(dict.fromkeys(writer.fs.writing.orphans, chance.choice([-1, -30, 3])))
            assert sorted(writer.fs.writing.orphans) == sorted(model)
        assert sorted(noted(writer)) == sorted(model)
        if not in_file(writer):
            assert noted(writer) == model[::-1]
        again = writer.reopened()
        assert again.run(orphan.recall) == noted(again)
        assert again.fs.writing is not None
        assert sorted(again.fs.writing.orphans) == sorted(model)
        for number in model:
            assert again.change(orphan.contains, number)
            again.change(orphan.remove, number)
            assert not again.change(orphan.contains, number)
        assert noted(again) == []
        again.check()
        again.close()


@pytest.mark.parametrize("form", FORMS)
def test_what_a_transaction_noted_counts_within_it_and_goes_with_it(form: str) -> None:
    class Stop(Exception):
        pass

    def fail(tx: Transaction) -> None:
        orphan.add(tx, 30)
        orphan.add(tx, 31)
        orphan.remove(tx, 40)
        assert [orphan.contains(tx, number) for number in (30, 31, 40, 41)] == [True, True, False, True]
        orphan.remove(tx, 30)
        assert not orphan.contains(tx, 30)
        raise Stop

    with Writer(populated(form)) as writer:
        for number in (40, 41):
            writer.change(orphan.add, number)
        before = noted(writer)
        with pytest.raises(Stop):
            writer.change(fail)
        assert [writer.change(orphan.contains, number) for number in (30, 31, 40, 41)] == [False, False, True, True]
        assert noted(writer) == before
        for number in before:
            writer.change(orphan.remove, number)
        writer.check()
        assert writer.fs.writing is not None
        assert writer.fs.writing.orphans == {}


def test_the_list_takes_what_the_full_file_does_not() -> None:
    with Writer(populated(FILE)) as writer:
        holder = writer.inode(writer.fs.superblock.fields["orphan_file_inum"])
        capacity = (holder.size >> 10) * 254
        with Transaction(writer.fs) as tx:
            for block in writer.run(orphan._file_blocks):
                writer.run(lambda fs, block=block: fs.cache.entry(block))
                raw = tx.edit(block)
                raw[:1016] = struct.pack("<254I", *[900] * 254)
                orphan._put(tx, block, 0, 900)
        assert len(list(writer.run(lambda fs: list(orphan._slots(fs))))) == capacity
        writer.change(orphan.add, 30)
        writer.change(orphan.add, 31)
        assert writer.run(superstore.get, "last_orphan") == 31
        assert noted(writer) == [31, 30, 900]
        writer.change(orphan.remove, 30)
        writer.change(orphan.remove, 31)
        assert noted(writer) == [900]


# ---- with e2fsck and the kernel --------------------------------------------------------------------------------------

def with_orphans(form: str) -> tuple[Writer, list[int], tuple[int, int]]:
    """An image whose files were removed while in use, and how much was free before."""
    writer = Writer(image(form, 8192))
    assert writer.fs.writing is not None
    side = OurSide(writer, release=False)
    for operation in ("mkdir", b"kept"), ("create", b"kept/file"):
        assert side.do(operation) == 0
    free = writer.fs.writing.free_inodes, writer.fs.writing.free_clusters
    for index in range(12):
        assert side.do(("create", b"f%d" % index)) == 0
        assert side.do(("symlink", b"l%d" % index, b"t" * 100)) == 0
        assert side.do(("mkdir", b"d%d" % index)) == 0
    for index in range(12):
        for operation in ("unlink", b"f%d" % index), ("unlink", b"l%d" % index), ("rmdir", b"d%d" % index):
            assert side.do(operation) == 0
    writer.change(set_present, True)
    writer.commit()
    return writer, side.orphans, free


@pytest.mark.parametrize("form", FORMS)
def test_e2fsck_frees_our_orphans(form: str) -> None:
    writer, orphans, free = with_orphans(form)
    with writer:
        assert sorted(noted(writer)) == sorted(orphans)
        text = run_tool("e2fsck", "-fy", writer.path, allowed=(0, 1))
        assert text.count("Clearing orphaned inode") == 36
        writer.check_only()
        with Writer(writer.path, copy=False) as again:
            assert again.fs.writing is not None
            assert (again.fs.writing.free_inodes, again.fs.writing.free_clusters) == free
            assert again.names("/kept") == [b"file"]


@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_frees_our_orphans(mounts: None, form: str) -> None:
    writer, _, free = with_orphans(form)
    with writer:
        with kernel_side(writer.path) as kernel:
            assert os.listdir(kernel.at(b"kept")) == [b"file"]
        writer.check_only()
        with Writer(writer.path, copy=False) as again:
            assert again.fs.writing is not None
            assert (again.fs.writing.free_inodes, again.fs.writing.free_clusters) == free
            assert noted(again) == []


@pytest.mark.parametrize("form", FORMS)
def test_we_free_the_kernels_orphans(mounts: None, form: str) -> None:
    """Files that were removed while open, as the device holds them at that moment, its journal replayed."""
    path, copy = Path(shutil.copy(image(form, 8192), new_path())), new_path()
    with kernel_side(path) as kernel:
        opened = []
        for index in range(9):
            opened.append(os.open(kernel.at(b"f%d" % index), os.O_CREAT | os.O_RDWR, 0o600))
            os.write(opened[-1], b"data" * 3000)
        wanted = [os.fstat(descriptor).st_ino for descriptor in opened]
        for index in range(9):
            os.unlink(kernel.at(b"f%d" % index))
        opened.append(os.open(kernel.root, os.O_TMPFILE | os.O_RDWR))
        wanted.append(os.fstat(opened[-1]).st_ino)
        os.sync()
        shutil.copy(path, copy)
        for descriptor in opened:
            os.close(descriptor)
    debugfs(copy, "journal_run", write=True)
    with Writer(copy, copy=False) as writer:
        assert sorted(writer.run(orphan.recall)) == sorted(wanted)
        assert (Feature.ORPHAN_PRESENT in writer.fs.superblock.features) == in_file(writer)
        for number in wanted:
            OurSide(writer).free(number)
        assert noted(writer) == []
        if in_file(writer):
            assert not noted(writer)
        writer.change(set_present, False)
        writer.check()
        assert writer.fs.writing is not None
        assert writer.fs.writing.orphans == {}


# ---- freeing ---------------------------------------------------------------------------------------------------------

def held(writer: Writer, path: str) -> list[int]:
    """The device blocks of a directory or link."""
    of = writer.at(path)
    return [int(writer.run(dirspace.device_block, of, at)) for at in range(writer.fs.geometry.blocks_for(of.size))]


def test_what_removed_directories_and_links_held_is_revoked() -> None:
    with Writer(image("-t ext4 -b 1024", 8192)) as writer:
        side = OurSide(writer, release=False)
        assert side.do(("mkdir", b"d")) == side.do(("symlink", b"l", b"t" * 100)) == 0
        for index in range(40):
            assert side.do(("create", b"d/%d" % index + b"n" * 200)) == 0
        for index in range(40):
            assert side.do(("unlink", b"d/%d" % index + b"n" * 200)) == 0
        blocks = {block for path in ("/d", "/l") for block in held(writer, path)}
        assert len(blocks) > 8
        assert side.do(("rmdir", b"d")) == side.do(("unlink", b"l")) == 0
        for number in side.orphans:
            side.free(number)
        assert all(not writer.fs.cache.holds(block) for block in blocks)
        writer.check()
        assert writer.last is not None
        assert blocks <= writer.last.revoked
        assert not blocks & writer.last.blocks.keys()


def test_a_directory_in_many_pieces_is_freed_in_steps() -> None:
    with Writer(image("-t ext4 -b 1024", 16384)) as writer:
        assert writer.fs.writing is not None
        side, free = OurSide(writer, release=False), writer.fs.writing.free_clusters
        assert side.do(("mkdir", b"d")) == side.do(("mkdir", b"e")) == 0
        for index in range(300):
            for parent in (b"d", b"e"):
                assert side.do(("symlink", parent + b"/%d" % index + b"n" * 200, b"t")) == 0
        for index in range(300):
            for parent in (b"d", b"e"):
                assert side.do(("unlink", parent + b"/%d" % index + b"n" * 200)) == 0
        number, steps = writer.at("/d").number, 1
        assert side.do(("rmdir", b"d")) == 0
        while not writer.change(lambda tx: inodefree.release(tx, tx.inode(number))):
            assert writer.change(orphan.contains, number)
            steps += 1
        assert steps > 2
        assert side.do(("rmdir", b"e")) == 0
        for number in noted(writer):
            side.free(number)
        assert noted(writer) == []
        writer.check()
        assert writer.fs.writing.free_clusters == free


def test_a_freed_inode_says_when_it_went() -> None:
    with Writer(image("-t ext4", 8192)) as writer:
        writer.clock = (1_700_000_123, 0)
        made = writer.change(lambda tx: namestore.tmpfile(tx, tx.inode(2), 0o644, ROOT))
        assert made.links == 0
        assert noted(writer) == [made.number]
        OurSide(writer).free(made.number)
        assert orphan.next_of(writer.inode(made.number)) == 1_700_000_123
        writer.check()


# ---- broken disks ----------------------------------------------------------------------------------------------------

def opened(editor: Editor) -> Writer:
    path = new_path()
    path.write_bytes(editor.data)
    return Writer(path, copy=False)


@pytest.mark.parametrize("chain", [{0: 5000}, {0: 3}, {0: 30, 30: 30}, {0: 30, 30: 31, 31: 30}, {0: 30, 30: 1}])
def test_a_list_that_leads_astray_is_an_error(chain: dict[int, int]) -> None:
    editor = Editor(populated(LIST)).put_super(last_orphan=chain[0])
    for number in (30, 31):
        editor.put_inode(number, dtime=chain.get(number, 0))
    with opened(editor) as writer:
        with pytest.raises(Corrupt) as caught:
            noted(writer)
        assert caught.value.check is Check.ORPHAN_LIST


def test_an_orphan_that_is_not_where_it_should_be_is_an_error() -> None:
    for form in (LIST, FILE):
        with Writer(populated(form)) as writer:
            assert writer.fs.writing is not None
            writer.fs.writing.orphans[30] = -1
            with pytest.raises(Corrupt) as caught:
                writer.change(orphan.remove, 30)
            assert caught.value.check is Check.ORPHAN_LIST


def file_block(editor: Editor) -> int:
    return editor.device_block(editor.fs.superblock.fields["orphan_file_inum"], 0)


@pytest.mark.parametrize(("at", "value", "features"), [(1020, 1, ""), (1016, 1, ""), (0, 1, ""),
                                                      (1016, 1, ",^metadata_csum")])
def test_a_damaged_orphan_file_is_an_error(at: int, value: int, features: str) -> None:
    editor = Editor(image(FILE.replace("orphan_file ", f"orphan_file{features} "), 8192))
    with editor.block(file_block(editor)) as raw:
        raw[at] ^= value
    with opened(editor) as writer:
        with pytest.raises(Corrupt) as caught:
            noted(writer)
        assert caught.value.check is Check.ORPHAN_CHECKSUM
        with pytest.raises(Corrupt):
            writer.change(orphan.add, 30)


def test_an_orphan_file_with_impossible_content_is_an_error() -> None:
    editor = Editor(image(FILE.replace("orphan_file ", "orphan_file,^metadata_csum "), 8192))
    with editor.block(file_block(editor)) as raw:
        raw[40:44] = (77777).to_bytes(4, "little")
    with opened(editor) as writer, pytest.raises(Corrupt) as caught:
        noted(writer)
    assert caught.value.check is Check.ORPHAN_FILE


@pytest.mark.parametrize("size", [1 << 30, 1 << 18])
def test_an_orphan_file_of_impossible_size_is_an_error(size: int) -> None:
    editor = Editor(image(FILE, 8192))
    editor.put_inode(editor.fs.superblock.fields["orphan_file_inum"], size_lo=size)
    with opened(editor) as writer, pytest.raises(Corrupt) as caught:
        noted(writer)
    assert caught.value.check is Check.ORPHAN_FILE


def test_the_next_of_an_inode_is_its_dtime() -> None:
    editor = Editor(populated(LIST)).put_inode(30, dtime=0x01020304)
    with opened(editor) as writer:
        assert orphan.next_of(writer.run(inode.load, 30)) == 0x01020304


@pytest.mark.parametrize("circle", [False, True])
def test_a_long_list_over_more_blocks_than_the_cache_holds_is_walked_once(circle: bool) -> None:
    """Each inode of the list lies in another block of the table, so that each has to be waited for."""
    editor = Editor(image("-t ext4 -b 1024 -I 256 -N 8192 -O ^has_journal,^orphan_file", 16384))
    listed = list(range(20, 8000, 4))
    for number, following in zip(listed, [*listed[1:], listed[0] if circle else 0], strict=True):
        editor.put_inode(number, dtime=following)
    editor.put_super(last_orphan=listed[0])
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, cache_bytes=1, copy=False) as writer:
        assert writer.fs.cache.generation_blocks * 2 < len(listed)
        loaded = 0
        load = inode.load

        def counted(fs: Ext4, number: int) -> Inode:
            nonlocal loaded
            loaded += 1
            return load(fs, number)

        with patch.object(inode, "load", counted):
            if circle:
                with pytest.raises(Corrupt) as caught:
                    writer.run(orphan.recall)
                assert caught.value.check is Check.ORPHAN_LIST
            else:
                assert writer.run(orphan.recall) == listed
        assert loaded < 3 * len(listed)
