"""Hostile images: whatever the bytes, an operation ends in an answer or one clear error, in bounded steps and memory.

Random tests print their seed (FUSEWIRE_SEED replays it); FUSEWIRE_ROUNDS makes them longer.
"""

import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import pytest

from fusewire.ext4 import blocks, directory, extents, filesystem, group, iomap, namespace, statfs, xattr, xattrstore
from fusewire.ext4.errors import Check, Corrupt, Ext4Error, Refused
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.inode import FLAG_CASEFOLD, FLAG_ENCRYPT, FLAG_EXTENTS, FLAG_INDEX, Inode
from tests import populate
from tests.ext4.driver import MIB, Core, Editor, copied, image, new_path, rebuilt, seeded, stored

ROUNDS = int(os.environ.get("FUSEWIRE_ROUNDS", "25"))
MOST_NAMES = 150
MOST_MAPPINGS = 50


# ---- asking everything -----------------------------------------------------------------------------------------

def attempt(core: Core, operation: Callable[..., object], *arguments: object) -> object:
    """The result of an operation or the error of ext4 that it ends in; anything else fails the test."""
    try:
        return core.run(operation, *arguments)
    except (Ext4Error, OSError) as error:
        return error


def ask_everything(core: Core) -> int:
    """Ask all that the core can answer about what can be reached; how many names were met."""
    root = attempt(core, Ext4.check)
    if not isinstance(root, Inode):
        return 0
    attempt(core, statfs.statfs)
    waiting, met = [root], 0
    while waiting and met < MOST_NAMES:
        parent = waiting.pop()
        listed = attempt(core, lambda fs, parent=parent: list(islice(directory.read(fs, parent, 0), MOST_NAMES)))
        names = [name.name for name in listed] if isinstance(listed, list) else [b"..", b"file"]
        for name in [*names, b"missing"]:
            met += 1
            child = attempt(core, namespace.lookup_inode, parent, name)
            if isinstance(child, Inode):
                ask_inode(core, child)
                if child.is_dir and name not in directory.DOTS:
                    waiting.append(child)
    return met


