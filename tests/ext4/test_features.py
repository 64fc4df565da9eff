"""Every feature of a file system that mke2fs can make: policy of the flags, and trees that are read back whole.

Each image is copied from one source tree; names, attributes, contents and extended attributes must be the source's, and
every block of every file where debugfs says it is.
"""

import hashlib
import os
import re
import stat
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fusewire.ext4 import iomap, namespace, statfs, xattr
from fusewire.ext4.errors import Unsupported
from fusewire.ext4.features import Feature, FeatureSet, Policy
from fusewire.ext4.inode import Inode
from tests import populate
from tests.ext4.driver import Core, Editor, copied, debugfs, image, mapped_blocks, new_path, rebuilt, run_tool

CHUNK = 1024
ANY_EXIT = tuple(range(256))


# ---- the table -------------------------------------------------------------------------------------------------

def test_no_two_features_share_a_bit() -> None:
    places = [(feature.group, feature.mask) for feature in Feature]
    assert len(set(places)) == len(places)
    assert all(feature.mask & (feature.mask - 1) == 0 for feature in Feature)


def test_names_are_those_of_e2fsprogs() -> None:
    """debugfs prints the names of bits; ours must be the same for every bit that it knows."""
    path = new_path()
    os.truncate(path, 4 << 20)
    run_tool("mke2fs", "-q", "-F", "-O", "none", path)
    wrong = {}
    for feature in Feature:
        with open(path, "r+b") as file:
            for group, at in (("compat", 0x5C), ("incompat", 0x60), ("ro_compat", 0x64)):
                file.seek(1024 + at)
                file.write(struct.pack("<I", feature.mask if feature.group == group else 0))
            file.seek(1024 + 0xFE)
            file.write(struct.pack("<H", 64))
        listing = run_tool("dumpe2fs", "-f", "-h", path, allowed=ANY_EXIT)  # prints the superblock, then complains
        shown = re.search(r"Filesystem features:\s+(.*)", listing)
        if not shown or not _same_name(shown[1].split(), feature):
            wrong[feature] = shown and shown[1]
    assert wrong == {}


def _same_name(shown: list[str], feature: Feature) -> bool:
    """Bits newer or older than this e2fsprogs are shown by number."""
    letter = {"compat": "C", "ro_compat": "R", "incompat": "I"}[feature.group]
    number = f"FEATURE_{letter}{feature.mask.bit_length() - 1}"
    return shown in ([feature.title], [number])


def test_every_feature_set_of_an_image_is_named() -> None:
    path = image("-t ext4 -O quota,project,casefold,encrypt,verity,inline_data,large_dir,metadata_csum_seed", 8192)
    listing = run_tool("dumpe2fs", "-h", path)
    shown = re.search(r"Filesystem features:\s+(.*)", listing)
    with Core(path) as core:
        assert shown and sorted(core.fs.superblock.features.names()) == sorted(shown[1].split())


def test_unknown_bits_have_names() -> None:
    features = FeatureSet(1 << 31, 1 << 30, 1 << 29)
    assert features.names() == ["FEATURE_C31", "FEATURE_R30", "FEATURE_I29"]


@pytest.mark.parametrize("feature", [feature for feature in Feature if feature.policy is Policy.REFUSE])
def test_what_cannot_be_read_is_refused_by_name(feature: Feature) -> None:
    assert feature.group == "incompat"
    with pytest.raises(Unsupported, match=f"unsupported feature: {feature.title}$"):
        FeatureSet(0, 0, feature.mask | Feature.FILETYPE.mask).refuse_what_cannot_be_read()


def test_unknown_incompatible_bits_refuse_the_image() -> None:
    editor = Editor(image("-t ext4", 2048))
    editor.put_super(feature_incompat=editor.fs.superblock.fields["feature_incompat"] | 1 << 31)
    with pytest.raises(Unsupported, match="unsupported feature: FEATURE_I31"):
        Core(editor.data)


