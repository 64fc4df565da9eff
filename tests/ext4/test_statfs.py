"""The figures of statfs(2): the kernel's for each geometry, with and without minixdf, and bounded work to get them."""

import os
from functools import cache
from pathlib import Path

import pytest

from fusewire.ext4 import blocks, group, statfs
from fusewire.ext4.errors import Check, Corrupt
from fusewire.ext4.filesystem import Options
from tests.ext4.driver import Core, Editor, image, new_path, stored
from tests.mounting import kernel_mount
from tests.walk import statfs_fields

GEOMETRIES = """
    -t ext4
    -t ext4 -b 1024
    -t ext4 -b 1024 -O ^resize_inode
    -t ext4 -O ^has_journal
    -t ext4 -b 1024 -O ^has_journal,^resize_inode
    -t ext2 -b 1024
    -t ext2 -b 2048
    -t ext2 -b 4096 -r 0
    -t ext3 -b 1024
    -t ext3 -m 0
    -t ext4 -m 20
    -t ext4 -b 1024 -g 256 -O meta_bg,^resize_inode
    -t ext4 -b 1024 -g 512 -O meta_bg,^resize_inode,^64bit
    -t ext4 -b 1024 -g 256 -O meta_bg,^resize_inode,^sparse_super,^has_journal
    -t ext4 -b 1024 -g 512 -O sparse_super2,^resize_inode
    -t ext4 -b 1024 -g 512 -O sparse_super2,^resize_inode -E num_backup_sb=1
    -t ext4 -b 1024 -g 1024 -O ^sparse_super,^resize_inode
    -t ext4 -b 1024 -g 256
    -t ext4 -O bigalloc -C 16384
    -t ext4 -O bigalloc -b 1024 -C 4096
    -t ext4 -O bigalloc -b 1024 -C 65536 -O ^has_journal
    -t ext4 -O bigalloc -b 1024 -C 8192 -g 4096
    -t ext4 -b 2048 -I 1024 -N 3000
    -t ext4 -O fast_commit
    -t ext4 -O ^huge_file,^flex_bg -b 1024
    -t ext4 -b 1024 -E packed_meta_blocks=1,hash_seed=00112233-4455-6677-8899-aabbccddeeff
    -t ext4 -b 1024 -J size=4
    -t ext4 -O orphan_file
    -t ext4 -O mmp
"""
FIELDS = ("blocks", "free", "available", "files", "files_free", "name_length", "block_bytes", "fsid")
KERNEL = ("blocks", "bfree", "bavail", "files", "ffree", "namelen", "bsize", "fsid")


@cache
def tree() -> Path:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    for index in range(30):
        (root / f"{index}").write_bytes(os.urandom(index * 2000))
    return root


def ours(path: Path | bytearray, options: Options | None = None) -> dict[str, int]:
    with Core(path, options) as core:
        return dict(zip(FIELDS, core.run(statfs.statfs), strict=True))


def kernels(path: Path, options: str) -> dict[str, int]:
    with kernel_mount(path, options) as mounted:
        shown = statfs_fields(mounted.root)
    return {name: int(shown[kernel]) for name, kernel in zip(FIELDS, KERNEL, strict=True)}


@pytest.mark.parametrize("arguments", [line.strip() for line in GEOMETRIES.strip().splitlines()])
def test_the_figures_are_the_kernels(mounts: None, arguments: str) -> None:
    path = image(arguments, 49152, tree())
    assert ours(path) == kernels(path, "ro")
    assert ours(path, Options(minixdf=True)) == kernels(path, "ro,minixdf")


@pytest.mark.parametrize("size_kib", [2048, 8192 + 700, 70_001])
def test_odd_sizes(mounts: None, size_kib: int) -> None:
    path = image("-t ext4 -b 1024 -g 2048", size_kib)
    assert ours(path) == kernels(path, "ro")


def test_bigalloc_without_a_stored_overhead(mounts: None) -> None:
    """Old file systems do not store it, so that it has to be counted."""
    for arguments in ("-t ext4 -O bigalloc -b 1024 -C 8192 -g 4096", "-t ext4 -O bigalloc,^has_journal -C 16384"):
        path = stored(Editor(image(arguments, 49152, tree())).put_super(overhead_blocks=0).data)
        assert ours(path) == kernels(path, "ro"), arguments


def test_the_counters_of_the_superblock_do_not_matter(mounts: None) -> None:
    editor = Editor(image("-t ext4", 49152, tree()))
    path = stored(editor.put_super(free_blocks_count_lo=5, free_inodes_count=6).data)
    assert ours(path) == kernels(path, "ro")
    assert ours(path)["free"] > 5


def test_more_reserved_than_free() -> None:
    editor = Editor(image("-t ext4", 49152, tree())).put_super(r_blocks_count_lo=1 << 20)
    assert ours(editor.data)["available"] == 0


def test_a_broken_descriptor_is_told() -> None:
    editor = Editor(image("-t ext4 -b 1024 -g 256", 8192))
    block, offset = editor.fs.superblock.descriptor_block(5)
    editor.data[block * 1024 + offset] ^= 1
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(statfs.statfs)
    assert caught.value.check is Check.GROUP_CHECKSUM
    assert caught.value.where == {"group": 5}
    assert core.run(group.load, 4)


# ---- many groups -----------------------------------------------------------------------------------------------

def test_more_descriptors_than_the_cache_holds() -> None:
    """Counting goes on where it had to wait, and asks for many blocks at a time."""
    path = image("-t ext4 -b 1024 -g 256 -N 131072 -O ^has_journal,^resize_inode,meta_bg -I 128", 3 << 20)
    with Core(path, cache_bytes=0) as core:
        descriptor_blocks = -(-core.fs.geometry.groups // core.fs.geometry.descs_per_block())
        assert descriptor_blocks > 2 * core.fs.cache.generation_blocks
        assert core.run(statfs.count_free)[1] == core.fs.superblock.fields["free_inodes_count"]
        assert core.restarts <= descriptor_blocks // core.fs.most_readahead + 1
        assert core.fs.scans == {}


def test_one_miss_asks_for_a_bounded_number_of_blocks() -> None:
    path = image("-t ext4 -b 1024 -g 256 -N 131072 -O ^has_journal,^resize_inode,meta_bg -I 128", 3 << 20)
    with Core(path, cache_bytes=0) as core, pytest.raises(blocks.BlockMiss) as miss:
        statfs.count_free(core.fs)
    assert sum(count for _, count in miss.value.runs) <= core.fs.most_readahead


@pytest.mark.parametrize("features", [0x0, 0x1])
def test_copies_are_counted_without_visiting_the_groups(features: int) -> None:
    editor = Editor(image("-t ext4", 2048))
    changed = editor.fs.superblock.fields["feature_ro_compat"] & ~1 | features
    superblock = Core(editor.put_super(feature_ro_compat=changed).data).fs.superblock
    for groups in (1, 2, 3, 4, 5, 6, 8, 9, 10, 26, 28, 50, 82, 3000):
        assert superblock.copies_below(groups) == sum(superblock.has_copy_in(number) for number in range(groups))
    assert superblock.copies_below(1 << 31) == (2 + 19 + 13 + 11 if features else 1 << 31)


def test_copies_of_sparse_super2() -> None:
    with Core(image("-t ext4 -O sparse_super2,^resize_inode -b 1024 -g 512", 8192)) as core:
        superblock = core.fs.superblock
        for groups in range(1, core.fs.geometry.groups + 1):
            assert superblock.copies_below(groups) == sum(superblock.has_copy_in(number) for number in range(groups))
        assert superblock.copies_below(1 << 31) == 3
