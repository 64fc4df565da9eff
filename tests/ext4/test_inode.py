"""Inodes: every field as the kernel's statx shows it, and every rule that an inode can break."""

import os
import stat
import struct
from functools import cache
from pathlib import Path

import pytest

from fusewire.ext4 import inode as inodes
from fusewire.ext4 import layout
from fusewire.ext4.blocks import BlockMiss
from fusewire.ext4.errors import Check, Corrupt
from fusewire.ext4.inode import FLAG_CASEFOLD, FLAG_EA_INODE, FLAG_ENCRYPT, FLAG_EXTENTS, FLAG_VERITY, Inode
from tests import populate
from tests.ext4.driver import Core, Editor, check_of, copied, image, new_path, stored
from tests.mounting import kernel_mount
from tests.walk import Statx, statx

BTIME = 0x800


@cache
def tree() -> Path:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    (root / "file").write_bytes(b"x" * 100)
    (root / "dir").mkdir()
    os.symlink("target", root / "link")
    os.mkfifo(root / "fifo")
    return root


@cache
def small(features: str = "") -> Path:
    return image(f"-t ext4 -b 1024 -O ^has_journal,^resize_inode {features}", 2048, tree())


def nanoseconds(time: tuple[int, int]) -> int:
    return time[0] * 10**9 + time[1]


def facts(core: Core, found: Inode) -> dict[str, object]:
    """What statx(2) tells, from the inode."""
    return {"mode": found.mode, "nlink": found.links, "uid": found.uid, "gid": found.gid, "ino": found.number,
            "size": found.size, "blocks": found.sectors, "rdev": found.rdev,
            "blksize": core.block_bytes, "atime": nanoseconds(found.atime), "mtime": nanoseconds(found.mtime),
            "ctime": nanoseconds(found.ctime),
            "btime": None if found.crtime is None else nanoseconds(found.crtime)}


def facts_of(shown: Statx) -> dict[str, object]:
    fields = {name: getattr(shown, name) for name in
              ("mode", "nlink", "uid", "gid", "ino", "size", "blocks", "rdev", "blksize", "atime", "mtime", "ctime")}
    return fields | {"btime": shown.btime if shown.mask & BTIME else None}


# ---- as the kernel sees them -----------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [
    "-t ext4 -b 1024", "-t ext4 -I 128", "-t ext4 -I 1024", "-t ext2 -b 1024 -I 128", "-t ext3", "-t ext2 -r 0 -b 1024",
    "-t ext4 -O ^huge_file", "-t ext4 -O bigalloc -C 16384"])
def test_every_field_is_the_kernels(mounts: None, arguments: str) -> None:
    path = copied(image(arguments, 32768))
    with kernel_mount(path, "rw") as mounted:
        for subject in populate.ORDINARY:
            subject(mounted.root)
    with kernel_mount(path, "ro,noatime") as mounted, Core(path) as core:
        count = 0
        for name, found in core.tree():
            assert facts(core, found) == facts_of(statx(os.fsencode(mounted.root) + name)), name
            count += 1
        assert count > 200


def compare_changed(editor: Editor, name: str) -> Inode:
    """Compare a file of a changed image with what the kernel's statx says of it."""
    path = stored(editor.data)
    with kernel_mount(path, "ro,noatime") as mounted, Core(path) as core:
        found = core.at(name)
        assert facts(core, found) == facts_of(statx(os.fsencode(mounted.root) + os.fsencode(name)))
    return found


@pytest.mark.parametrize("reach", [0, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128])
def test_fields_count_as_far_as_the_extra_size_reaches(mounts: None, reach: int) -> None:
    """0 means that nobody set it: the kernel then counts all fields as there."""
    editor = Editor(small("-I 256"))
    editor.put_inode(editor.number("/file"), extra_isize=reach, ctime_extra=4, mtime_extra=400 << 2 | 1,
                     atime_extra=999_999_999 << 2 | 3, crtime=77, crtime_extra=8)
    found = compare_changed(editor, "/file")
    assert found.extra_isize == reach
    assert (found.crtime is None) == (0 < reach < 20)


