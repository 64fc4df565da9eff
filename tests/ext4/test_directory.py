"""Directories block by block: entries, cookies, searches that wait, encrypted names, and every rule about entries."""

import errno
import os
import struct
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import pytest

from fusewire.ext4 import blocks, directory, fscrypt, namespace
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.inode import FLAG_ENCRYPT, FLAG_INDEX, Inode
from tests import encrypted, populate
from tests.ext4.driver import Core, Editor, copied, image, new_path, rebuilt, seeded
from tests.mounting import kernel_mount

ROOT = 2
TAIL_BYTES = 12


@cache
def tree() -> Path:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    (root / "few").mkdir()
    for name in ("a", "bb", "ccc"):
        (root / "few" / name).write_bytes(b"")
    (root / "many").mkdir()
    for index in range(200):
        (root / "many" / f"name-{index:03}").write_bytes(b"")
    return root


@cache
def small(arguments: str = "-t ext4 -b 1024 -O ^has_journal,^resize_inode") -> Path:
    return image(arguments, 2048, tree())


def record(inode: int, length: int, name: bytes, kind: int = 1, name_length: int | None = None) -> bytes:
    head = struct.pack("<IHBB", inode, length, len(name) if name_length is None else name_length, kind)
    return (head + name).ljust(length, b"\0")


def put_records(editor: Editor, number: int, raw: bytes, file_block: int = 0) -> None:
    """Put records into a block of a directory; one unused record takes the rest."""
    with editor.dir_block(number, file_block) as block:
        end = len(block) - (TAIL_BYTES if editor.sealed else 0)
        if raw and len(raw) < end:
            raw += record(0, end - len(raw), b"")
        block[:len(raw)] = raw


def corrupt(raw: bytes, name: bytes = b"wanted") -> Corrupt:
    """The error of searching a directory whose one block holds these records."""
    editor = Editor(small())
    number = editor.number("/few")
    put_records(editor, number, raw)
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(directory.find, core.inode(number), name)
    with pytest.raises(Corrupt) as again:
        core.read_directory(core.inode(number))
    assert again.value.check is caught.value.check
    assert caught.value.where["inode"] == number and caught.value.where["file_block"] == 0
    return caught.value


# ---- entries and cookies ---------------------------------------------------------------------------------------

def test_a_listing_holds_every_name_once_in_order() -> None:
    with Core(small()) as core:
        names = core.read_directory(core.at("/many"))
        assert sorted(name.name for name in names) == sorted([b".", b"..", *(b"name-%03d" % n for n in range(200))])
        assert [name.cookie for name in names] == sorted(name.cookie for name in names)
        assert names[0].name == b"." and names[1].name == b".." and names[1].inode == ROOT


def test_reading_goes_on_after_every_cookie() -> None:
    with Core(small()) as core:
        found = core.at("/many")
        names = core.read_directory(found)
        for index, name in enumerate(names):
            assert core.run(lambda fs, at=name.cookie: list(islice(directory.read(fs, found, at), 3))) == \
                names[index + 1:index + 4]


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_batches_of_any_size_give_the_same_names(batch: int) -> None:
    with Core(small()) as core:
        found = core.at("/many")
        assert core.read_directory(found, batch=batch) == core.read_directory(found)


def test_unused_entries_are_skipped_and_their_place_remembered() -> None:
    editor = Editor(small())
    number = editor.number("/few")
    used = record(12, 12, b"x"), record(13, 16, b"y")
    put_records(editor, number, record(0, 16, b"") + used[0] + record(0, 400, b"old") + used[1])
    core = Core(editor.data)
    found = core.inode(number)
    assert [(name.cookie, name.inode, name.name) for name in core.read_directory(found)] == [(28, 12, b"x"),
                                                                                          (444, 13, b"y")]
    assert [name.name for name in core.run(lambda fs: list(directory.read(fs, found, 28)))] == [b"y"]
    assert core.run(lambda fs: list(directory.read(fs, found, 444))) == []
    assert core.run(lambda fs: list(directory.read(fs, found, 1 << 40))) == []


