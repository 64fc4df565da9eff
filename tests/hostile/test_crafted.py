"""Images with one lie each: the operation that meets it fails with the right errno, and everything beside it is served.

Each case changes a sound image (checksums are made to match again where there are any), mounts it, and names what must
be seen: a refusal that contains some words, or fields of the walk. ``/good`` is read in every image that mounts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusewire.ext4 import group
from tests import populate
from tests.ext4.driver import Editor
from tests.hostile.mounted import survive
from tests.images import Recipe, kernel, make_cached

EUCLEAN = "errno=EUCLEAN"
BAD_DATA, BAD_XATTRS = {"data": EUCLEAN}, {"xattrs": EUCLEAN}
GOOD = b"good\n"
BLOCK = 1024
MIB = 1 << 20


def contents(root: Path) -> None:
    """What the cases change, and ``good``, which none does."""
    (root / "good").write_bytes(GOOD)
    populate.sparse_file(root / "mapped", {index * 3 * BLOCK: b"m" * BLOCK for index in range(100)})
    populate.sparse_file(root / "small", {index * 3 * BLOCK: b"s" * BLOCK for index in range(3)})
    populate.folder(root, "dir")
    for name in ("aaaa", "bbbb", "cccc"):
        (root / "dir" / name).write_bytes(name.encode())
    (root / "dir/inner").mkdir()
    (root / "fast").symlink_to("target")
    (root / "slow").symlink_to("s" * 200)
    populate.hashed(90, 40)(root)
    populate.xattrs(root)


NO_CSUM = "-O ^metadata_csum,^has_journal,ea_inode"
BASES: dict[str, Recipe] = {
    "plain": kernel("craft-plain", f"-t ext4 -b 1024 -N 128 {NO_CSUM}", contents, size=4 * MIB),
    "csum": kernel("craft-csum", "-t ext4 -b 1024 -N 128 -O ^has_journal", contents, size=4 * MIB),
    "ext2": kernel("craft-ext2", "-t ext2 -b 1024 -N 128", contents, size=4 * MIB),
    "inline": kernel("craft-inline", f"-t ext4 -b 1024 -N 128 {NO_CSUM},inline_data", contents, size=4 * MIB),
}


@dataclass(frozen=True)
class Case:
    """One lie: who tells it to which base, and the fields that must be seen, or the words of the refusal."""

    name: str
    tell: Callable[[Editor], None]
    seen: dict[str, dict[str, str]] | None = None
    refusal: str = ""
    base: str = "plain"


def in_super(**fields: int) -> Callable[[Editor], None]:
    def tell(image: Editor) -> None:
        image.put_super(**fields)

    return tell


def in_inode(path: str, **fields: int | bytes) -> Callable[[Editor], None]:
    def tell(image: Editor) -> None:
        image.put_inode(image.number(path), **fields)

    return tell


def in_block(path: str, number: int, offset: int, data: bytes) -> Callable[[Editor], None]:
    """Put ``data`` into a file's block, as it stands on the device."""

    def tell(image: Editor) -> None:
        with image.dir_block(image.number(path), number) as raw:
            raw[offset : offset + len(data)] = data

    return tell


def in_node(path: str, offset: int, data: bytes) -> Callable[[Editor], None]:
    """Put ``data`` into the root of a directory's hash tree."""

    def tell(image: Editor) -> None:
        with image.htree_node(image.number(path)) as raw:
            raw[offset : offset + len(data)] = data

    return tell


def in_map(path: str, offset: int, data: bytes) -> Callable[[Editor], None]:
    """Put ``data`` into the 60 bytes of an inode that hold its extent root or block map."""

    def tell(image: Editor) -> None:
        number = image.number(path)
        with image.inode(number) as raw:
            raw[0x28 + offset : 0x28 + offset + len(data)] = data

    return tell


