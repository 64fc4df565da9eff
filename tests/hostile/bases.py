"""Small images full of metadata, from which the hostile ones are made."""

from __future__ import annotations

from pathlib import Path

from tests import populate
from tests.images import Recipe, kernel

KIB = 1024


def few_names(root: Path) -> None:
    """A little of everything: a fuzzed walk should be short."""
    here = populate.folder(root, "few")
    for size in (0, 1, 60, 500, 3000):
        (here / f"f{size}").write_bytes(b"7" * size)
    (here / "a/b/c").mkdir(parents=True)
    (here / "fast").symlink_to("few/f1")
    (here / "slow").symlink_to("s" * 100)
    (here / "fifo").touch()


def large_map(root: Path) -> None:
    """Files with more than one level of mapping and little data."""
    block = populate.block_size(root)
    pieces = {index * 7 * block: b"%08d" % index * (block // 8) for index in range(120)}
    populate.sparse_file(root / "mapped", pieces)
    populate.sparse_file(root / "far", {0: b"1" * block, (12 + 256 + 70_000) * block: b"2" * block})


CONTENTS = (few_names, large_map, populate.hashed(90, 40))
EXTENDED = (*CONTENTS, populate.xattrs, populate.acls, populate.inline_data)

NO_CSUM = "-O ^metadata_csum,^has_journal"

BASES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        kernel("base-ext2", "-t ext2 -b 1024 -N 128 -O ^resize_inode", *CONTENTS, populate.xattrs, size=2048 * KIB),
        kernel("base-plain", f"-t ext4 -b 1024 -N 128 {NO_CSUM},^64bit", *CONTENTS, size=2048 * KIB),
        kernel(
            "base-rich",
            f"-t ext4 -b 1024 -N 192 {NO_CSUM},inline_data,ea_inode,large_dir",
            *(*EXTENDED, populate.ea_inodes),
            size=2048 * KIB,
        ),
        kernel("base-csum", "-t ext4 -b 1024 -N 192 -O ^has_journal,inline_data", *EXTENDED, size=2048 * KIB),
        kernel("base-bigalloc", f"-t ext4 -b 1024 -N 128 {NO_CSUM},bigalloc -C 4096", *CONTENTS, size=4096 * KIB),
    )
}