def test_types_come_from_the_entry_where_the_file_system_keeps_them() -> None:
    for features, known in (("", True), (",^filetype", False)):
        with Core(small(f"-t ext4 -b 1024 -O ^has_journal,^resize_inode{features}")) as core:
            types = {name.name: name.d_type for name in core.read_directory(core.at("/few"))}
            assert types == {b".": 4 * known, b"..": 4 * known, b"a": 8 * known, b"bb": 8 * known, b"ccc": 8 * known}


def test_unknown_types_are_unknown() -> None:
    editor = Editor(small())
    number = editor.number("/few")
    put_records(editor, number, b"".join(record(12, 12, b"%d" % kind, kind) for kind in (0, 3, 7, 8, 99, 255)))
    types = [name.d_type for name in Core(editor.data).read_directory(Core(editor.data).inode(number))]
    assert types == [0, 2, 10, 0, 0, 0]


def test_records_longer_than_16_bits_can_say() -> None:
    """In 64 KiB blocks an empty block is one record of 65536 bytes, stored as 65535 or 0."""
    for stored in (0, 0xFFFF):
        editor = Editor(image("-t ext4 -b 65536 -O ^has_journal,^metadata_csum,^resize_inode", 16384, tree()))
        number = editor.number("/few")
        with editor.dir_block(number) as raw:
            raw[:8] = struct.pack("<IHBB", 0, stored, 0, 0)
        core = Core(editor.data)
        assert core.read_directory(core.inode(number)) == []
        assert core.names("/many") == sorted(b"name-%03d" % index for index in range(200))


# ---- broken entries --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("length", [0, 4, 8, 11, 13, 14, 15, 18, 1024, 0xFFFC, 0xFFFF])
def test_a_record_of_bad_length(length: int) -> None:
    error = corrupt(record(12, 12, b"x") + struct.pack("<IHBB", 12, length, 1, 1) + b"y\0\0\0")
    assert error.check is Check.DIRENT_LENGTH
    assert error.where["offset"] == 12 and error.where["length"] == length and error.where["name_length"] == 1


def test_a_record_shorter_than_its_name() -> None:
    error = corrupt(record(12, 12, b"name", name_length=5))
    assert error.check is Check.DIRENT_LENGTH
    assert error.where["length"] == 12 and error.where["name_length"] == 5


def test_a_block_that_ends_inside_a_record_head() -> None:
    editor = Editor(small("-t ext4 -b 1024 -O ^has_journal,^resize_inode,^metadata_csum"))
    number = editor.number("/few")
    put_records(editor, number, record(12, 1020, b"x") + b"\0\0\0\0")
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.read_directory(core.inode(number))
    assert caught.value.check is Check.DIRENT_LENGTH
    assert caught.value.where == {"offset": 1020, "inode": number, "file_block": 0}


@pytest.mark.parametrize("name", [b"a/b", b"/", b"nul\0", b"\0", b""])
def test_a_name_that_no_file_can_have(name: bytes) -> None:
    error = corrupt(record(12, 24, name))
    assert error.check is Check.DIRENT_NAME
    assert error.where["name"] == name and error.where["offset"] == 0


@pytest.mark.parametrize("number", [257, 1 << 20, 0xFFFFFFFF])
def test_an_inode_number_out_of_range(number: int) -> None:
    error = corrupt(record(number, 24, b"x"))
    assert error.check is Check.DIRENT_INODE
    assert error.where["inode_named"] == number and error.where["offset"] == 0


def test_a_block_whose_checksum_is_wrong() -> None:
    editor = Editor(small())
    number = editor.number("/few")
    editor.data[editor.device_block(number, 0) * 1024 + 50] ^= 1
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(directory.find, core.inode(number), b"a")
    assert caught.value.check is Check.DIRECTORY_CHECKSUM
    assert caught.value.where == {"inode": number, "file_block": 0}
    assert caught.value.errno == errno.EBADMSG


def test_a_block_without_room_for_its_checksum() -> None:
    editor = Editor(small())
    number = editor.number("/few")
    at = editor.device_block(number, 0) * 1024
    editor.data[at:at + 1024] = record(12, 1024, b"x")
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.read_directory(core.inode(number))
    assert caught.value.check is Check.DIRECTORY_CHECKSUM