@pytest.mark.parametrize("field", ["feature_compat", "feature_ro_compat"])
def test_unknown_compatible_bits_do_not(field: str) -> None:
    editor = Editor(image("-t ext4", 2048))
    editor.put_super(**{field: editor.fs.superblock.fields[field] | 1 << 31})
    assert Core(editor.data).root().is_dir


def test_every_readable_feature_passes() -> None:
    for feature in Feature:
        if feature.policy is Policy.READ:
            words = [feature.mask if feature.group == group else 0 for group in ("compat", "ro_compat", "incompat")]
            FeatureSet(*words).refuse_what_cannot_be_read()


# ---- trees -----------------------------------------------------------------------------------------------------

@cache
def source(with_xattrs: bool = True) -> Path:
    """The ordinary tree, without what mke2fs cannot copy into 1 KiB blocks."""
    root = new_path(".source")
    root.unlink()
    root.mkdir()
    subjects = [subject for subject in populate.ORDINARY if subject is not populate.times]
    for subject in (*subjects, *((populate.xattrs, populate.acls) if with_xattrs else ())):
        subject(root)
    (root / "links/to-4095").unlink()
    for name in ("end", "odd"):  # mke2fs 1.47.0 forgets the size of a file that ends in a hole if it begins inline
        with open(root / "holes" / name, "ab") as file:
            file.write(b"end")
    (root / "xattrs/block").unlink(missing_ok=True)
    return root


ARGUMENTS = """
    -t ext4 -b 1024
    -t ext4 -b 2048
    -t ext4 -b 4096
    -t ext4 -b 8192
    -t ext4 -b 16384
    -t ext4 -b 32768
    -t ext4 -b 65536
    -t ext4 -I 128
    -t ext4 -I 256
    -t ext4 -I 512
    -t ext4 -I 1024
    -t ext4 -b 4096 -I 4096 -N 1000
    -t ext4 -b 65536 -I 256 -O ^metadata_csum
    -t ext4 -b 1024 -I 1024
    -t ext2 -b 1024
    -t ext2 -b 4096
    -t ext3 -b 1024
    -t ext3 -b 4096 -I 128
    -t ext2 -r 0 -b 1024
    -t ext2 -b 65536
    -t ext4 -O ^extent,^64bit
    -t ext4 -O none -b 1024
    -t ext4 -O ^filetype
    -t ext4 -O meta_bg,^resize_inode -b 1024 -g 256
    -t ext4 -O meta_bg,^resize_inode,^64bit -b 1024 -g 256
    -t ext4 -O bigalloc -C 16384
    -t ext4 -O bigalloc -b 1024 -C 8192 -g 8192
    -t ext4 -O bigalloc,meta_bg,^resize_inode -b 1024 -C 4096
    -t ext4 -O sparse_super2,^resize_inode -b 1024 -g 512
    -t ext4 -O ^sparse_super,^resize_inode -b 1024 -g 1024
    -t ext4 -O ^flex_bg -b 1024 -g 1024
    -t ext4 -G 64 -b 1024 -g 512
    -t ext4 -O ^64bit
    -t ext4 -E packed_meta_blocks=1
    -t ext4 -O mmp
    -t ext4 -O 64bit -E desc_size=128 -b 1024 -g 512
    -t ext4 -O inline_data
    -t ext4 -O inline_data -I 1024
    -t ext4 -O ea_inode
    -t ext4 -O large_dir
    -t ext4 -O ^metadata_csum,uninit_bg
    -t ext4 -O ^metadata_csum,uninit_bg,^64bit
    -t ext4 -O metadata_csum_seed
    -t ext4 -O ^metadata_csum,^uninit_bg
    -t ext4 -O ^dir_index
    -t ext4 -O ^has_journal
    -t ext4 -O quota,project
    -t ext4 -O ^huge_file
    -t ext4 -O ^extra_isize
    -t ext4 -O stable_inodes
    -t ext4 -O fast_commit
    -t ext4 -O encrypt,verity,casefold
"""
ALL = [line.strip() for line in ARGUMENTS.strip().splitlines()]


