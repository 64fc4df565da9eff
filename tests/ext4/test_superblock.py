"""The superblock and the group descriptors: parsing, geometry, what is refused and why."""

import re
import struct
from functools import cache
from pathlib import Path

import pytest

from fusewire.ext4 import group, layout
from fusewire.ext4.errors import Check, Corrupt, Unsupported, errno_of
from fusewire.ext4.features import Feature
from fusewire.ext4.filesystem import Options
from fusewire.ext4.superblock import Superblock
from tests.ext4.driver import Core, Editor, check_of, image, run_tool, seeded

PLAIN = "-t ext4 -b 1024 -O ^has_journal,^resize_inode"


@cache
def small(features: str = "") -> Path:
    return image(f"{PLAIN}{features}", 2048)


def changed(features: str = "", /, **fields: int) -> Corrupt:
    """The error of opening an image whose superblock was changed."""
    error = check_of(Editor(small(features)).put_super(**fields).data, lambda core: core.root())
    assert isinstance(error, Corrupt)
    return error


# ---- what it says ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [
    PLAIN, "-t ext2 -b 4096 -r 0", "-t ext3 -b 2048 -I 128", "-t ext4 -b 65536", "-t ext4 -O bigalloc -C 65536",
    "-t ext4 -b 1024 -g 512 -O 64bit -E desc_size=128", "-t ext4 -b 1024 -g 1024 -N 4096 -I 1024"])
def test_geometry_is_that_of_dumpe2fs(arguments: str) -> None:
    path = image(arguments, 65536 if "65536" in arguments else 16384)
    listing = dict(re.findall(r"^([^:\n]+):\s+(.*)$", run_tool("dumpe2fs", "-h", path), re.MULTILINE))
    with Core(path) as core:
        geometry = core.fs.geometry
        assert geometry.block_bytes == int(listing["Block size"]) == 1 << geometry.block_bits
        assert geometry.blocks == int(listing["Block count"])
        assert geometry.blocks_per_group == int(listing["Blocks per group"])
        assert geometry.inodes == int(listing["Inode count"])
        assert geometry.inodes_per_group == int(listing["Inodes per group"])
        assert geometry.inode_bytes == int(listing.get("Inode size", 128))
        assert geometry.first_data_block == int(listing["First block"])
        assert geometry.group_desc_bytes == int(listing.get("Group descriptor size", 32))
        cluster = int(listing.get("Cluster size", listing["Block size"]))
        assert geometry.cluster_blocks * geometry.block_bytes == cluster
        assert geometry.inode_table_blocks() == int(listing["Inode blocks per group"])
        superblock = core.fs.superblock
        uuid = superblock.uuid.hex()
        assert listing["Filesystem UUID"].replace("-", "") == uuid
        assert superblock.first_inode == int(listing.get("First inode", 11))


@pytest.mark.parametrize("arguments", [
    "-t ext4 -b 1024 -g 256 -O meta_bg,^resize_inode", "-t ext4 -b 1024 -g 256 -O meta_bg,^resize_inode,^64bit",
    "-t ext4 -b 1024 -O bigalloc,meta_bg,^resize_inode -C 2048 -g 512", "-t ext4 -b 1024 -g 256", "-t ext4 -b 4096",
    "-t ext4 -b 1024 -g 512 -O sparse_super2,^resize_inode", "-t ext4 -b 1024 -g 1024 -O ^sparse_super,^resize_inode"])
def test_groups_are_where_dumpe2fs_says(arguments: str) -> None:
    path = image(arguments, 32768)
    listing = run_tool("dumpe2fs", path)
    groups = re.split(r"^Group \d+: ", listing, flags=re.MULTILINE)[1:]
    with Core(path) as core:
        assert len(groups) == core.fs.geometry.groups
        for number, text in enumerate(groups):
            desc = core.run(group.load, number)
            places = [re.search(rf"{name} at (\d+)", text) for name in ("Block bitmap", "Inode bitmap", "Inode table")]
            assert [int(place[1]) for place in places if place] == [desc.block_bitmap, desc.inode_bitmap,
                                                                    desc.inode_table]
            counts = re.search(r"(\d+) free (?:blocks|clusters), (\d+) free inodes, (\d+) directories", text)
            assert counts
            assert [int(word) for word in counts.groups()] == [desc.free_blocks, desc.free_inodes, desc.used_dirs]
            holder = re.search(r"(?:superblock|Superblock) at (\d+)", text)
            assert core.fs.superblock.has_copy_in(number) == bool(holder)