def test_a_hole() -> None:
    editor = Editor(small())
    number = editor.number("/few")
    editor.put_inode(number, size_lo=2048)
    core = Core(editor.data)
    found = core.inode(number)
    assert core.run(directory.find, found, b"ccc")
    with pytest.raises(Corrupt) as caught:
        core.run(directory.find, found, b"missing")
    assert caught.value.check is Check.DIRECTORY_HOLE
    assert caught.value.where == {"inode": number, "file_block": 1}


def test_an_unwritten_block_is_a_hole() -> None:
    editor = Editor(small())
    number = editor.number("/few")
    with editor.inode(number) as raw:
        struct.pack_into("<H", raw, 0x28 + 12 + 4, 0x8001)
    with pytest.raises(Corrupt) as caught:
        Core(editor.data).names("/few")
    assert caught.value.check is Check.DIRECTORY_HOLE


def test_one_block_twice() -> None:
    """A directory that repeats a block would be as long as its extents say, and searching it would never end."""
    editor = Editor(small())
    number = editor.number("/few")
    start = editor.device_block(number, 0)
    rows = [struct.pack("<IHHI", first, 1, 0, start) for first in range(3)]
    root = struct.pack("<HHHHI", 0xF30A, 3, 4, 0, 0) + b"".join(rows)
    editor.put_inode(number, size_lo=3072, block=root)
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(directory.find, core.inode(number), b"missing")
    assert caught.value.check is Check.DIRECTORY_REPEATS
    assert caught.value.where == {"inode": number, "block": start, "file_block": 1, "also": 0}


# ---- directories that do not fit into the cache ----------------------------------------------------------------

LONG_BLOCKS = 6000


