"""Directories that grow, shrink and change: what is kept beside a block is what the block says, always."""

from __future__ import annotations

import random

import pytest

from fusewire.ext4 import (
    dirblock,
    directory,
    dirrecords,
    dirspace,
    dirstore,
    inode,
    inodestore,
    namespace,
    namestore,
    orphan,
)
from fusewire.ext4.dirblock import DirBlock
from fusewire.ext4.dirrecords import FILE_TYPES, Link, Room
from fusewire.ext4.errors import Check, Corrupt
from fusewire.ext4.inode import FLAG_INDEX, Inode
from fusewire.ext4.transaction import Transaction
from tests.ext4.driver import Editor, debugfs, image, new_path
from tests.ext4.twins import ROOT, OurSide
from tests.ext4.writer import Writer

REGULAR = 0o100644
LINEAR = "-t ext4 -O ^dir_index"
FORMS = ["-t ext4", "-t ext4 -b 4096", LINEAR, "-t ext3 -O ^filetype", "-t ext4 -O ^metadata_csum"]


def folder(writer: Writer, name: bytes = b"d") -> int:
    """A new directory's number."""
    assert OurSide(writer).do(("mkdir", name)) == 0
    return writer.run(namespace.lookup, writer.root(), name)


def add(writer: Writer, number: int, name: bytes, target: int = 11, mode: int = REGULAR) -> Inode:
    return writer.change(lambda tx: dirstore.add(tx, tx.inode(number), name, target, mode))


def remove(writer: Writer, number: int, name: bytes) -> Inode:
    def run(tx: Transaction) -> Inode:
        found = dirstore.locate(tx, tx.inode(number), name)
        assert found is not None
        return dirstore.remove(tx, tx.inode(number), found)

    return writer.change(run)


def shape(block: DirBlock) -> tuple[object, ...]:
    return block.entries, block.names


def assert_views_are_what_decoding_gives(writer: Writer, number: int) -> None:
    """Every view beside every block of a directory, compared with a fresh one of the block's bytes."""
    fs, of = writer.fs, writer.inode(number)
    indexed = bool(of.flags & FLAG_INDEX) and fs.has_dir_index
    for file_block in range(fs.geometry.blocks_for(of.size)):
        known = writer.run(dirspace.names, of, file_block)
        entry = fs.cache.entry(writer.run(dirspace.device_block, of, file_block))
        data = bytes(entry.data)
        assert shape(known) == shape(dirblock.decode(fs, data, encrypted=False, inode=number))
        assert known.file_block == file_block
        end = fs.geometry.block_bytes if indexed and not file_block else dirspace.records_end(fs)
        if not (indexed and dirblock.is_one_record(data)):
            fresh, free = dirrecords.room(data, end), writer.run(dirspace.room, of, file_block)
            assert (free.starts, free.spare) == (fresh.starts, fresh.spare)
        for key, decode in (("htree", directory.htree.inner), ("htree root", directory.htree.root)):
            view = entry.views.get((key, number, of.generation))
            if view is not None:
                again = decode(fs, of, data, file_block) if key == "htree" else decode(fs, of, data)
                assert view == again


# ---- one block ------------------------------------------------------------------------------------------------------

def empty_block(size: int = 1024, end: int = 1012) -> bytearray:
    data = bytearray(size)
    dirrecords.fill(data, end, [])
    return data


