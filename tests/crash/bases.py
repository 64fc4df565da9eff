"""Empty file systems with short journals in every format, their free blocks full of what nobody may ever see."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fusewire.ext4.journalsuper import Checksums
from tests.ext4.driver import new_path, run_tool
from tests.journals import opened, with_format

GARBAGE = b"not of this file"


class Base(NamedTuple):
    """How a file system is made; ``kind`` and ``wide`` are its log's format, where that is not mke2fs's."""

    mkfs: str
    mib: int
    kind: Checksums | None = None
    wide: bool = False
    journal: bool = True


_COMMON = "-q -F -N 256 -E lazy_itable_init=0,hash_seed=00112233-4455-6677-8899-aabbccddeeff"
BASES = {
    "v3-64": Base("-t ext4 -b 1024 -g 2048 -J size=1", 8),
    "v3-32-2k": Base("-t ext4 -b 2048 -g 2048 -J size=2 -O ^64bit", 12),
    "v3-4k": Base("-t ext4 -b 4096 -g 2048 -J size=4", 16),
    "v2-64": Base("-t ext4 -b 1024 -J size=1", 8, Checksums.V2, True),
    "v2-32-4k": Base("-t ext4 -b 4096 -J size=4 -O ^64bit", 16, Checksums.V2),
    "v1": Base("-t ext4 -b 1024 -J size=1 -O ^metadata_csum,^64bit,uninit_bg", 8, Checksums.V1),
    "v1-64-2k": Base("-t ext4 -b 2048 -J size=2 -O ^metadata_csum,64bit,^orphan_file", 12, Checksums.V1, True),
    "none-64": Base("-t ext4 -b 1024 -J size=1 -O ^metadata_csum,64bit,^orphan_file", 8, Checksums.NONE, True),
    "ext3": Base("-b 1024 -J size=1 -t ext3 -I 128 -O ^dir_index", 8),
    "ext3-4k": Base("-b 4096 -J size=4 -t ext3 -I 128", 16),
    "ext2": Base("-b 1024 -t ext2 -I 128", 8, journal=False),
    "no-journal": Base("-t ext4 -b 4096 -O ^has_journal", 16, journal=False),
}


@cache
def base(name: str) -> bytes:
    """The image of one of ``BASES``."""
    recipe, path = BASES[name], new_path()
    os.truncate(path, recipe.mib << 20)
    run_tool("mke2fs", *_COMMON.split(), *recipe.mkfs.split(), path)
    if recipe.journal:
        with opened(path) as disk:
            if recipe.kind is not None:
                disk.write(0, with_format(disk.read(0), recipe.kind, recipe.wide))
            for block in range(1, disk.file.blocks):    # as a log that was in use before
                disk.write(block, (GARBAGE * (disk.block_bytes // len(GARBAGE)))[:disk.block_bytes])
    image = bytearray(path.read_bytes())
    fill_free(image, path)
    path.write_bytes(image)
    run_tool("e2fsck", "-fn", path)
    path.unlink()
    return bytes(image)


def fill_free(image: bytearray, path: Path) -> None:
    """Fill the blocks that nothing uses."""
    shown = run_tool("dumpe2fs", path)
    found = re.search(r"^Block size: +(\d+)$", shown, re.MULTILINE)
    assert found is not None
    size = int(found[1])
    filling = (GARBAGE * (size // len(GARBAGE)))[:size]
    for line in re.findall(r"^  Free blocks: (.*)$", shown, re.MULTILINE):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
            for block in range(int(first), int(last or first) + 1):
                image[block * size:(block + 1) * size] = filling