@cache
def long_editor() -> tuple[Editor, int]:
    """A linear directory of many empty blocks, with a name in the first, in the middle and in the last."""
    path = image("-t ext4 -b 1024 -O ^has_journal,^resize_inode,^metadata_csum,^dir_index", 16384, tree())
    editor = Editor(path)
    number, start = editor.number("/few"), 4000
    header = struct.pack("<HHHHI", 0xF30A, 1, 4, 0, 0)
    editor.put_inode(number, size_lo=LONG_BLOCKS * 1024,
                     block=header + struct.pack("<IHHI", 0, LONG_BLOCKS, 0, start))
    names = {0: b"first", LONG_BLOCKS // 2: b"middle", LONG_BLOCKS - 1: b"last"}
    for index in range(LONG_BLOCKS):
        name = names.get(index, b"")
        with editor.block(start + index) as raw:
            raw[:] = record(12 if name else 0, 1024, name)
    return editor, number


@pytest.mark.parametrize("name", [b"first", b"middle", b"last"])
def test_a_lookup_in_more_blocks_than_the_cache_holds_ends(name: bytes) -> None:
    editor, number = long_editor()
    core = Core(editor.data, cache_bytes=0)
    assert core.fs.cache.generation_blocks * 2 < LONG_BLOCKS
    assert core.run(directory.find, core.inode(number), name) == 12
    assert core.restarts <= LONG_BLOCKS // directory.READAHEAD_BLOCKS + 2
    with pytest.raises(Refused) as caught:
        core.run(directory.find, core.inode(number), b"missing")
    assert caught.value.errno == errno.ENOENT
    assert core.fs.scans == {}


def test_a_listing_of_more_blocks_than_the_cache_holds_ends() -> None:
    editor, number = long_editor()
    core = Core(editor.data, cache_bytes=0)
    found = core.inode(number)
    names = core.run(lambda fs: list(directory.read(fs, found, 0)))
    assert [name.name for name in names] == [b"first", b"middle", b"last"]
    assert core.restarts <= LONG_BLOCKS // directory.READAHEAD_BLOCKS + 2


def test_a_failed_search_leaves_nothing_behind() -> None:
    """An error of the device ends a search; the next one begins at the start."""
    editor, number = long_editor()
    core = Core(editor.data, cache_bytes=0)
    core.failing = {4000 + 5000}
    with pytest.raises(OSError, match="device"):
        core.run(directory.find, core.inode(number), b"last")
    assert core.fs.scans == {}
    core.failing = set()
    assert core.run(directory.find, core.inode(number), b"last") == 12


def test_searches_that_are_given_up_are_forgotten() -> None:
    """Callers may go away while they wait: what is remembered for them is bounded, and others end all the same."""
    editor, number = long_editor()
    core = Core(editor.data, cache_bytes=0)
    found = core.inode(number)
    for index in range(3000):
        with pytest.raises(blocks.BlockMiss):
            directory.find(core.fs, found, b"given up %d" % index)
    assert len(core.fs.scans) <= 1024
    assert core.run(directory.find, found, b"last") == 12


def test_a_changed_directory_is_searched_from_its_start() -> None:
    editor, number = long_editor()
    core = Core(editor.data, cache_bytes=0)
    found = core.inode(number)
    with pytest.raises(blocks.BlockMiss) as miss:
        directory.find(core.fs, found, b"new")
    core.fs.cache.admit(core.fetch(miss.value.runs))
    with pytest.raises(blocks.BlockMiss):
        directory.find(core.fs, found, b"new")
    assert list(core.fs.scans.values()) == [directory.READAHEAD_BLOCKS]
    changed = Inode()
    for slot in Inode.__slots__:
        setattr(changed, slot, getattr(found, slot))
    changed.raw = b"changed" + found.raw[7:]
    with pytest.raises(blocks.BlockMiss):
        directory.find(core.fs, changed, b"new")
    assert sorted(core.fs.scans.values()) == [directory.READAHEAD_BLOCKS] * 2


def test_readahead_leaves_room_in_the_smallest_cache() -> None:
    editor, number = long_editor()
    core = Core(editor.data, cache_bytes=0)
    most = 0
    with pytest.raises(Refused):
        for _ in range(1000):
            try:
                directory.find(core.fs, core.inode(number), b"missing")
            except blocks.BlockMiss as miss:
                most = max(most, sum(count for _, count in miss.runs))
                core.fs.cache.admit(core.fetch(miss.runs))
    assert most <= core.fs.cache.generation_blocks // 4


# ---- encrypted names -------------------------------------------------------------------------------------------

class Locked:
    """An image with encrypted directories, and what the kernel shows of them without the key."""

    def __init__(self, path: Path) -> None:
        self.core = Core(path)
        self.listed: dict[bytes, list[tuple[bytes, int]]] = {}
        self.targets: dict[bytes, bytes] = {}
        with kernel_mount(path, "ro") as mounted:
            root = os.fsencode(mounted.root)
            for folder, _, _ in os.walk(root + b"/encrypted"):
                with os.scandir(folder) as entries:
                    found = list(entries)
                self.listed[folder.removeprefix(root)] = sorted((entry.name, entry.inode()) for entry in found)
                self.targets |= {entry.path.removeprefix(root): os.readlink(entry.path)
                                 for entry in found if entry.is_symlink()}


@pytest.fixture(scope="module", params=[
    ("hashed", "-b 1024 -O encrypt,dir_index", 2), ("hashed-v1", "-b 4096 -O encrypt,dir_index", 1),
    ("linear", "-b 1024 -O encrypt,^dir_index", 2), ("inline", "-b 1024 -I 1024 -O encrypt,inline_data", 2),
], ids=lambda row: row[0])
def locked(request: pytest.FixtureRequest, mounts: None) -> Iterator[Locked]:
    _, arguments, version = request.param
    path = copied(image(f"-t ext4 {arguments}", 32768))
    with kernel_mount(path, "rw") as mounted:
        encrypted.write_tree(mounted.root, version)
        tiny = populate.folder(mounted.root / "encrypted", "tiny")
        (tiny / "one").write_bytes(b"")
        (tiny / "two").mkdir()
    made = Locked(path)
    yield made
    made.core.close()
    path.unlink()


def test_encrypted_names_are_presented_as_the_kernel_does(locked: Locked) -> None:
    assert len(locked.listed) >= 4
    for path, listed in locked.listed.items():
        names = locked.core.read_directory(locked.core.at(path))
        assert sorted((name.name, name.inode) for name in names if name.name not in directory.DOTS) == listed, path


def test_presented_names_are_found(locked: Locked) -> None:
    core = locked.core
    for path, listed in locked.listed.items():
        found = core.at(path)
        for name, number in listed:
            assert core.run(namespace.lookup, found, name) == number
        truncated = [name[:-1] for name, _ in listed[:1]]
        for name in (b"missing", b"", b"n" * 100, *truncated, b"=" * 40, b"A" * 252):
            with pytest.raises(Refused) as caught:
                core.run(namespace.lookup, found, name)
            assert caught.value.errno == errno.ENOENT
        assert core.run(namespace.lookup, found, b".") == found.number
        assert core.run(namespace.lookup, found, b"..")


def test_encrypted_links_are_presented_as_the_kernel_does(locked: Locked) -> None:
    assert len(locked.targets) == 2
    for path, target in locked.targets.items():
        assert locked.core.run(namespace.readlink, locked.core.at(path)) == target


def test_entries_both_encrypted_and_casefolded_carry_their_hashes() -> None:
    """No kernel without Unicode tables writes them; the pair behind each name is the one that is presented."""
    editor = Editor(image("-t ext4 -b 1024 -O ^has_journal,encrypt,casefold,^metadata_csum", 2048, tree()))
    number, flags = editor.number("/few"), 0x80000 | FLAG_ENCRYPT | 0x40000000
    editor.put_inode(number, flags=flags)
    names = {bytes(range(16)): (0x11223344, 0x55667788), bytes(range(100, 117)): (0x99AABBCC, 5)}
    raw = record(number, 12, b".", 2) + record(ROOT, 12, b"..", 2)
    for name, pair in names.items():
        padded = name.ljust((len(name) + 3) // 4 * 4, b"\0")
        raw += record(13, 8 + len(padded) + 8, padded + struct.pack("<II", *pair), name_length=len(name))
    put_records(editor, number, raw)
    core = Core(editor.data)
    found = core.inode(number)
    shown = {name.name for name in core.read_directory(found)} - {b".", b".."}
    assert shown == {fscrypt.present_name(name, pair) for name, pair in names.items()}
    for name in shown:
        assert core.run(namespace.lookup, found, name) == 13
    put_records(editor, number, record(12, 24, bytes(16)))
    with pytest.raises(Corrupt) as caught:
        Core(editor.data).read_directory(Core(editor.data).inode(number))
    assert caught.value.check is Check.DIRENT_LENGTH


def test_an_encrypted_name_that_is_too_short_to_be_one() -> None:
    editor = Editor(image("-t ext4 -b 1024 -O ^has_journal,encrypt", 2048, tree()))
    number = editor.number("/few")
    editor.put_inode(number, flags=0x80000 | FLAG_ENCRYPT)
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.read_directory(core.inode(number))
    assert caught.value.check is Check.DIRENT_NAME


# ---- linear and indexed give the same --------------------------------------------------------------------------

def test_the_index_flag_without_the_feature_is_ignored() -> None:
    path = copied(image("-t ext4 -b 1024 -O ^has_journal,^metadata_csum", 4096, tree()))
    editor = Editor(rebuilt(path))
    number = editor.number("/many")
    assert editor.core.inode(number).flags & FLAG_INDEX
    compat = editor.fs.superblock.fields["feature_compat"]
    core = Core(editor.put_super(feature_compat=compat & ~0x20).data)
    assert core.names("/many") == editor.core.names("/many")
    for name in core.names("/many"):
        assert core.run(namespace.lookup, core.inode(number), name)


def test_random_blocks_give_entries_or_one_clear_error() -> None:
    chosen, editor = seeded(), Editor(small("-t ext4 -b 1024 -O ^has_journal,^resize_inode,^metadata_csum"))
    number = editor.number("/few")
    original = bytes(editor.block(editor.device_block(number, 0)).raw)
    for _ in range(300):
        with editor.dir_block(number) as raw:
            raw[:] = original
            for _ in range(chosen.choice((1, 3, 20))):
                raw[chosen.randrange(60)] = chosen.choice((0, 1, 12, 255, chosen.randrange(256)))
        core = Core(editor.data)
        try:
            names = core.read_directory(core.inode(number))
            assert all(name.name and b"/" not in name.name and b"\0" not in name.name for name in names)
        except Corrupt as error:
            assert error.check in (Check.DIRENT_LENGTH, Check.DIRENT_NAME, Check.DIRENT_INODE)