@pytest.mark.parametrize("seconds", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("epoch", range(4))
def test_times_of_every_epoch(mounts: None, seconds: int, epoch: int) -> None:
    editor = Editor(small("-I 256"))
    editor.put_inode(editor.number("/file"), ctime=seconds, ctime_extra=5 << 2 | epoch)
    signed = seconds - (1 << 32) if seconds >= 1 << 31 else seconds
    found = editor_inode(editor, "/file")
    assert found.ctime == (signed + (epoch << 32), 5)
    if epoch in (0, 3):
        assert compare_changed(editor, "/file").ctime == found.ctime


def editor_inode(editor: Editor, name: str) -> Inode:
    core = Core(editor.data)
    return core.inode(editor.number(name))


def test_nanoseconds_never_reach_a_second() -> None:
    editor = Editor(small("-I 256"))
    editor.put_inode(editor.number("/file"), ctime_extra=0xFFFFFFFF)
    assert editor_inode(editor, "/file").ctime[1] == 999_999_999


def test_wide_fields_join_their_halves(mounts: None) -> None:
    editor = Editor(small())
    editor.put_inode(editor.number("/file"), uid_lo=0x5678, uid_hi=0x1234, gid_lo=0xABCD, gid_hi=0xEF01,
                     size_lo=0x89ABCDEF, size_hi=0x123, blocks_lo=0x55667788, blocks_hi=0x1122)
    found = compare_changed(editor, "/file")
    assert (found.uid, found.gid) == (0x12345678, 0xEF01ABCD)
    assert found.size == 0x12389ABCDEF
    assert found.sectors == 0x112255667788


def test_sectors_in_blocks(mounts: None) -> None:
    editor = Editor(small())
    editor.put_inode(editor.number("/file"), blocks_lo=7, flags=FLAG_EXTENTS | inodes.FLAG_HUGE_FILE)
    assert compare_changed(editor, "/file").sectors == 14


def test_attribute_block_numbers_of_48_bits_only_with_64bit() -> None:
    for features, expected in (("", 0x7_0000_0005), ("-O ^64bit", 5)):
        editor = Editor(small(features))
        editor.put_inode(editor.number("/file"), file_acl_lo=5, file_acl_hi=7)
        assert editor_inode(editor, "/file").file_acl == expected


def test_versions_and_projects() -> None:
    editor = Editor(image("-t ext4 -b 1024 -I 256 -O ^has_journal,^resize_inode,project,quota", 4096, tree()))
    editor.put_inode(editor.number("/file"), version_lo=5, version_hi=6, projid=0xFFFFFFFE, generation=0x11223344)
    found = editor_inode(editor, "/file")
    assert (found.version, found.project, found.generation) == (6 << 32 | 5, 0xFFFFFFFE, 0x11223344)
    plain = Editor(small("-I 256"))
    plain.put_inode(plain.number("/file"), projid=5)
    assert editor_inode(plain, "/file").project == 0


def test_every_byte_of_the_record_has_its_place() -> None:
    """Distinct values in all fields: a swapped or shifted one shows."""
    editor = Editor(small("-I 256 -O ^metadata_csum"))
    with editor.inode(editor.number("/file")) as raw:
        raw[:] = bytes(range(256))
        struct.pack_into("<H", raw, 0, stat.S_IFREG | 0o123)
        struct.pack_into("<H", raw, 0x80, 32)
    found = editor_inode(editor, "/file")
    assert (found.uid, found.gid) == (0x79780302, 0x7B7A1918)
    assert (found.size, found.links, found.flags) == (0x6F6E6D6C07060504, 0x1B1A, 0x23222120)
    assert (found.atime[0], found.ctime[0], found.mtime[0]) == (
        0x0B0A0908 + ((0x8C & 3) << 32), 0x0F0E0D0C + ((0x84 & 3) << 32), 0x13121110 + ((0x88 & 3) << 32))
    assert found.generation == 0x67666564 and found.file_acl == 0x77766B6A6968
    assert found.block == bytes(range(0x28, 0x64)) and found.crtime is not None
    assert found.crtime[0] == 0x93929190 - (1 << 32) + ((0x94 & 3) << 32)
    assert found.version == 0x9B9A999827262524


# ---- numbers and places ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [0, -1, 257, 1 << 32, 1 << 64])
def test_a_number_out_of_range(number: int) -> None:
    with Core(small()) as core, pytest.raises(Corrupt) as caught:
        core.inode(number)
    assert caught.value.check is Check.INODE_NUMBER
    assert caught.value.where == {"inode": number}


def test_the_first_and_the_last_inode_can_be_read() -> None:
    with Core(small("-O ^metadata_csum")) as core:
        assert core.inode(1).number == 1
        assert core.inode(core.fs.geometry.inodes).mode == 0


def test_an_inode_is_decoded_once() -> None:
    with Core(small()) as core:
        assert core.inode(2) is core.inode(2)


def test_neighbours_come_with_an_inode() -> None:
    with Core(image("-t ext4 -b 1024 -N 2048 -I 256 -O ^metadata_csum", 8192)) as core:
        core.inode(2)
        core.inode(READ_TOGETHER)
        assert core.restarts == 0
        core.inode(READ_TOGETHER + 1)
        assert core.restarts == 1


READ_TOGETHER = inodes.READAHEAD_BLOCKS * 4


def test_blocks_of_many_inodes_are_wanted_together() -> None:
    with Core(image("-t ext4 -b 1024 -g 1024 -N 2048", 8192)) as core:
        numbers = [0, 1, 2, 257, 258, 2048, 2049, 1 << 40]

        places = core.run(lambda fs: inodes.places(fs, numbers))
        assert [place is None for place in places] == [True, False, False, False, False, False, True, True]
        found = sorted({place[0] for place in places if place is not None})
        assert len(found) == 3
        with pytest.raises(BlockMiss):
            core.fs.cache.want(found)


# ---- broken inodes ---------------------------------------------------------------------------------------------

def check_of_inode(name: str, features: str = "", /, **fields: int | bytes) -> Corrupt:
    """The error of looking up a name whose inode was changed, which must name the inode."""
    editor = Editor(small(features))
    number = editor.number(name)
    editor.put_inode(number, **fields)
    error = check_of(editor.data, lambda core: core.at(name))
    assert isinstance(error, Corrupt) and error.where["inode"] == number
    return error


def test_a_wrong_checksum() -> None:
    editor = Editor(small())
    number = editor.number("/file")
    editor.data[editor.inode_offset(number) + 8] ^= 1
    error = check_of(editor.data, lambda core: core.at("/file"))
    assert isinstance(error, Corrupt)
    assert error.check is Check.INODE_CHECKSUM and error.where == {"inode": number}


@pytest.mark.parametrize("reach", [1, 2, 3, 30, 130, 132, 0xFFFF])
def test_an_extra_size_out_of_range(reach: int) -> None:
    error = check_of_inode("/file", "-I 256 -O ^metadata_csum", extra_isize=reach)
    assert error.check is Check.INODE_EXTRA_SIZE and error.where["extra_isize"] == reach


@pytest.mark.parametrize("mode", [0, 0o644, 0o030644, 0o170777, 0o070000])
def test_an_unknown_type(mode: int) -> None:
    error = check_of_inode("/file", mode=mode)
    assert error.check is Check.INODE_MODE and error.where["mode"] == f"{mode:#o}"


def test_a_free_inode() -> None:
    assert check_of_inode("/file", links_count=0).check is Check.INODE_FREE


@pytest.mark.parametrize(("name", "fields"), [
    ("/file", {"size_hi": 0x7FFFFFFF}), ("/file", {"size_hi": 0xFFFFFFFF}),
    ("/file", {"size_hi": 0x400, "size_lo": 0}), ("/dir", {"size_lo": 3 << 20})])
def test_a_size_out_of_range(name: str, fields: dict[str, int]) -> None:
    error = check_of_inode(name, **fields)
    assert error.check is Check.INODE_SIZE
    assert error.where["size"] == fields.get("size_hi", 0) << 32 | fields.get("size_lo", 100)


def test_a_block_mapped_file_larger_than_its_map() -> None:
    end = 12 + 256 + 256**2 + 256**3 << 10
    assert check_of_inode("/file", flags=0, size_hi=end >> 32, size_lo=(end & 0xFFFFFFFF) + 1).check is Check.INODE_SIZE


def test_the_largest_file() -> None:
    editor = Editor(small())
    editor.put_inode(editor.number("/file"), size_lo=0xFFFFFFFF << 10 & 0xFFFFFFFF, size_hi=0xFFFFFFFF << 10 >> 32)
    assert Core(editor.data).at("/file").size == (1 << 42) - 1024


def test_directories_of_4_gib_only_with_large_dir() -> None:
    editor = Editor(small())
    editor.put_inode(editor.number("/dir"), size_hi=1)
    assert Core(editor.data).at("/dir").size == 1024


@pytest.mark.parametrize(("name", "flags", "without"), [
    ("/file", FLAG_ENCRYPT, "encrypt"), ("/dir", FLAG_CASEFOLD, "casefold"),
    ("/file", inodes.FLAG_INLINE_DATA, "inline_data")])
def test_a_flag_without_its_feature(name: str, flags: int, without: str) -> None:
    error = check_of_inode(name, flags=FLAG_EXTENTS | flags)
    assert error.check is Check.INODE_FLAGS and error.where["without"] == without


def test_extents_without_the_feature() -> None:
    error = check_of_inode("/file", "-O ^extent,^64bit", flags=FLAG_EXTENTS)
    assert error.check is Check.INODE_FLAGS and error.where["without"] == "extent"


@pytest.mark.parametrize(("name", "flags"), [("/file", FLAG_EA_INODE), ("/dir", FLAG_VERITY), ("/link", FLAG_VERITY)])
def test_a_flag_that_a_named_file_cannot_have(name: str, flags: int) -> None:
    error = check_of_inode(name, flags=flags)
    assert error.check is Check.INODE_FLAGS and error.where["flags"] == f"{flags:#x}"


@pytest.mark.parametrize("reserved", [
    1, 7, 8, 10, "usr_quota_inum", "grp_quota_inum", "prj_quota_inum", "orphan_file_inum", "journal_inum"])
def test_a_name_of_an_inode_of_the_file_system_itself(reserved: int | str) -> None:
    """By its number, or because the superblock names it."""
    editor = Editor(image("-t ext4 -b 1024 -O quota,project,orphan_file", 8192, tree()))
    number = reserved if isinstance(reserved, int) else editor.number("/file")
    if isinstance(reserved, str):
        editor.put_super(**{reserved: number})
    with editor.dir_block(2) as raw:
        at = raw.index(b"file")
        struct.pack_into("<I", raw, at - 8, number)
    error = check_of(editor.data, lambda core: core.at("/file"))
    assert isinstance(error, Corrupt)
    assert error.check is Check.DIRENT_INODE and error.where["inode"] == number


def test_the_root_must_be_a_directory() -> None:
    editor = Editor(small())
    editor.put_inode(2, mode=stat.S_IFREG | 0o644)
    error = check_of(editor.data, lambda core: core.root())
    assert isinstance(error, Corrupt)
    assert error.check is Check.INODE_MODE and error.where["inode"] == 2


def test_records_have_the_size_of_the_specification() -> None:
    assert (layout.INODE.size, layout.INODE_EXTRA.size) == (128, 32)