def _kib(arguments: str) -> int:
    """64 KiB blocks need room."""
    match = re.search(r"-b (\d+)", arguments)
    return 16384 if not match or int(match[1]) <= 4096 else 16 * int(match[1])


@pytest.mark.parametrize("arguments", ALL)
def test_a_copied_tree_is_read_back_whole(arguments: str) -> None:
    root = source(with_xattrs="-O none" not in arguments and "-r 0" not in arguments)
    with Core(image(arguments, _kib(arguments), root)) as core:
        found = {path: inode for path, inode in core.tree() if not path.startswith(b"/lost+found")}
        _compare_names(core, found, root)
        for path, inode in found.items():
            original = os.fsencode(root) + path
            _compare_attributes(core, inode, original)
            _compare_content(core, inode, original)
            _compare_xattrs(core, inode, original)
        _compare_blocks(core, list(found.values()))
        assert core.run(statfs.statfs).name_length == namespace.NAME_BYTES


@pytest.mark.parametrize("arguments", [
    "-t ext4 -b 1024", "-t ext3 -b 1024", "-t ext4 -b 4096", "-t ext4 -O large_dir -b 1024"])
def test_indexed_by_e2fsck_the_tree_is_the_same(arguments: str) -> None:
    path = copied(image(arguments, _kib(arguments), source()))
    with Core(rebuilt(path)) as core:
        found = {path: inode for path, inode in core.tree() if not path.startswith(b"/lost+found")}
        _compare_names(core, found, source())
        _compare_blocks(core, list(found.values()))


def _compare_names(core: Core, found: dict[bytes, Inode], root: Path) -> None:
    expected = set()
    for folder, folders, files in os.walk(os.fsencode(root)):
        expected |= {(folder + b"/" + name).removeprefix(os.fsencode(root)) for name in folders + files}
    assert found.keys() == expected
    for path, inode in found.items():
        parent = found[path.rpartition(b"/")[0]] if path.count(b"/") > 1 else core.root()
        kind = {name.name: name.d_type for name in core.read_directory(parent)}[path.rpartition(b"/")[2]]
        assert kind == (inode.kind >> 12 if core.fs.has_file_types else 0)


def _compare_attributes(core: Core, inode: Inode, path: bytes) -> None:
    found = os.lstat(path)
    assert inode.mode == found.st_mode
    assert (inode.uid, inode.gid) == (found.st_uid, found.st_gid)
    assert inode.rdev == (os.major(found.st_rdev), os.minor(found.st_rdev))
    if inode.is_regular:
        assert inode.links == found.st_nlink  # mke2fs makes two of a symbolic link with two names
    if not inode.is_dir:
        assert inode.size == found.st_size
    else:
        assert inode.size % core.block_bytes == 0 or inode.is_inline


def _compare_content(core: Core, inode: Inode, path: bytes) -> None:
    if inode.is_symlink:
        assert core.run(namespace.readlink, inode) == os.readlink(path)
    if inode.is_regular:
        assert _digest_of_core(core, inode) == _digest_of_file(path)


def _digest(pieces: Iterator[tuple[int, bytes]]) -> str:
    """A hash of what is not zero, with its place, so that holes and zeroes are the same."""
    digest = hashlib.sha256()
    for start, data in pieces:
        for at in range(-start % CHUNK, len(data), CHUNK):
            chunk = data[at:at + CHUNK].rstrip(b"\0")
            if chunk:
                digest.update(struct.pack("<Q", start + at) + chunk)
    return digest.hexdigest()


def _digest_of_core(core: Core, inode: Inode) -> str:
    def pieces() -> Iterator[tuple[int, bytes]]:
        for mapping in core.mappings(inode):
            count = min(mapping.length, inode.size - mapping.offset)
            if mapping.type == iomap.MAPPED:
                yield mapping.offset, core.pread(mapping.addr, count)
            elif mapping.type == iomap.INLINE:
                yield 0, core.run(iomap.inline_data, inode)
    return _digest(pieces())