@pytest.mark.parametrize("seed", range(6))
def test_records_and_views_stay_the_same_under_any_change(seed: int) -> None:
    """A block in bytes beside its views, changed at random: both say the same after each step."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    with Writer(image("-t ext4", 4096)) as writer:
        fs, size = writer.fs, 1024
        end = chance.choice([size, size - 12])
        data = empty_block(size, end)
        names, free = dirblock.decode(fs, bytes(data), encrypted=False), dirrecords.room(bytes(data), end)
        model: dict[bytes, tuple[int, int]] = {}
        for _ in range(400):
            name = b"%d" % chance.randrange(40) + b"x" * chance.choice([0, 1, 2, 3, 40, 200])
            link = Link(name, chance.randrange(1, 16), chance.choice(list(FILE_TYPES.values())))
            if name not in model:
                slot = free.slot(dirrecords.record_bytes(len(name)))
                if slot is None:
                    continue
                names, free = dirrecords.enter(data, names, free, slot, link)
                model[name] = link.inode, link.file_type
            elif chance.random() < 0.7:
                names, free = dirrecords.leave(data, names, free, name)
                del model[name]
            else:
                names = dirrecords.point(data, names, free, link)
                model[name] = link.inode, link.file_type
            fresh = dirblock.decode(fs, bytes(data), encrypted=False)
            room = dirrecords.room(bytes(data), end)
            assert shape(names) == shape(fresh)
            assert (free.starts, free.spare) == (room.starts, room.spare)
            assert {link.name: (link.inode, link.file_type) for link, _ in dirrecords.links(bytes(data), end)} == model


def test_a_name_that_stands_twice_is_removed_once() -> None:
    """Only a broken disk has one; the views must still be what decoding gives."""
    data = empty_block()
    names, free = DirBlock([]), dirrecords.room(bytes(data), 1012)
    for name, target in ((b"a", 1), (b"b", 2), (b"c", 3)):
        slot = free.slot(12)
        assert slot is not None
        names, free = dirrecords.enter(data, names, free, slot, Link(name, target, 1))
    data[data.index(b"b")] = ord("a")
    with Writer(image("-t ext4", 4096)) as writer:
        names = dirblock.decode(writer.fs, bytes(data), encrypted=False)
        for left in (2, 1):
            names, free = dirrecords.leave(data, names, free, b"a" if left == 2 else b"c")
            assert shape(names) == shape(dirblock.decode(writer.fs, bytes(data), encrypted=False))
            assert len(names.entries) == left


def test_removed_names_leave_no_bytes_behind() -> None:
    data = empty_block()
    names, free = dirrecords.enter(data, DirBlock([]), dirrecords.room(bytes(data), 1012), 0, Link(b"secret", 3, 1))
    dirrecords.leave(data, names, free, b"secret")
    assert data == empty_block()


@pytest.mark.parametrize("length", [12, 65524, 65536])
def test_lengths_in_blocks_of_64_kib(length: int) -> None:
    data = bytearray(65536)
    dirrecords.fill(data, length, [])
    free = dirrecords.room(bytes(data), length)
    assert free.spare == [(0, length)]
    if length == 65536:
        assert dirblock.is_one_record(bytes(data))


def test_records_over_the_checksum_are_refused() -> None:
    data = empty_block(1024, 1024)
    with pytest.raises(Corrupt) as caught:
        dirrecords.room(bytes(data), 1012, inode=5)
    assert caught.value.check is Check.DIRENT_LENGTH


def test_room_is_found_first_fit() -> None:
    free = Room([0, 12, 40, 80], [(12, 12), (40, 24), (80, 944)])
    assert [free.slot(need) for need in (12, 16, 24, 28, 944, 948)] == [0, 1, 1, 2, 2, None]


# ---- whole directories ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_directory_is_what_a_dictionary_is(form: str, seed: int) -> None:
    """Random additions, removals and replacements, looked at through the core and through debugfs."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    model: dict[bytes, int] = {}
    with Writer(image(form, 16384)) as writer:
        number = folder(writer)
        targets = [writer.change(lambda tx: namestore.tmpfile(tx, tx.inode(2), 0o644, ROOT)).number for _ in range(4)]
        for step in range(900):
            name = b"%d" % chance.randrange(350) + b"-" * chance.choice([1, 7, 30, 120])
            if name not in model:
                model[name] = chance.choice(targets)
                add(writer, number, name, model[name])
            elif chance.random() < 0.6:
                remove(writer, number, name)
                del model[name]
            else:
                model[name] = chance.choice(targets)
                replace(writer, number, name, model[name])
            if step % 150 == 0:
                assert_views_are_what_decoding_gives(writer, number)
        assert_views_are_what_decoding_gives(writer, number)
        for target in targets:
            writer.change(count_names, target, list(model.values()).count(target))
        writer.check()
        again = writer.reopened()
        found = {name.name: name.inode for name in again.read_directory(again.inode(number))}
        assert {name: target for name, target in found.items() if name not in (b".", b"..")} == model
        for name in [*model, b"none", b"0"]:
            assert (again.run(dirstore.locate, again.inode(number), name) is not None) == (name in model)
        listed = debugfs(again.path, f"ls -p <{number}>")
        assert {line.split("/")[5].encode() for line in listed.splitlines()
                if line.startswith("/") and not line.startswith("/0/")} == {*model, b".", b".."}
        again.close()


def count_names(tx: Transaction, number: int, names: int) -> None:
    """Make an inode that was without names one that has so many."""
    orphan.remove(tx, number)
    inodestore.change(tx, tx.inode(number), links=names)


def replace(writer: Writer, number: int, name: bytes, target: int) -> None:
    def run(tx: Transaction) -> None:
        found = dirstore.locate(tx, tx.inode(number), name)
        assert found is not None
        dirstore.replace(tx, tx.inode(number), found, target, REGULAR)

    writer.change(run)


def test_a_failed_operation_leaves_the_views_as_they_were() -> None:
    with Writer(image("-t ext4", 8192)) as writer:
        number = folder(writer)
        for index in range(30):
            add(writer, number, b"%d" % index + b"n" * 100)
        before = [name.name for name in writer.read_directory(writer.inode(number))]

        class Stop(Exception):
            pass

        def fail(tx: Transaction) -> None:
            for index in range(40):
                dirstore.add(tx, tx.inode(number), b"more%d" % index + b"n" * 100, 11, REGULAR)
            found = dirstore.locate(tx, tx.inode(number), b"3" + b"n" * 100)
            assert found is not None
            dirstore.remove(tx, tx.inode(number), found)
            raise Stop

        with pytest.raises(Stop):
            writer.change(fail)
        assert [name.name for name in writer.read_directory(writer.inode(number))] == before
        assert_views_are_what_decoding_gives(writer, number)


