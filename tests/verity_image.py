"""Images with verity files, made without a kernel that has fs-verity.

Layout (kernel documentation, ext4, "Verity files", and filesystems/fsverity): the data, zeros up to a multiple of
64 KiB, the Merkle tree with its root level first, the descriptor at the next block, and in the last four bytes of the
last block the descriptor's size. The inode's size is that of the data alone.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.populate import pattern
from tests.walk import Fields

BLOCK = 4096
TREE_ALIGNMENT = 65536
VERITY_FLAG, EXTENTS_FLAG = 0x100000, 0x80000
ALGORITHMS = {"sha256": 1, "sha512": 2}
SIZES = (1, 4095, 4096, 4097, 40_000, 600_000, 3_000_000)


def add_files(image: Path, corrupt: bool, debugfs: Callable[[Path, Iterable[str]], None]) -> list[tuple[str, Fields]]:
    """Put verity files into ``image``; what a mount must show of them (size and content, or the error)."""
    shown: list[tuple[str, Fields]] = []
    with tempfile.TemporaryDirectory(prefix="fusewire-verity-") as folder:
        commands = []
        cases = [(size, name, salt) for size in SIZES for name in ALGORITHMS for salt in (b"", b"salt" * 4)]
        for size, algorithm, salt in cases:
            name = f"{algorithm}-{len(salt)}-{size}"
            data = pattern(name, size)
            Path(folder, name).write_bytes(stored_bytes(data, algorithm, salt, corrupt))
            flags = VERITY_FLAG | EXTENTS_FLAG
            commands += [f"write {folder}/{name} {name}", f"sif {name} size {size}", f"sif {name} flags {flags:#x}"]
            shown.append((f"/{name}", expected_fields(data, corrupt)))
        debugfs(image, commands)
    return shown


def expected_fields(data: bytes, corrupt: bool) -> Fields:
    """The fields of the walk (tests/walk.py) that must be seen; a corrupt byte makes reading fail."""
    if corrupt:
        return {"size": str(len(data)), "data": "errno=EIO"}
    digest = hashlib.sha256()
    for offset in range(0, len(data), BLOCK):
        digest.update(struct.pack("<Q", offset) + data[offset : offset + BLOCK])
    return {"size": str(len(data)), "data": digest.hexdigest()[:32]}


def stored_bytes(data: bytes, algorithm: str, salt: bytes, corrupt: bool) -> bytes:
    """All blocks of the file: ``data``, its tree, its descriptor."""
    tree, root = merkle_tree(data, algorithm, salt)
    descriptor = struct.pack(
        "<BBBBIQ64sB31x", 1, ALGORITHMS[algorithm], 12, len(salt), 0, len(data), root, 0
    )  # version, algorithm, log2 of the block size, salt size, signature size, data size, root hash
    descriptor = descriptor[:80] + salt.ljust(32, b"\0") + bytes(144)
    stored = bytearray(data)
    if corrupt:
        stored[len(data) // 2] ^= 0x10
    stored += bytes(-len(stored) % TREE_ALIGNMENT) + tree + descriptor
    stored += bytes(-(len(stored) + 4) % BLOCK) + struct.pack("<I", len(descriptor))
    return bytes(stored)


def merkle_tree(data: bytes, algorithm: str, salt: bytes) -> tuple[bytes, bytes]:
    """The tree, root level first, and the hash of its root block; a file of one block has no tree."""

    def digest(block: bytes) -> bytes:
        context = hashlib.new(algorithm)
        block_size = context.block_size
        context.update((salt.ljust(-(-len(salt) // block_size) * block_size, b"\0")) + block.ljust(BLOCK, b"\0"))
        return context.digest()

    levels: list[bytes] = []
    level = data
    while True:
        hashes = b"".join(digest(level[offset : offset + BLOCK]) for offset in range(0, len(level), BLOCK))
        if len(level) <= BLOCK:
            return b"".join(reversed(levels)), hashes
        level = hashes + bytes(-len(hashes) % BLOCK)
        levels.append(level)