def ask_inode(core: Core, found: Inode) -> None:
    names = attempt(core, xattr.names, found, True)
    for name in names if isinstance(names, list) else []:
        attempt(core, xattr.get, found, name)
    attempt(core, xattr.encryption_context, found)
    attempt(core, namespace.readlink, found)
    for offset in (0, 1, found.size // 2, found.size - 1):
        attempt(core, iomap.seek, found, offset, True)
        attempt(core, iomap.seek, found, offset, False)
        attempt(core, iomap.begin, found, offset, 1 << 20)
    position = 0
    for _ in range(MOST_MAPPINGS):
        mapping = attempt(core, iomap.begin, found, position, 1 << 20)
        if not isinstance(mapping, iomap.Mapping):
            break
        check_mapping(core, mapping, position)
        position = mapping.offset + mapping.length
    if found.is_inline:
        attempt(core, iomap.inline_data, found)


def check_mapping(core: Core, mapping: iomap.Mapping, position: int) -> None:
    """A mapping holds the place asked for, and never leads outside the device."""
    assert mapping.offset <= position < mapping.offset + mapping.length
    if mapping.type in (iomap.MAPPED, iomap.UNWRITTEN):
        assert mapping.addr > 0 and mapping.addr + mapping.length <= core.fs.geometry.byte_of(core.fs.geometry.blocks)
    else:
        assert mapping.addr == iomap.NULL_ADDR


# ---- random changes of metadata --------------------------------------------------------------------------------

@cache
def tree() -> Path:
    """One of everything, small: hashed and linear directories, fragmented files, links, attributes, special files."""
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    populate.hashed(60, 30)(root)
    (root / "long").mkdir()
    for index in range(40):
        (root / "long" / f"long enough for a ciphertext {index}").write_bytes(b"x" * index)
    (root / "dir" / "inner").mkdir(parents=True)
    for index in range(8):
        (root / "dir" / f"file-{index}").write_bytes(b"content" * index * 20)
    with open(root / "fragments", "wb") as file:
        for index in range(100):
            os.pwrite(file.fileno(), b"x" * 1024, index * 8192)
    for length in (5, 59, 60, 300):
        os.symlink("t" * length, root / "dir" / f"link-{length}")
    os.mkfifo(root / "dir" / "fifo")
    for name, size in (("file-1", 10), ("file-2", 500), ("inner", 300)):
        os.setxattr(root / "dir" / name, "user.value", b"v" * size)
        os.setxattr(root / "dir" / name, "trusted.other", b"o" * 20)
    os.setxattr(root / "dir" / "file-3", "system.posix_acl_access",
                populate.acl((1, 6, 0xFFFFFFFF), (2, 4, 1000), (4, 4, 0xFFFFFFFF), (16, 6, 0xFFFFFFFF),
                             (32, 4, 0xFFFFFFFF)))
    return root


IMAGES = {
    "plain": "-t ext4 -b 1024 -O ^metadata_csum,^has_journal,^resize_inode",
    "32 bits": "-t ext4 -b 1024 -O ^metadata_csum,^has_journal,^resize_inode,^64bit -I 128",
    "block maps": "-t ext2 -b 1024 -O ^resize_inode",
    "inline": "-t ext4 -b 1024 -O inline_data,^metadata_csum,^has_journal,^resize_inode",
    "value inodes": "-t ext4 -b 1024 -O ea_inode,large_dir,^metadata_csum,^has_journal,^resize_inode",
    "odd layout": "-t ext4 -b 1024 -g 256 -O meta_bg,bigalloc,^metadata_csum,^has_journal,^resize_inode -C 2048 -g 512",
    "checksums": "-t ext4 -b 1024 -O ^has_journal,^resize_inode",
    "large blocks": "-t ext4 -b 16384 -O ^metadata_csum,^has_journal,^resize_inode",
}
POLICIES = {"encrypted": FLAG_ENCRYPT, "casefolded": FLAG_CASEFOLD, "both": FLAG_ENCRYPT | FLAG_CASEFOLD}


@cache
def made(name: str) -> tuple[bytes, list[tuple[int, int]]]:
    """An image as bytes, and (offset, length) of each piece of its metadata."""
    arguments = IMAGES.get(name, f"{IMAGES['plain']},encrypt,casefold")
    path = copied(image(arguments, 16384 if "16384" in arguments else 2048, tree()))
    editor = Editor(rebuilt(path))
    if name in POLICIES:
        number = editor.number("/long")
        editor.put_inode(number, flags=editor.core.inode(number).flags | POLICIES[name])
    return bytes(editor.data), list(pieces(editor))


def pieces(editor: Editor) -> Iterator[tuple[int, int]]:
    """Superblock, descriptors, inodes in use, and every block of directories, extent trees, maps and attributes."""
    core, byte_of, block_bytes = editor.core, editor.geometry.byte_of, editor.geometry.block_bytes
    yield 1024, 0x280
    for number in range(editor.geometry.groups):
        block, offset = editor.fs.superblock.descriptor_block(number)
        yield byte_of(block) + offset, editor.geometry.group_desc_bytes
    for found in [core.root(), *(found for _, found in core.tree())]:
        yield editor.inode_offset(found.number), editor.geometry.inode_bytes
        if found.is_dir and not found.is_inline:
            for file_block in range(editor.geometry.blocks_for(found.size)):
                yield byte_of(editor.device_block(found.number, file_block)), block_bytes
        if found.file_acl:
            yield byte_of(found.file_acl), block_bytes
        for block in tree_blocks(core, found):
            yield byte_of(block), block_bytes


def tree_blocks(core: Core, found: Inode) -> list[int]:
    if not (found.is_regular or found.is_dir) or found.is_inline:
        return []
    if not found.has_extents:
        return [block for block in struct.unpack("<3I", found.block[48:60]) if block]
    return list(core.run(extents.root_of, found).starts) if core.run(extents.root_of, found).depth else []


INTERESTING = (0, 1, 2, 3, 4, 7, 8, 12, 0x7F, 0x80, 0xFF, 0x100, 0x3FF, 0x400, 0x7FFF, 0x8000, 0x8001, 0xF30A, 0xFFFF,
               0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def spoil(chosen: random.Random, data: bytearray, places: list[tuple[int, int]]) -> None:
    """One change: some bytes of a piece, a number that means something, or one piece put over another."""
    offset, length = chosen.choice(places)
    kind = chosen.randrange(10)
    if kind < 4:
        width = chosen.choice((1, 2, 4))
        at = offset + chosen.randrange(0, min(length, chosen.choice((64, 128, 1 << 20))) - width + 1)
        value = chosen.choice((*INTERESTING, chosen.randrange(2048), chosen.randrange(1 << 32)))
        data[at:at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
    elif kind < 6:
        at = offset + chosen.randrange(length)
        data[at] ^= 1 << chosen.randrange(8)
    elif kind < 8:
        other, count = chosen.choice(places)
        count = min(length, count)
        data[offset:offset + count] = data[other:other + count]
    elif kind < 9:
        at = offset + 4 * chosen.randrange(length // 4)
        block = chosen.choice(places)[0] // 1024
        data[at:at + 4] = block.to_bytes(4, "little")
    else:
        data[offset:offset + length] = chosen.randbytes(length)


@pytest.mark.parametrize("name", [*IMAGES, *POLICIES])
def test_random_metadata(name: str) -> None:
    chosen = seeded()
    original, places = made(name)
    whole = ask_everything(Core(original))
    assert whole > 80
    broken = 0
    for _ in range(ROUNDS):
        data = bytearray(original)
        for _ in range(chosen.choice((1, 1, 2, 5, 20))):
            spoil(chosen, data, places[1:] if chosen.random() < 0.9 else places)
        try:
            core = Core(data, cache_bytes=chosen.choice((None, 0)))
        except Ext4Error:
            continue
        broken += ask_everything(core) != whole
    assert ROUNDS < 20 or broken, "no change was noticed"


@pytest.mark.parametrize("name", ["plain", "block maps", "checksums"])
def test_random_blocks_that_cannot_be_read(name: str) -> None:
    chosen = seeded()
    original, places = made(name)
    for _ in range(ROUNDS):
        core = Core(original)
        core.failing = {chosen.choice(places)[0] // core.block_bytes for _ in range(chosen.choice((1, 5, 50)))}
        ask_everything(core)
        core.failing = set()
        for _ in range(200):  # each failed block raises once more at most, then everything is there
            if isinstance(attempt(core, Ext4.check), Inode) and isinstance(attempt(core, statfs.statfs), statfs.StatFs):
                break
        assert isinstance(attempt(core, Ext4.check), Inode)


def test_every_truncation_is_refused() -> None:
    original, _ = made("plain")
    for size in [0, 1, 1023, 1024, 1025, 2047, 2048, 4096, *range(8192, len(original), 100_000), len(original) - 1]:
        with pytest.raises(Corrupt) as caught:
            Core(original[:size])
        assert caught.value.check in (Check.SUPER_TRUNCATED, Check.SUPER_SIZE)


# ---- one thing at a time ---------------------------------------------------------------------------------------

def extent_root(rows: list[tuple[int, int, int]], depth: int = 0) -> bytes:
    """Leaf rows are (file block, length, start), inner rows (file block, 0, child)."""
    raw = struct.pack("<HHHHI", extents.MAGIC, len(rows), 4, depth, 0)
    for file_block, length, start in rows:
        raw += struct.pack("<IIHH", file_block, start, 0, 0) if depth else struct.pack(
            "<IHHI", file_block, length, 0, start)
    return raw.ljust(60, b"\0")


def blank(mib: int = 4, features: str = ",^metadata_csum") -> Editor:
    return Editor(image(f"-t ext4 -b 4096 -O ^has_journal,^resize_inode{features}", mib << 10, tree()))


def million_extents(editor: Editor, written: bool, gap: int) -> int:
    """A file of 2^20 extents of one block, ``gap`` blocks from one to the next; its inode number."""
    number, count, per_leaf = editor.number("/fragments"), 1 << 20, 340
    block, leaves = 1000, []
    for first in range(0, count, per_leaf):
        rows = [(gap * index, 1 if written else extents.MAX_WRITTEN + 1, 0, 500)
                for index in range(first, min(first + per_leaf, count))]
        raw = struct.pack("<HHHHI", extents.MAGIC, len(rows), per_leaf, 0, 0)
        raw += b"".join(struct.pack("<IHHI", *row) for row in rows)
        editor.data[block * 4096:block * 4096 + len(raw)] = raw
        leaves.append((gap * first, block))
        block += 1
    inner = []
    for first in range(0, len(leaves), per_leaf):
        part = leaves[first:first + per_leaf]
        raw = struct.pack("<HHHHI", extents.MAGIC, len(part), per_leaf, 1, 0)
        raw += b"".join(struct.pack("<IIHH", at, child, 0, 0) for at, child in part)
        editor.data[block * 4096:block * 4096 + len(raw)] = raw
        inner.append((part[0][0], block))
        block += 1
    top = struct.pack("<HHHHI", extents.MAGIC, len(inner), 340, 2, 0)
    top += b"".join(struct.pack("<IIHH", at, child, 0, 0) for at, child in inner)
    editor.data[block * 4096:block * 4096 + len(top)] = top
    size = gap * count * 4096
    editor.put_inode(number, size_lo=size & 0xFFFFFFFF, size_hi=size >> 32, block=extent_root([(0, 0, block)], 3))
    return number


@pytest.mark.parametrize(("written", "gap", "data", "cache_bytes"), [
    (False, 2, True, None), (False, 1, True, 0), (True, 1, False, 0)])
def test_seeking_over_a_million_extents(written: bool, gap: int, data: bool, cache_bytes: int | None) -> None:
    """It gives up after a bounded number of steps, on the safe side: what it did not look at is data."""
    editor = blank(20)
    number = million_extents(editor, written, gap)
    core = Core(editor.data, cache_bytes=cache_bytes)
    found = core.inode(number)
    answer = core.run(iomap.seek, found, 0, data)
    assert 4096 * iomap.SEEK_STEPS // 2 <= answer <= found.size
    assert core.restarts <= iomap.SEEK_STEPS // 340 // extents.READAHEAD_NODES + 10
    assert core.fs.scans == {}
    if not data:
        assert answer == found.size


def test_seeking_over_a_million_holes_of_a_block_map() -> None:
    """Tables that lead nowhere, all of them one block."""
    editor = Editor(image("-t ext2 -b 1024 -O ^resize_inode", 2048, tree()))
    number = editor.number("/fragments")
    empty, second, third = 1500, 1501, 1502
    for block, child in ((empty, 0), (second, empty), (third, second)):
        with editor.block(block) as raw:
            raw[:] = struct.pack("<I", child) * 256
    editor.put_inode(number, block=struct.pack("<15I", *[0] * 14, third), size_lo=0, size_hi=3)
    core = Core(editor.data)
    found = core.inode(number)
    with pytest.raises(Refused):
        core.run(iomap.seek, found, found.size - 100_000, True)
    answer = attempt(core, iomap.seek, found, 0, True)
    assert isinstance(answer, Refused) or (isinstance(answer, int) and answer <= found.size)
    assert core.run(iomap.seek, found, 0, False) == 0


def test_every_block_of_a_file_may_be_the_same() -> None:
    """Data blocks that repeat are odd but harmless: a file is as long as its extents say."""
    editor = blank()
    number = editor.number("/fragments")
    editor.put_inode(number, size_lo=4 * 4096, block=extent_root([(index, 1, 500) for index in range(4)]))
    core = Core(editor.data)
    assert [mapping.addr for mapping in core.mappings(core.inode(number))] == [500 * 4096] * 4


def test_a_directory_of_the_largest_size() -> None:
    """A hole ends it at once, whatever its size says."""
    editor = blank(features=",^metadata_csum,large_dir")
    number = editor.number("/dir")
    editor.put_inode(number, size_lo=editor.geometry.blocks * 4096)
    core = Core(editor.data)
    error = attempt(core, namespace.lookup, core.inode(number), b"missing")
    assert isinstance(error, Corrupt) and error.check is Check.DIRECTORY_HOLE
    editor.put_inode(number, size_hi=0x7FFFFFFF)
    error = attempt(Core(editor.data), namespace.lookup_inode, core.root(), b"dir")
    assert isinstance(error, Corrupt) and error.check is Check.INODE_SIZE


def test_a_directory_of_all_blocks_of_the_device() -> None:
    """Its extents may cover every block once; then it is read once, and ends at the first that is no directory's."""
    editor = blank()
    number = editor.number("/dir")
    count = editor.geometry.blocks - 1
    editor.put_inode(number, size_lo=count * 4096, block=extent_root([(0, count, 1)]))
    core = Core(editor.data, cache_bytes=0)
    error = attempt(core, namespace.lookup, core.inode(number), b"missing")
    assert isinstance(error, Corrupt) and error.check in (Check.DIRENT_LENGTH, Check.DIRENT_INODE, Check.DIRENT_NAME)


def test_directories_that_hold_each_other() -> None:
    """A loop in the tree is the walker's to notice; each look-up ends, and ".." does not lead astray."""
    editor = blank()
    inner, outer = editor.number("/dir/inner"), editor.number("/dir")
    with editor.dir_block(inner) as raw:
        struct.pack_into("<IHBB4s", raw, 24, outer, 4096 - 24, 3, 2, b"dir\0")
        struct.pack_into("<H", raw, 12 + 4, 12)
    core = Core(editor.data)
    found = core.at("/dir")
    for _ in range(50):
        found = core.run(namespace.lookup_inode, core.run(namespace.lookup_inode, found, b"inner"), b"dir")
        assert found.number == outer


def test_inode_tables_in_each_others_place() -> None:
    """Two groups whose descriptors name one table: each inode is then found twice, and nothing worse."""
    editor = Editor(image("-t ext4 -b 1024 -g 512 -O ^has_journal,^resize_inode,^metadata_csum", 2048, tree()))
    with editor.desc(1) as raw, editor.desc(0) as first:
        raw[8:12] = first[8:12]
    core = Core(editor.data)
    per_group = core.fs.geometry.inodes_per_group
    assert core.inode(per_group + 2).raw == core.inode(2).raw
    assert ask_everything(core) > 80


def test_descriptors_over_the_superblock() -> None:
    editor = Editor(image("-t ext4 -b 1024 -O ^has_journal,^resize_inode,^metadata_csum", 2048, tree()))
    with editor.desc(0) as raw:
        struct.pack_into("<I", raw, 8, 1)
    core = Core(editor.data)
    assert isinstance(attempt(core, Ext4.check), Corrupt)
    assert core.run(group.load, 0).inode_table == 1


# ---- memory ----------------------------------------------------------------------------------------------------

def peak_bytes(operation: Callable[[], object]) -> int:
    """The most memory that an operation took beyond what was there."""
    tracemalloc.start()
    try:
        operation()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_many_owners_of_one_directory_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checksums nothing binds a block to its directory: views of it are bounded all the same."""
    monkeypatch.setattr(blocks, "MOST_VIEWS", 50)
    editor = Editor(image("-t ext4 -b 4096 -N 1500 -O ^has_journal,^resize_inode,^metadata_csum", 8192, tree()))
    number = editor.number("/dir")
    block = editor.device_block(number, 0)
    with editor.block(block) as raw:
        for at in range(0, 4092, 12):
            struct.pack_into("<IHBB", raw, at, 12, 12, 4, 1)
            raw[at + 8:at + 12] = b"%04d" % (at // 12)
        struct.pack_into("<H", raw, 4080 + 4, 16)
    record = bytes(editor.inode(number).raw)
    for other in range(100, 300):
        with editor.inode(other) as raw:
            raw[:] = record
    core = Core(editor.data)

    def read_all() -> None:
        for other in range(100, 300):
            assert attempt(core, directory.find, core.inode(other), b"0001") == 12

    read_all()
    assert len(core.fs.cache.entry(block).views) <= 50


def test_values_that_overlap_do_not_multiply() -> None:
    """3,000 entries of one 60 KiB value would be 180 MB from one block."""
    editor = Editor(image("-t ext4 -b 65536 -O ^has_journal,^resize_inode,^metadata_csum", 16384, tree()))
    number = editor.number("/dir/file-2")
    rows = b"".join(struct.pack("<BBHIII4s", 4, 1, 0xFFFF - 10_000, 0, 9_000, 0, b"%04d" % index)
                    for index in range(2500))
    with editor.xattr_block(number) as raw:
        raw[32:] = rows.ljust(65536 - 32, b"\0")
    core = Core(editor.data)
    found = core.inode(number)
    core.run(lambda fs: fs.cache.want([found.file_acl]))

    def ask() -> None:
        error = attempt(core, xattr.names, found, True)
        assert isinstance(error, Corrupt) and error.check is Check.XATTR_ENTRY

    assert peak_bytes(ask) < 4 * MIB


def test_names_of_one_letter_in_the_largest_blocks() -> None:
    """What is decoded from a block stays within a fixed multiple of it."""
    editor = Editor(image("-t ext4 -b 65536 -O ^has_journal,^resize_inode,^metadata_csum", 16384, tree()))
    number = editor.number("/dir")
    with editor.dir_block(number) as raw:
        for at in range(0, 65532, 12):
            struct.pack_into("<IHBB", raw, at, 12, 12, 4, 1)
            raw[at + 8:at + 12] = struct.pack("<I", 0x21212121 + at)
        struct.pack_into("<H", raw, 65520 + 4, 16)
    core = Core(editor.data)
    found = core.inode(number)
    assert peak_bytes(lambda: attempt(core, directory.find, found, b"missing")) < 40 * 65536


def test_a_listing_of_everything_keeps_to_the_cache() -> None:
    """Walking a hostile tree again and again, with the smallest cache, does not grow it."""
    original, _ = made("plain")
    core = Core(original, cache_bytes=0)
    ask_everything(core)
    assert len(core.fs.scans) <= filesystem.WAITING_SEARCHES
    held = sum(core.fs.cache.holds(block) for block in range(core.fs.geometry.blocks))
    assert held <= 2 * core.fs.cache.generation_blocks


def test_a_value_of_the_largest_size_on_disk() -> None:
    """A size that no call can carry is refused before anything of it is read."""
    editor = Editor(image("-t ext4 -b 1024 -O ea_inode,^has_journal,^resize_inode,^metadata_csum", 2048, tree()))
    number, holder = editor.number("/dir/file-2"), editor.number("/fragments")
    size = xattrstore.MAX_VALUE_BYTES
    with editor.xattr_block(number) as raw:
        raw[32:] = struct.pack("<BBHIIIc", 1, 1, 0, holder, size, 0, b"v").ljust(1024 - 32, b"\0")
    editor.put_inode(holder, size_lo=size, flags=FLAG_EXTENTS | 0x200000)
    core = Core(editor.data)
    found, reads = core.inode(number), core.reads
    error = attempt(core, xattr.get, found, b"user.v")
    assert isinstance(error, Corrupt) and error.check is Check.XATTR_INODE
    assert core.reads <= reads + 3


def test_an_indexed_directory_of_one_repeated_leaf() -> None:
    editor = Editor(image("-t ext4 -b 1024 -O ^has_journal,^resize_inode,^metadata_csum", 2048, tree()))
    path = stored(editor.data)
    editor = Editor(rebuilt(path))
    number = editor.number("/hashed-60")
    assert editor.core.inode(number).flags & FLAG_INDEX
    with editor.block(editor.device_block(number, 0)) as raw:
        limit = struct.unpack_from("<H", raw, 32)[0]
        struct.pack_into("<HH", raw, 32, limit, limit)
        for index in range(1, limit):
            struct.pack_into("<II", raw, 32 + 8 * index, 2 * index, 1)
    core = Core(editor.data)
    error = attempt(core, directory.find, core.inode(number), b"missing")
    assert isinstance(error, Refused)
    assert core.restarts < 20