def test_places_within_groups() -> None:
    with Core(image("-t ext4 -b 1024 -g 1024 -I 256", 16384)) as core:
        geometry = core.fs.geometry
        assert geometry.group_of_inode(1) == (0, 0)
        assert geometry.group_of_inode(geometry.inodes_per_group + 1) == (1, 0)
        assert geometry.group_of_inode(geometry.inodes) == (geometry.groups - 1, geometry.inodes_per_group - 1)
        assert [geometry.inode_place(index) for index in (0, 3, 4, 7)] == [(0, 0), (0, 768), (1, 0), (1, 768)]
        assert [geometry.group_of_block(block) for block in (1, 1024, 1025)] == [0, 0, 1]
        assert geometry.first_block_of(1) == 1025
        assert [geometry.blocks_for(count) for count in (0, 1, 1024, 1025)] == [0, 1, 1, 2]


def test_labels_and_seeds() -> None:
    with Core(image("-t ext4 -L a-label -O metadata_csum_seed", 2048)) as core:
        assert core.fs.superblock.label == b"a-label"
        assert core.fs.superblock.seed == core.fs.superblock.fields["checksum_seed"]


def test_unsigned_hashes() -> None:
    for flags, expected in ((1, 1), (2, 4), (0, 1)):
        superblock = Core(Editor(small()).put_super(flags=flags).data).fs.superblock
        assert superblock.hash_version(1) == expected and superblock.hash_version(6) == 6


# ---- warnings and refusals that are no corruption --------------------------------------------------------------

def test_what_people_should_know() -> None:
    assert Core(small()).fs.superblock.warnings() == []
    for fields, word in (({"state": 3}, "errors"), ({"state": 0}, "cleanly"), ({"last_orphan": 12}, "deleted")):
        assert word in " ".join(Core(Editor(small()).put_super(**fields).data).fs.superblock.warnings())
    journaled = Editor(image("-t ext4 -b 1024", 8192)).put_super(state=0)
    assert Core(journaled.data).fs.superblock.warnings() == []


def test_a_journal_to_replay() -> None:
    editor = Editor(image("-t ext4 -b 1024", 8192))
    editor.put_super(feature_incompat=editor.fs.superblock.fields["feature_incompat"] | Feature.RECOVER.mask)
    with pytest.raises(Unsupported, match=r"journal.*noload"):
        Core(editor.data)
    core = Core(editor.data, Options(noload=True))
    assert core.root().is_dir and core.fs.superblock.needs_recovery


def test_both_kinds_of_descriptor_checksum() -> None:
    editor = Editor(small())
    editor.put_super(feature_ro_compat=editor.fs.superblock.fields["feature_ro_compat"] | Feature.GDT_CSUM.mask)
    with pytest.raises(Unsupported, match="uninit_bg"):
        Core(editor.data)


# ---- what is no superblock -------------------------------------------------------------------------------------

@pytest.mark.parametrize("length", [0, 1, 58, 1023])
def test_a_device_that_ends_inside_it(length: int) -> None:
    with pytest.raises(Corrupt) as caught:
        Superblock.parse(bytes(length), 1024 + length)
    assert caught.value.check is Check.SUPER_TRUNCATED and caught.value.where == {"bytes": length}


@pytest.mark.parametrize("magic", [0, 0xEF52, 0x53EF])
def test_another_magic_number(magic: int) -> None:
    error = changed("", magic=magic)
    assert error.check is Check.SUPER_MAGIC and error.where == {"magic": f"{magic:#06x}"}


def test_zeroes_and_noise_are_no_superblock() -> None:
    chosen = seeded()
    for raw in (bytes(1024), b"\xff" * 1024, chosen.randbytes(1024)):
        with pytest.raises(Corrupt) as caught:
            Superblock.parse(raw, 1 << 30)
        assert caught.value.check is Check.SUPER_MAGIC


def test_a_wrong_checksum() -> None:
    editor = Editor(small())
    editor.data[1024 + 0x78] ^= 1
    error = check_of(editor.data, lambda core: core.root())
    assert isinstance(error, Corrupt) and error.check is Check.SUPER_CHECKSUM
    assert error.where == {"checksum": f"{editor.fs.superblock.fields['checksum']:#010x}"}