def in_leaf(path: str, offset: int, data: bytes | None) -> Callable[[Editor], None]:
    """Put ``data`` into the first leaf of an extent tree; None stands for the number of that leaf's own block."""

    def tell(image: Editor) -> None:
        number = image.number(path)
        with image.inode(number) as raw:
            (leaf,) = struct.unpack_from("<I", raw, 0x28 + 12 + 4)
        with image.extent_block(number, leaf) as block:
            put = struct.pack("<HHHHIIIHH", 0xF30A, 1, 84, 1, 0, 0, leaf, 0, 0) if data is None else data
            block[offset : offset + len(put)] = put

    return tell


def in_xattr_block(offset: int, data: bytes) -> Callable[[Editor], None]:
    def tell(image: Editor) -> None:
        with image.xattr_block(image.number("/xattrs/block")) as raw:
            raw[offset : offset + len(data)] = data

    return tell


def dirent(inode: int, length: int, name: bytes, kind: int = 1) -> bytes:
    return struct.pack("<IHBB", inode, length, len(name), kind) + name


def renamed(name: bytes) -> Callable[[Editor], None]:
    """Give ``/dir/bbbb`` a name of the same length."""

    def tell(image: Editor) -> None:
        with image.dir_block(image.number("/dir")) as raw:
            place = raw.index(b"bbbb")
            raw[place : place + 4] = name

    return tell


def entry_inode(number: int) -> Callable[[Editor], None]:
    """Let ``/dir/bbbb`` name another inode."""

    def tell(image: Editor) -> None:
        with image.dir_block(image.number("/dir")) as raw:
            struct.pack_into("<I", raw, raw.index(b"bbbb") - 8, number)

    return tell