def _digest_of_file(path: bytes) -> str:
    def pieces() -> Iterator[tuple[int, bytes]]:
        fd = os.open(path, os.O_RDONLY)
        position, size = 0, os.fstat(fd).st_size
        try:
            while position < size:
                start = os.lseek(fd, position, os.SEEK_DATA)
                position = os.lseek(fd, start, os.SEEK_HOLE)
                yield start, os.pread(fd, position - start, start)
        except OSError:
            return  # no data after the position
        finally:
            os.close(fd)
    return _digest(pieces())


def _compare_xattrs(core: Core, inode: Inode, path: bytes) -> None:
    found = {name: core.run(xattr.get, inode, name) for name in core.run(xattr.names, inode, True)}
    if xattr.has_none(inode):
        assert found == {}
    names = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
    assert found == {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


# ---- debugfs as the second opinion -----------------------------------------------------------------------------

def _compare_blocks(core: Core, inodes: list[Inode]) -> None:
    """Mode, size, links, sectors, flags, times and every mapped run as ``debugfs stat`` prints them."""
    numbers = sorted({inode.number for inode in inodes})
    assert isinstance(core.image, Path)
    listing = debugfs(core.image, *(f"stat <{number}>" for number in numbers)).split("debugfs: stat <")[1:]
    by_number = {inode.number: inode for inode in inodes}
    assert len(listing) == len(numbers)
    for text in listing:
        inode = by_number[int(text.split(">")[0])]
        assert _facts(core, inode) == _facts_of_debugfs(text), inode.number
        if _is_mapped(core, inode):
            assert _runs(core, inode) == mapped_blocks(text), inode.number


def _facts(core: Core, inode: Inode) -> dict[str, int]:
    times = {name: getattr(inode, name)[0] for name in ("ctime", "atime", "mtime")}
    return times | {"mode": stat.S_IMODE(inode.mode), "flags": inode.flags, "generation": inode.generation,
                    "user": inode.uid, "group": inode.gid, "size": inode.size, "links": inode.links,
                    "file acl": inode.file_acl, "sectors": inode.sectors}


def _facts_of_debugfs(text: str) -> dict[str, int]:
    def number(pattern: str, base: int = 10) -> int:
        found = re.search(pattern, text)
        assert found, (pattern, text)
        return int(found[1], base) & 0xFFFFFFFF if found[1].startswith("-") else int(found[1], base)

    times = {name: number(rf"\b{name}: 0x([0-9a-f]+)", 16) for name in ("ctime", "atime", "mtime")}
    return times | {"mode": number(r"Mode:\s+(\d+)", 8), "flags": number(r"Flags: 0x([0-9a-f]+)", 16),
                    "generation": number(r"Generation: (\d+)"), "user": number(r"User:\s+(-?\d+)"),
                    "group": number(r"Group:\s+(-?\d+)"), "size": number(r"Size: (\d+)"),
                    "links": number(r"Links: (\d+)"), "file acl": number(r"File ACL: (\d+)"),
                    "sectors": number(r"Blockcount: (\d+)")}


def _is_mapped(core: Core, inode: Inode) -> bool:
    fast = inode.is_symlink and inode.size < namespace.FAST_SYMLINK_BYTES
    return (inode.is_regular or inode.is_dir or inode.is_symlink) and not inode.is_inline and not fast


def _runs(core: Core, inode: Inode) -> dict[int, int]:
    """Every mapped block of a file and the device block that holds it."""
    blocks: dict[int, int] = {}
    position, end = 0, core.fs.geometry.blocks_for(inode.size)
    while position < end:
        run = core.run(iomap.find, inode, position)
        if run.start is not None:
            blocks.update((run.file_block + index, run.start + index) for index in range(run.length))
        position = run.file_block + run.length
    return blocks
