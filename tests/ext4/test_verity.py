"""Merkle trees and descriptors of verity files, against a builder made from the documented format and ``fsverity``.

The builder here is recursive from the root down and shares nothing with ``fusewire.ext4.verity``; ``fsverity digest``
(Debian package fsverity) writes out the tree and the descriptor of a file just as they are stored.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from fusewire.ext4 import verity
from fusewire.ext4.errors import Check, Corrupt
from tests.conftest import require

ALGORITHMS = {"sha256": (1, 32, 64), "sha512": (2, 64, 128)}  # number, bytes of a digest, bytes of the hash's block


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


class Builder:
    """A tree by the book: ``hash_of(level, index)`` is the hash of a block, ``block(level, index)`` holds hashes."""

    def __init__(self, data: bytes, algorithm: str, block_bytes: int, salt: bytes) -> None:
        self.data, self.algorithm, self.block_bytes = data, algorithm, block_bytes
        self.number, self.digest_bytes, hash_block = ALGORITHMS[algorithm]
        self.prefix = salt + bytes(-len(salt) % hash_block)
        self.salt = salt
        self.arity = block_bytes // self.digest_bytes
        self.counts = [(len(data) + block_bytes - 1) // block_bytes]  # data blocks, then blocks of level 0, 1, …
        while self.counts[-1] > 1:
            self.counts.append((self.counts[-1] + self.arity - 1) // self.arity)

    def block(self, level: int, index: int) -> bytes:
        if level == 0:
            raw = self.data[index * self.block_bytes:(index + 1) * self.block_bytes]
        else:
            first = index * self.arity
            last = min(first + self.arity, self.counts[level - 1])
            raw = b"".join(self.hash_of(level - 1, child) for child in range(first, last))
        return raw + bytes(self.block_bytes - len(raw))

    def hash_of(self, level: int, index: int) -> bytes:
        return hashlib.new(self.algorithm, self.prefix + self.block(level, index)).digest()

    def root_hash(self) -> bytes:
        return self.hash_of(len(self.counts) - 1, 0) if self.data else bytes(self.digest_bytes)

    def tree(self) -> bytes:
        levels = range(len(self.counts) - 1, 0, -1)
        return b"".join(self.block(level, index) for level in levels for index in range(self.counts[level]))

    def descriptor(self, **changed: int | bytes) -> bytes:
        """The 256 bytes; by name another value for a field."""
        fields: dict[str, int | bytes] = {
            "version": 1, "number": self.number, "bits": self.block_bytes.bit_length() - 1,
            "salt_bytes": len(self.salt), "signature_bytes": 0, "size": len(self.data),
            "root": self.root_hash(), "salt": self.salt, "reserved": b""}
        return struct.pack("<BBBBIQ64s32s144s", *(fields | changed).values())


def opened(builder: Builder) -> tuple[verity.Tree, bytes]:
    descriptor = verity.parse_descriptor(builder.descriptor(), len(builder.data), 16)
    return verity.Tree(descriptor), builder.tree()


def sizes(block: int, arity: int) -> list[int]:
    """Around the ends of blocks and of full trees of one and two levels."""
    ends = [block, block * arity, block * arity * arity]
    return [0, 1] + [end + by for end in ends if end <= 1 << 20 for by in (-1, 0, 1)]


SHAPES = [(algorithm, block, salt, size)
          for algorithm, block in (("sha256", 1024), ("sha256", 4096), ("sha512", 1024), ("sha512", 4096))
          for salt in (b"", b"salt", bytes(range(32)))
          for size in sizes(block, block // ALGORITHMS[algorithm][1])]


@pytest.mark.parametrize(("algorithm", "block", "salt", "size"), SHAPES)
def test_every_block_of_a_sound_file_passes(algorithm: str, block: int, salt: bytes, size: int) -> None:
    builder = Builder(content(size), algorithm, block, salt)
    tree, stored = opened(builder)
    assert tree.descriptor.root_hash == builder.root_hash()
    assert tree.blocks * block == len(stored)
    reads: list[int] = []

    def read(index: int) -> bytes:
        reads.append(index)
        return stored[index * block:(index + 1) * block]

    tree.verify_range(0, builder.data, read)
    assert len(reads) == len(set(reads)) == tree.blocks  # in order each tree block is read and hashed once
    order = list(range(builder.counts[0]))
    random.Random(7).shuffle(order)
    for index in order[:50]:
        tree.verify(index, builder.data[index * block:(index + 1) * block], read)
        tree.verify(index, builder.block(0, index), read)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_changed_byte_is_found(algorithm: str) -> None:
    """In the data, and in every tree block on its way up, where the error names the level that failed."""
    builder = Builder(content(40 * 16 * 1024 + 500), algorithm, 1024, b"salt")
    tree, stored = opened(builder)
    levels = len(tree.level_starts)
    assert levels == (2 if algorithm == "sha256" else 3)
    damaged = bytearray(builder.block(0, 17))
    damaged[1023] ^= 1
    with pytest.raises(Corrupt) as caught:
        tree.verify(17, damaged, lambda index: stored[index * 1024:(index + 1) * 1024])
    assert caught.value.check is Check.VERITY_HASH and caught.value.where == {"level": 0, "block": 17}
    for level in range(levels):
        path = tree.level_starts[level] + 17 // builder.arity ** (level + 1)
        for at in (0, 511, 1023):
            broken = bytearray(stored)
            broken[path * 1024 + at] ^= 0x80
            fresh = verity.Tree(tree.descriptor)
            with pytest.raises(Corrupt) as caught:
                fresh.verify(17, builder.block(0, 17), lambda index, raw=broken: raw[index * 1024:(index + 1) * 1024])
            assert caught.value.check is Check.VERITY_HASH and caught.value.where["level"] == level + 1


def test_failed_tree_blocks_are_not_trusted_later() -> None:
    builder = Builder(content(200 * 1024), "sha256", 1024, b"")
    tree, stored = opened(builder)
    broken = stored[:-1] + b"x"  # padding of the last block of level 0
    for raw, fails in ((broken, True), (broken, True), (stored, False), (broken, False)):
        def attempt(raw: bytes = raw) -> None:
            tree.verify(199, builder.block(0, 199), lambda index: raw[index * 1024:(index + 1) * 1024])
        if fails:
            with pytest.raises(Corrupt):
                attempt()
        else:
            attempt()  # the last time from what was verified before


def test_wrong_sizes() -> None:
    builder = Builder(content(5000), "sha256", 1024, b"")
    tree, _ = opened(builder)
    for answer in (b"", bytes(1023), bytes(1025)):
        with pytest.raises(Corrupt) as caught:
            tree.verify(0, builder.block(0, 0), lambda index, answer=answer: answer)
        assert caught.value.check is Check.VERITY_HASH
    with pytest.raises(ValueError, match="1025"):
        tree.verify(0, bytes(1025), lambda index: b"")
    tree.verify(5, bytes(1024), lambda index: b"")  # what a page shows beyond the data is zeros
    with pytest.raises(Corrupt):
        tree.verify(5, b"\0x", lambda index: b"")


def test_what_read_raises_comes_through_and_is_retried() -> None:
    """BlockMiss is such an exception."""
    builder = Builder(content(200 * 1024), "sha256", 1024, b"")
    tree, stored = opened(builder)
    missing = set(range(tree.blocks))

    def read(index: int) -> bytes:
        if index in missing:
            missing.remove(index)
            raise LookupError(index)
        return stored[index * 1024:(index + 1) * 1024]

    attempts = 0
    while True:
        attempts += 1
        try:
            tree.verify(0, builder.block(0, 0), read)
            break
        except LookupError:
            pass
    assert attempts == 1 + len(tree.level_starts)


# ---- descriptors ---------------------------------------------------------------------------------------------------

BUILDER = Builder(content(9000), "sha256", 1024, b"salt")


def refused(raw: bytes, data_bytes: int = 9000, block_bits: int = 12) -> bool:
    with pytest.raises(Corrupt) as caught:
        verity.parse_descriptor(raw, data_bytes, block_bits)
    return caught.value.check is Check.VERITY_DESCRIPTOR


def test_descriptor_fields() -> None:
    found = verity.parse_descriptor(BUILDER.descriptor(signature_bytes=3) + b"sig", 9000, 10)
    assert found == verity.Descriptor("sha256", 10, b"salt", 9000, BUILDER.root_hash(), b"sig")
    assert found.block_bytes == 1024


@pytest.mark.parametrize("changed", [
    {"version": 0}, {"version": 2}, {"number": 0}, {"number": 3}, {"bits": 9}, {"bits": 13}, {"bits": 255},
    {"salt_bytes": 33}, {"salt_bytes": 255}, {"signature_bytes": 1}, {"signature_bytes": 0xFFFFFFFF}, {"size": 8999},
    {"size": 9001}, {"size": 1 << 63}, {"reserved": b"\1"}, {"reserved": bytes(143) + b"\1"}])
def test_malformed_descriptors(changed: dict[str, int | bytes]) -> None:
    assert refused(BUILDER.descriptor(**changed))


def test_descriptors_of_impossible_length() -> None:
    raw = BUILDER.descriptor()
    assert all(refused(raw[:length]) for length in (0, 1, 255))
    assert refused(raw + bytes(16384))


def test_too_many_levels() -> None:
    raw = BUILDER.descriptor(number=2, size=1 << 62)
    with pytest.raises(Corrupt) as caught:
        verity.Tree(verity.parse_descriptor(raw, 1 << 62, 12))
    assert caught.value.check is Check.VERITY_DESCRIPTOR


def test_place_of_the_descriptor() -> None:
    """After 70,000 bytes of data the tree starts at 128 KiB; descriptor and its size end the last block."""
    assert [verity.metadata_offset_bytes(size) for size in (0, 1, 65536, 65537)] == [0, 65536, 65536, 131072]
    tree_end = 131072 + 4096
    assert verity.descriptor_place(tree_end + 4096, struct.pack("<I", 256), 70_000, 4096) == (tree_end, 256)
    assert verity.descriptor_place(tree_end + 1024, struct.pack("<I", 400), 70_000, 1024) == (tree_end, 400)
    assert verity.descriptor_place(tree_end + 8192, struct.pack("<I", 5000), 70_000, 4096) == (tree_end, 5000)
    # one that fills its block exactly pushes its size word into the next
    assert verity.descriptor_place(tree_end + 8192, struct.pack("<I", 4096), 70_000, 4096) == (tree_end, 4096)


@pytest.mark.parametrize(("end", "word"), [
    (135168, 255), (135168, 0), (135168, 0xFFFFFFFF), (135168, 8000), (1 << 40, 16385), (131072, 256), (4096, 256),
    (0, 256)])
def test_impossible_places(end: int, word: int) -> None:
    with pytest.raises(Corrupt) as caught:
        verity.descriptor_place(end, struct.pack("<I", word), 70_000, 4096)
    assert caught.value.check is Check.VERITY_DESCRIPTOR


# ---- fsverity-utils --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("algorithm", "block", "salt", "size"), SHAPES)
def test_builder_and_parser_agree_with_fsverity(algorithm: str, block: int, salt: bytes, size: int,
                                                tmp_path: Path) -> None:
    require([] if shutil.which("fsverity") else ["the program fsverity (Debian package fsverity)"])
    builder = Builder(content(size), algorithm, block, salt)
    file, tree, descriptor = (tmp_path / name for name in ("file", "tree", "descriptor"))
    file.write_bytes(builder.data)
    options = [f"--salt={salt.hex()}"] if salt else []
    subprocess.run(["fsverity", "digest", file, f"--hash-alg={algorithm}", f"--block-size={block}", *options,
                    f"--out-merkle-tree={tree}", f"--out-descriptor={descriptor}"], check=True, capture_output=True)
    found = verity.parse_descriptor(descriptor.read_bytes(), size, 12)
    assert found.root_hash == builder.root_hash()
    assert (found.algorithm, found.block_bytes, found.salt) == (algorithm, block, salt)
    stored = tree.read_bytes()
    assert stored == builder.tree()
    opened_tree = verity.Tree(found)
    assert len(stored) == opened_tree.blocks * block
    opened_tree.verify_range(0, builder.data, lambda index: stored[index * block:(index + 1) * block])
    assert os.path.getsize(descriptor) == verity.DESCRIPTOR_BYTES