def test_a_device_that_is_too_small() -> None:
    data = Editor(small()).data
    for size in (len(data) - 1, len(data) // 2, 4096):
        error = check_of(data[:size], lambda core: core.root())
        assert isinstance(error, Corrupt) and error.check is Check.SUPER_SIZE
        assert error.where == {"blocks": 2048, "block_bytes": 1024, "device_bytes": size}


IMPOSSIBLE = [
    ("", {"log_block_size": 7}), ("", {"log_block_size": 0xFFFFFFFF}), ("", {"log_block_size": 2}),
    ("", {"inode_size": 0}), ("", {"inode_size": 127}), ("", {"inode_size": 192}), ("", {"inode_size": 2048}),
    ("", {"desc_size": 0}), ("", {"desc_size": 32}), ("", {"desc_size": 96}), ("", {"desc_size": 2048}),
    ("", {"blocks_per_group": 0}), ("", {"blocks_per_group": 8193}), ("", {"blocks_per_group": 0xFFFFFFFF}),
    ("", {"inodes_per_group": 0}), ("", {"inodes_per_group": 3}), ("", {"inodes_per_group": 8193}),
    ("", {"inodes_count": 0}), ("", {"inodes_count": 0xFFFFFFFF}), ("", {"inodes_count": 255}),
    ("", {"first_data_block": 2}), ("", {"first_data_block": 0xFFFFFFFF}), ("", {"first_ino": 10}),
    ("", {"blocks_count_lo": 0}), ("", {"blocks_count_lo": 1}), ("", {"blocks_count_hi": 1 << 16}),
    ("", {"checksum_type": 0}), ("", {"checksum_type": 2}),
    (",^metadata_csum", {"blocks_per_group": 1}),
    (",bigalloc -C 4096", {"log_cluster_size": 21}), (",bigalloc -C 4096", {"clusters_per_group": 5}),
    (",bigalloc -C 4096", {"log_cluster_size": 0xFFFFFFFF}), (",bigalloc -C 4096", {"blocks_per_group": 1 << 20}),
]


@pytest.mark.parametrize(("features", "fields"), IMPOSSIBLE, ids=str)
def test_an_impossible_geometry(features: str, fields: dict[str, int]) -> None:
    error = changed(features, **fields)
    assert error.check is Check.SUPER_GEOMETRY
    assert error.where and all(isinstance(value, int) for value in error.where.values())
    assert errno_of(error) == 117


def test_random_superblocks_are_refused_or_bounded() -> None:
    """Whatever the fields say: a refusal, or a geometry that lies within the device."""
    chosen = seeded()
    original = bytes(Editor(small(",^metadata_csum,^64bit")).data)
    for _ in range(2000):
        raw = bytearray(original[1024:2048])
        for _ in range(chosen.choice((1, 2, 5))):
            at, value = chosen.randrange(0, 0x100, 2), chosen.choice((0, 1, 2, 8, 0xFF, 0x8000, 0xFFFF))
            struct.pack_into("<H", raw, at, value)
        try:
            superblock = Superblock.parse(bytes(raw), len(original))
        except (Corrupt, Unsupported):
            continue
        geometry = superblock.geometry
        assert geometry.byte_of(geometry.blocks) <= len(original)
        assert geometry.groups <= geometry.blocks and geometry.inodes == geometry.groups * geometry.inodes_per_group
        for number in {0, geometry.groups - 1}:
            superblock.descriptor_block(number)
            superblock.has_copy_in(number)


# ---- descriptors -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("features", ["", ",^metadata_csum,uninit_bg", ",^metadata_csum,uninit_bg,^64bit"])
def test_a_descriptor_whose_checksum_is_wrong(features: str) -> None:
    editor = Editor(small(features))
    block, offset = editor.fs.superblock.descriptor_block(0)
    editor.data[block * 1024 + offset + 4] ^= 1
    error = check_of(editor.data, lambda core: core.root())
    assert isinstance(error, Corrupt)
    assert error.check is Check.GROUP_CHECKSUM and error.where == {"group": 0}
    assert errno_of(error) == 74


@pytest.mark.parametrize("features", ["", ",^metadata_csum", ",^metadata_csum,uninit_bg", ",^64bit"])
@pytest.mark.parametrize(("field", "value", "where"), [
    ("block_bitmap_lo", 0, {"block_bitmap": 0}), ("inode_bitmap_lo", 2048, {"inode_bitmap": 2048}),
    ("inode_table_lo", 0, {"inode_table": 0}), ("inode_table_lo", 0xFFFFFFFF, {"inode_table": 0xFFFFFFFF}),
    ("inode_table_lo", 2047, {"inode_table_end": 2047 + 63})])
def test_a_descriptor_that_points_outside(features: str, field: str, value: int, where: dict[str, int]) -> None:
    editor = Editor(small(features))
    with editor.desc(0) as raw:
        struct.pack_into("<I", raw, layout.GROUP_DESC.offsets[field], value)
    error = check_of(editor.data, lambda core: core.root())
    assert isinstance(error, Corrupt)
    assert error.check is Check.GROUP_LOCATION and error.where == {"group": 0} | where


def test_high_halves_count_only_with_64bit() -> None:
    editor = Editor(small())
    with editor.desc(0) as raw:
        struct.pack_into("<I", raw, 32 + layout.GROUP_DESC_HI.offsets["inode_table_hi"], 1)
    error = check_of(editor.data, lambda core: core.root())
    assert isinstance(error, Corrupt)
    assert error.check is Check.GROUP_LOCATION and int(str(error.where["inode_table"])) > 1 << 32


def test_a_descriptor_block_that_cannot_be_read() -> None:
    core = Core(small())
    core.failing = {core.fs.superblock.descriptor_block(0)[0]}
    with pytest.raises(OSError, match="device"):
        core.root()
    core.failing = set()
    assert core.root().is_dir
