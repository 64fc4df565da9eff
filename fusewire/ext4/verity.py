"""fs-verity files: where ext4 keeps their Merkle tree and descriptor, and the check of data against the root hash.

After the data, from the next multiple of 64 KiB on, the file's blocks hold the tree and then, from a file system block
boundary on, the descriptor; the last 4 bytes of the last block are the descriptor's size.  The inode's size is that of
the data, so nobody sees the rest.

The tree hashes blocks of ``block_bytes``, which may be smaller than those of the file system.  Level 0 holds the hashes
of the data blocks, level 1 those of level 0's blocks, and so on, until one block is left: its hash is the root hash.
Data of a single block has no tree, its hash is the root hash; empty data has no hash at all (zeros).  The tree is
stored from its root block down.  Every block is hashed behind the salt, which is padded with zeros to the block of the
hash function.

Source: kernel documentation, filesystems/fsverity, "Merkle tree" and "fs-verity descriptor"; ext4, "Verity files".
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct

from .errors import Check, Corrupt

_METADATA_ALIGNMENT_BYTES = 65536
DESCRIPTOR_BYTES = 256          # without a signature
DESCRIPTOR_BYTES_MAX = 16384    # with one; the kernel's limit too
SIZE_WORD_BYTES = 4
_LEVELS_MAX = 8                 # the kernel's limit; 64-bit sizes do not need more from blocks of 4 KiB on
_BLOCK_BITS_MIN = 10
_HASHES = {1: "sha256", 2: "sha512"}

# version, hash, log2 of the block size, salt size, signature size, data size, root hash, salt, reserved
_DESCRIPTOR = Struct("<BBBBIQ64s32s144s")


def metadata_offset_bytes(data_bytes: int) -> int:
    """Where in a file the Merkle tree starts."""
    return -(-data_bytes // _METADATA_ALIGNMENT_BYTES) * _METADATA_ALIGNMENT_BYTES


def descriptor_place(end_bytes: int, size_word: bytes, data_bytes: int, block_bytes: int) -> tuple[int, int]:
    """(offset in the file, size) of a descriptor, in bytes.

    ``end_bytes`` is the end of the last mapped block of the file, ``size_word`` the 4 bytes before it, ``block_bytes``
    the file system's block size.
    """
    size = int.from_bytes(size_word, "little")
    offset = (end_bytes - SIZE_WORD_BYTES - size) // block_bytes * block_bytes
    if not DESCRIPTOR_BYTES <= size <= DESCRIPTOR_BYTES_MAX or offset < metadata_offset_bytes(data_bytes):
        raise Corrupt(Check.VERITY_DESCRIPTOR, descriptor_bytes=size, end_bytes=end_bytes)
    return offset, size


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a verity file is hashed with, its root hash, and its signature if it has one (not checked here)."""

    algorithm: str
    block_bits: int
    salt: bytes
    data_bytes: int
    root_hash: bytes
    signature: bytes

    @property
    def block_bytes(self) -> int:
        """The size of what is hashed at a time."""
        return 1 << self.block_bits


def parse_descriptor(raw: bytes, data_bytes: int, block_bits: int) -> Descriptor:
    """The descriptor in ``raw``, whose length the disk gives; Corrupt unless it fits the file.

    ``data_bytes`` is the inode's size, ``block_bits`` the file system's block size.
    """
    if not DESCRIPTOR_BYTES <= len(raw) <= DESCRIPTOR_BYTES_MAX:
        raise Corrupt(Check.VERITY_DESCRIPTOR, descriptor_bytes=len(raw))
    version, number, bits, salt_bytes, signature_bytes, size, root, salt, reserved = _DESCRIPTOR.unpack_from(raw)
    found = {"version": version, "algorithm": number, "block_bits": bits, "salt_bytes": salt_bytes,
             "signature_bytes": signature_bytes, "data_bytes": size}
    if version != 1 or number not in _HASHES or any(reserved) or size != data_bytes:
        raise Corrupt(Check.VERITY_DESCRIPTOR, **found)
    if not _BLOCK_BITS_MIN <= bits <= block_bits or salt_bytes > 32 or signature_bytes > len(raw) - DESCRIPTOR_BYTES:
        raise Corrupt(Check.VERITY_DESCRIPTOR, **found)
    signature = raw[DESCRIPTOR_BYTES:DESCRIPTOR_BYTES + signature_bytes]
    digest_bytes = hashlib.new(_HASHES[number]).digest_size
    return Descriptor(_HASHES[number], bits, salt[:salt_bytes], size, root[:digest_bytes], bytes(signature))


ReadTreeBlock = Callable[[int], bytes]