def bomb(image: Editor) -> None:
    """A block map of three levels in which all pointers name one block: 16 million blocks, all of them mapped."""
    number = image.number("/mapped")
    with image.inode(number) as raw:
        (block,) = struct.unpack_from("<I", raw, 0x28 + 12 * 4)
        struct.pack_into("<15I", raw, 0x28, *[block] * 15)
        struct.pack_into("<I", raw, 4, 0xFFFFFFFF)
        struct.pack_into("<I", raw, 0x6C, 3)
    image.data[block * BLOCK : (block + 1) * BLOCK] = struct.pack("<I", block) * (BLOCK // 4)


def table_outside(image: Editor) -> None:
    with image.desc(0) as raw:
        struct.pack_into("<I", raw, 8, 0x7FFFFFFF)


def unknown_incompat(image: Editor) -> None:
    image.data[1024 + 0x63] |= 0x80


def unknown_ro_compat(image: Editor) -> None:
    image.data[1024 + 0x67] |= 0x80


def root_is_file(image: Editor) -> None:
    image.put_inode(2, mode=0o100644)


def loop_in_directories(image: Editor) -> None:
    """``/dir/inner`` is ``/dir`` once more."""
    number = image.number("/dir")
    with image.dir_block(number) as raw:
        struct.pack_into("<I", raw, raw.index(b"inner") - 8, number)


SUPER_CASES = [
    Case("magic", in_super(magic=0x1234), refusal="magic"),
    Case("block-size", in_super(log_block_size=40), refusal="superblock"),
    Case("block-size-wraps", in_super(log_block_size=0xFFFFFFFF), refusal="superblock"),
    Case("cluster-size", in_super(log_cluster_size=90), {"/good": {"size": "5"}}),  # means nothing without bigalloc
    Case("inode-size-0", in_super(inode_size=0), refusal="superblock"),
    Case("inode-size-odd", in_super(inode_size=300), refusal="superblock"),
    Case("inode-size-large", in_super(inode_size=0x8000), refusal="superblock"),
    Case("inodes-per-group-0", in_super(inodes_per_group=0), refusal="superblock"),
    Case("inodes-per-group-large", in_super(inodes_per_group=0xFFFFFFF8), refusal="superblock"),
    Case("blocks-per-group-0", in_super(blocks_per_group=0), refusal="superblock"),
    Case("blocks-per-group-1", in_super(blocks_per_group=1, clusters_per_group=1), refusal="superblock"),
    Case("blocks-count-huge", in_super(blocks_count_lo=0xFFFFFFFF), refusal="superblock"),
    Case("blocks-count-huge-64", in_super(blocks_count_hi=0xFFFFFFFF), refusal="fusewire"),
    Case("blocks-count-0", in_super(blocks_count_lo=0), refusal="superblock"),
    Case("first-data-block", in_super(first_data_block=0xFFFFFF00), refusal="superblock"),
    Case("desc-size", in_super(desc_size=0xFFFF), refusal="superblock"),
    Case("desc-size-0", in_super(desc_size=0), refusal="superblock"),
    Case("unknown-incompat", unknown_incompat, refusal="feature"),
    Case("checksum-type", in_super(checksum_type=9), refusal="checksum", base="csum"),
    Case("first-meta-bg", in_super(first_meta_bg=0xFFFFFFFF), {"/good": {"size": "5"}}),
    Case("hash-version", in_super(def_hash_version=200), {"/good": {"size": "5"}}),
    Case("flex-groups", in_super(log_groups_per_flex=255), {"/good": {"size": "5"}}),
    Case("unknown-ro-compat", unknown_ro_compat, {"/good": {"size": "5"}}),
    Case("special-inodes", in_super(usr_quota_inum=0xFFFFFFFF, last_orphan=0xFFFFFFFF), {"/good": {"size": "5"}}),
    Case("inode-table-outside", table_outside, refusal="group descriptor"),
    Case("root-is-a-file", root_is_file, refusal="root directory"),
    Case("root-is-free", in_inode("/", mode=0, links_count=0), refusal="root directory"),
]

HEADER = struct.Struct("<HHHHI")
EXTENT = struct.Struct("<IHHI")
INDEX = struct.Struct("<IIHH")

FILE_CASES = [
    Case("extent-loop", in_leaf("/mapped", 0, None), {"/mapped": BAD_DATA}),
    Case("extent-loop-csum", in_leaf("/mapped", 0, None), {"/mapped": BAD_DATA}, base="csum"),
    Case("extent-magic", in_leaf("/mapped", 0, b"\0\0"), {"/mapped": BAD_DATA}),
    Case("extent-entries", in_leaf("/mapped", 2, b"\xff\xff"), {"/mapped": BAD_DATA}),
    Case("extent-max", in_leaf("/mapped", 2, b"\xff\x7f\xff\x7f"), {"/mapped": BAD_DATA}),
    Case("extent-depth", in_map("/mapped", 6, b"\xff\xff"), {"/mapped": BAD_DATA}),
    Case(
        "extent-index-outside",
        in_map("/mapped", 12, INDEX.pack(0, 0xFFFFFFFF, 0xFFFF, 0)),
        {"/mapped": BAD_DATA},
    ),
    Case("extent-index-is-super", in_map("/mapped", 12, INDEX.pack(0, 1, 0, 0)), {"/mapped": BAD_DATA}),
    Case("extent-outside", in_map("/small", 12, EXTENT.pack(0, 1, 0xFFFF, 0xFFFFFFFF)), {"/small": BAD_DATA}),
    Case("extent-length-0", in_map("/small", 12, EXTENT.pack(0, 0, 0, 500)), {"/small": BAD_DATA}),
    Case("extent-overlap", in_map("/small", 12, EXTENT.pack(0, 900, 0, 500)), {"/small": BAD_DATA}),
    Case("extent-wraps", in_map("/small", 12 + 24, EXTENT.pack(0xFFFFFFFF, 8, 0, 500)), {}),
    Case("size-negative", in_inode("/mapped", size_hi=0xFFFFFFFF), {"/mapped": {"stat": EUCLEAN}}),
    Case("size-beyond", in_inode("/mapped", size_hi=0x7FFFFFFF), {}),
    Case("mode-unknown", in_inode("/mapped", mode=0o170644), {"/mapped": {"stat": EUCLEAN}}),
    Case("inode-free", in_inode("/mapped", mode=0, links_count=0), {}),
    Case("extra-size", in_inode("/mapped", extra_isize=0xFFFF), {"/mapped": {"stat": EUCLEAN}}),
    Case("extra-size-odd", in_inode("/mapped", extra_isize=3), {"/mapped": {"stat": EUCLEAN}}),
    Case("inline-without-feature", in_inode("/mapped", flags=0x10000000), {}),
    Case("inline-and-extents", in_inode("/mapped", flags=0x10080000), {}, base="inline"),
    Case("encrypted-without-feature", in_inode("/mapped", flags=0x80800), {}),
    Case("verity-without-feature", in_inode("/mapped", flags=0x180000), {}),
    Case("link-empty", in_inode("/fast", size_lo=0), {"/fast": {"target": EUCLEAN}}),
    Case("link-huge", in_inode("/fast", size_lo=0x7FFFFFFF), {"/fast": {"target": EUCLEAN}}),
    Case("slow-link-huge", in_inode("/slow", size_lo=0xFFFFFFFF), {"/slow": {"target": EUCLEAN}}),
    Case("link-with-nul", in_map("/fast", 2, b"\0"), {}),
    Case("map-outside", in_map("/small", 0, b"\xff" * 60), {"/small": BAD_DATA}, base="ext2"),
    Case("map-in-super", in_map("/small", 0, struct.pack("<I", 1)), {}, base="ext2"),
    Case("map-bomb", bomb, {}, base="ext2"),
    Case("xattr-magic", in_xattr_block(0, b"\0\0\0\0"), {"/xattrs/block": BAD_XATTRS}),
    Case("xattr-blocks", in_xattr_block(8, b"\xff\0\0\0"), {}),
    Case("xattr-name-length", in_xattr_block(32, b"\xff"), {"/xattrs/block": BAD_XATTRS}),
    Case("xattr-value-offset", in_xattr_block(34, b"\xf0\xff"), {"/xattrs/block": BAD_XATTRS}),
    Case("xattr-value-size", in_xattr_block(40, b"\xff\xff\xff\x7f"), {"/xattrs/block": BAD_XATTRS}),
    Case("xattr-value-inode", in_xattr_block(36, b"\xff\xff\xff\xff"), {}),
    Case("xattr-value-is-root", in_xattr_block(36, b"\2\0\0\0"), {}),
    Case("xattr-block-outside", in_inode("/xattrs/block", file_acl_lo=0x7FFFFFFF), {"/xattrs/block": BAD_XATTRS}),
    Case("xattr-block-is-super", in_inode("/xattrs/block", file_acl_lo=1), {"/xattrs/block": BAD_XATTRS}),
]

ROOT_INFO, ROOT_COUNT = 24, 32

DIRECTORY_CASES = [
    Case("directory-loop", loop_in_directories, {"/dir/aaaa": {"size": "4"}}),
    Case("name-slash", renamed(b"b/bb"), {"/dir/": {"listing": EUCLEAN}}),
    Case("name-slash-csum", renamed(b"../x"), {"/dir/": {"listing": EUCLEAN}}, base="csum"),
    Case("name-nul", renamed(b"b\0bb"), {"/dir/": {"listing": EUCLEAN}}),
    Case("name-twice", renamed(b"aaaa"), {}),
    Case("entry-length-0", in_block("/dir", 0, 28, b"\0\0"), {"/dir/": {"listing": EUCLEAN}}),
    Case("entry-length-odd", in_block("/dir", 0, 28, b"\x0d\0"), {"/dir/": {"listing": EUCLEAN}}),
    Case("entry-length-beyond", in_block("/dir", 0, 28, b"\xf0\xff"), {"/dir/": {"listing": EUCLEAN}}),
    Case("entry-name-beyond", in_block("/dir", 0, 30, b"\xff"), {"/dir/": {"listing": EUCLEAN}}),
    Case("entry-inode-outside", entry_inode(0xFFFFFFFF), {}),
    Case("entry-inode-reserved", entry_inode(7), {"/dir/aaaa": {"size": "4"}}),
    Case("entry-inode-free", entry_inode(120), {"/dir/bbbb": {"stat": EUCLEAN}, "/dir/aaaa": {"size": "4"}}),
    Case("entry-inode-root", entry_inode(2), {"/dir/aaaa": {"size": "4"}}),
    Case("directory-size-odd", in_inode("/dir", size_lo=1000), {}),
    Case("directory-size-huge", in_inode("/dir", size_lo=0xFFFFFC00), {}),
    Case("directory-without-blocks", in_inode("/dir", block=struct.pack("<HHHHI", 0xF30A, 0, 4, 0, 0)), {}),
    Case("tree-version", in_node("/hashed-90", ROOT_INFO + 4, b"\xc8"), {}),
    Case("tree-levels", in_node("/hashed-90", ROOT_INFO + 6, b"\xff"), {}),
    Case("tree-levels-1", in_node("/hashed-90", ROOT_INFO + 6, b"\1"), {}),
    Case("tree-count-0", in_node("/hashed-90", ROOT_COUNT + 2, b"\0\0"), {}),
    Case("tree-count-huge", in_node("/hashed-90", ROOT_COUNT, b"\xff\xff\xff\xff"), {}),
    Case("tree-cycle", in_node("/hashed-90", ROOT_COUNT + 4, b"\0\0\0\0"), {}),
    Case("tree-outside", in_node("/hashed-90", ROOT_COUNT + 4, b"\xff\xff\xff\x0f"), {}),
]

CASES = {case.name: case for case in (*SUPER_CASES, *FILE_CASES, *DIRECTORY_CASES)}


@pytest.mark.parametrize("name", CASES)
def test_lie(name: str, mounts: None, image_cache: Path, tmp_path: Path) -> None:
    case = CASES[name]
    image = Editor(make_cached(BASES[case.base], image_cache))
    before = bytes(image.data)
    case.tell(image)
    assert image.data != before, "the case changed nothing"
    path = tmp_path / "image"
    path.write_bytes(image.data)
    outcome = survive(path)
    if case.refusal:
        assert case.refusal in outcome.refusal, outcome
        return
    assert not outcome.refusal, outcome.refusal
    tree = dict(outcome.tree)
    assert tree["/good"]["size"] == str(len(GOOD))
    assert "errno" not in tree["/good"]["data"]
    for shown, fields in (case.seen or {}).items():
        assert shown in tree, sorted(tree)
        assert {key: tree[shown].get(key) for key in fields} == fields


@pytest.mark.parametrize("base", BASES)
def test_bases_are_sound(base: str, mounts: None, image_cache: Path) -> None:
    """Without a lie nothing fails."""
    outcome = survive(make_cached(BASES[base], image_cache))
    assert [line for line in outcome.tree if "errno" in str(line)] == []


# --- files that are no images -----------------------------------------------------------------------------------------

NO_IMAGES = {
    "empty": b"",
    "short": b"x" * 1000,
    "text": b"This is not a file system.\n" * 1000,
    "zeros": bytes(1 << 20),
    "ones": b"\xff" * (1 << 20),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_no_image(name: str, mounts: None, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(NO_IMAGES[name])
    assert survive(path, "ro,noloop").refusal
    assert survive(path, "ro").refusal


def test_no_such_source(mounts: None, tmp_path: Path) -> None:
    assert "no such file" in survive(tmp_path / "absent").refusal
    assert survive(tmp_path).refusal


@pytest.mark.parametrize("part", range(1, 8))
def test_truncated(part: int, mounts: None, image_cache: Path, tmp_path: Path) -> None:
    """A file system larger than its file is refused, as by the kernel."""
    whole = make_cached(BASES["plain"], image_cache).read_bytes()
    path = tmp_path / "short"
    path.write_bytes(whole[: len(whole) * part // 8])
    assert "larger than its device" in survive(path).refusal


def test_inode_table_is_checked(mounts: None, image_cache: Path) -> None:
    """The editor that the cases rest on finds the inode table that the descriptor names."""
    image = Editor(make_cached(BASES["plain"], image_cache))
    table = image.core.run(group.load, 0).inode_table
    assert image.inode_offset(1) == int(table) * BLOCK