def test_a_linear_directory_is_filled_again_where_names_were_removed() -> None:
    with Writer(image(LINEAR, 8192)) as writer:
        number = folder(writer)
        for index in range(60):
            add(writer, number, b"%03d" % index + b"n" * 97)
        size = writer.inode(number).size
        assert size > 4096
        for index in (3, 17, 40):
            remove(writer, number, b"%03d" % index + b"n" * 97)
        for index in (3, 17, 40):
            assert add(writer, number, b"new%03d" % index + b"n" * 94).size == size
        assert_views_are_what_decoding_gives(writer, number)


def test_a_linear_directory_is_not_searched_for_room_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred blocks are full: the next name looks at the last ones only."""
    with Writer(image(LINEAR, 16384)) as writer:
        number = folder(writer)
        for index in range(800):
            add(writer, number, b"%03d" % index + b"n" * 97)
        of = writer.inode(number)
        assert writer.fs.geometry.blocks_for(of.size) > 80
        looked: set[int] = set()
        entry = writer.fs.cache.entry
        monkeypatch.setattr(writer.fs.cache, "entry", lambda block: looked.add(block) or entry(block))
        add(writer, number, b"the last one" + b"n" * 97)
        assert 0 < len(looked) < 10


@pytest.mark.parametrize("form", FORMS)
def test_the_parent_of_a_directory_can_change(form: str) -> None:
    with Writer(image(form, 8192)) as writer:
        number, other = folder(writer), folder(writer, b"o")
        for index in range(40):
            add(writer, number, b"%d" % index + b"n" * 100)
        writer.change(lambda tx: dirstore.set_parent(tx, tx.inode(number), other))
        assert writer.run(dirstore.parent_of, writer.inode(number)) == other
        assert_views_are_what_decoding_gives(writer, number)
        again = writer.reopened()
        assert again.run(dirstore.parent_of, again.inode(number)) == other
        assert again.run(dirstore.locate, again.inode(number), b"39" + b"n" * 100) is not None
        again.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_directory_is_empty_when_its_last_name_went(form: str) -> None:
    with Writer(image(form, 8192), cache_bytes=1) as writer:
        number = folder(writer)
        assert writer.run(dirstore.is_empty, writer.inode(number))
        names = [b"%d" % index + b"n" * 150 for index in range(60)]
        for name in names:
            add(writer, number, name)
        for name in names:
            assert not writer.run(dirstore.is_empty, writer.inode(number))
            remove(writer, number, name)
        again = writer.reopened()
        assert again.run(dirstore.is_empty, again.inode(number))
        assert again.inode(number).size > 4096
        again.close()


def test_a_flag_for_an_index_that_the_disk_does_not_have_goes() -> None:
    editor = Editor(image(LINEAR, 4096, commands=("mkdir /d",)))
    editor.put_inode(editor.number("/d"), flags=0x81000)
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        assert OurSide(writer).do(("create", b"d/f")) == 0
        assert not writer.at("/d").flags & FLAG_INDEX
        writer.check()


def fill_up(writer: Writer, number: int) -> None:
    for index in range(20):
        add(writer, number, b"more%d" % index + b"n" * 200)


@pytest.mark.parametrize("size", [0, 2560])
def test_a_directory_of_impossible_size_does_not_grow(size: int) -> None:
    """Shorter than its blocks, or ending within one."""
    with Writer(image(LINEAR, 4096)) as writer:
        number = folder(writer)
        for index in range(12):
            add(writer, number, b"%d" % index + b"n" * 200)
        assert writer.inode(number).size == 3072
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), size=size))
        with pytest.raises(Corrupt) as caught:
            fill_up(writer, number)
        assert caught.value.check is Check.DIRECTORY_SIZE


def test_a_directory_without_dots_is_not_taken_for_one() -> None:
    editor = Editor(image("-t ext4", 4096, commands=("mkdir /d",)))
    number = editor.number("/d")
    with editor.dir_block(number) as raw:
        raw[20:22] = b"xy"
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        with pytest.raises(Corrupt) as caught:
            writer.change(lambda tx: dirstore.set_parent(tx, tx.inode(number), 2))
        assert caught.value.check is Check.DIRENT_NAME
        with pytest.raises(Corrupt) as caught:
            fill_up(writer, number)
        assert caught.value.check is Check.DIRENT_NAME


def test_times_and_version_say_that_a_directory_changed() -> None:
    with Writer(image("-t ext4 -I 256", 4096)) as writer:
        number = folder(writer)
        before = writer.inode(number)
        writer.clock = (1_700_000_000, 7)
        after = add(writer, number, b"f")
        assert (after.mtime, after.ctime, after.atime) == ((1_700_000_000, 7), (1_700_000_000, 7), before.atime)
        assert after.version == before.version + 1
        assert inode.load(writer.fs, number) is after