class Tree:
    """The Merkle tree of one file: which of its blocks vouch for a data block, and whether they do.

    I1  ``_trusted`` holds only tree blocks that were verified up to the root hash, the last one of each level; so a
        sequential read hashes each tree block once.
    """

    def __init__(self, descriptor: Descriptor) -> None:
        self.descriptor = descriptor
        salted = hashlib.new(descriptor.algorithm)
        salted.update(descriptor.salt + bytes(-len(descriptor.salt) % salted.block_size))
        self._salted = salted
        self._arity_bits = descriptor.block_bits - (salted.digest_size.bit_length() - 1)
        self.data_blocks = -(-descriptor.data_bytes // descriptor.block_bytes)
        self.level_starts, self.blocks = self._lay_out()
        self._trusted: dict[int, tuple[int, bytes]] = {}

    def _lay_out(self) -> tuple[tuple[int, ...], int]:
        """(first tree block of each level from 0 up, blocks of the tree); Corrupt above 8 levels."""
        counts, blocks = [], self.data_blocks
        while blocks > 1:
            blocks = -(-blocks >> self._arity_bits)  # rounded up
            counts.append(blocks)
        if len(counts) > _LEVELS_MAX:
            raise Corrupt(Check.VERITY_DESCRIPTOR, levels=len(counts), data_bytes=self.descriptor.data_bytes)
        starts = tuple(sum(counts[level + 1:]) for level in range(len(counts)))
        return starts, sum(counts)

    def offset_bytes(self, tree_block: int) -> int:
        """Where in the file a block of the tree stands."""
        return metadata_offset_bytes(self.descriptor.data_bytes) + (tree_block << self.descriptor.block_bits)

    def vouchers(self, first: int, last: int) -> list[int]:
        """The tree blocks whose hashes lead from data blocks ``first`` to ``last`` up to the root hash, ascending."""
        found: list[int] = []
        for start in self.level_starts:
            first, last = first >> self._arity_bits, last >> self._arity_bits
            found.extend(range(start + first, start + last + 1))
        return sorted(found)

    def verify(self, block: int, data: bytes | memoryview, read_tree_block: ReadTreeBlock) -> None:
        """Return if ``data`` is what block ``block`` (of ``block_bytes``) of the file held when it was sealed.

        Data that ends inside the block goes on with zeros.  ``read_tree_block`` gives tree block n, block 0 being the
        root's; it may raise BlockMiss.  Raises Corrupt(Check.VERITY_HASH).
        """
        if len(data) > self.descriptor.block_bytes:
            raise ValueError(f"{len(data)} bytes are more than a block")
        if block >= self.data_blocks:
            if any(data):
                raise Corrupt(Check.VERITY_HASH, block=block, beyond_data_bytes=self.descriptor.data_bytes)
            return
        self._check(self._digest(data), 0, block, read_tree_block)

    def verify_range(self, first_block: int, data: bytes | memoryview, read_tree_block: ReadTreeBlock) -> None:
        """``verify`` of all blocks in ``data``, which starts at the start of block ``first_block``."""
        size, view = self.descriptor.block_bytes, memoryview(data)
        for index, at in enumerate(range(0, len(view), size), first_block):
            self.verify(index, view[at:at + size], read_tree_block)

    def _digest(self, block: bytes | memoryview) -> bytes:
        hashing = self._salted.copy()
        hashing.update(block)
        if len(block) < self.descriptor.block_bytes:
            hashing.update(bytes(self.descriptor.block_bytes - len(block)))
        return hashing.digest()

    def _check(self, digest: bytes, level: int, index: int, read_tree_block: ReadTreeBlock) -> None:
        """Compare the digest of block ``index`` below ``level`` with what the tree, or the descriptor, holds for it."""
        expected = self.descriptor.root_hash
        if level < len(self.level_starts):
            holder = self._trusted_block(level, index >> self._arity_bits, read_tree_block)
            at = (index & (1 << self._arity_bits) - 1) * self._salted.digest_size
            expected = holder[at:at + self._salted.digest_size]
        if digest != expected:
            raise Corrupt(Check.VERITY_HASH, level=level, block=index)

    def _trusted_block(self, level: int, index: int, read_tree_block: ReadTreeBlock) -> bytes:
        """Block ``index`` of ``level``, verified; recursion ends at the root, at most 8 levels up."""
        known = self._trusted.get(level)
        if known is not None and known[0] == index:
            return known[1]
        block = read_tree_block(self.level_starts[level] + index)
        if len(block) != self.descriptor.block_bytes:
            raise Corrupt(Check.VERITY_HASH, level=level, tree_block_bytes=len(block))
        self._check(self._digest(block), level + 1, index, read_tree_block)
        self._trusted[level] = index, bytes(block)
        return block
