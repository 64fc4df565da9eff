"""Seeded damage to images: the same seed gives the same damage, whoever reads the image afterwards."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

UNIT = 1024
EDGES_32 = (0, 1, 2, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


@dataclass(frozen=True)
class Patch:
    """Bytes to be put at an offset of the image, and in words what that is."""

    offset: int
    data: bytes
    text: str


def metadata_units(image: bytes) -> list[int]:
    """Offsets of the 1 KiB units that hold something other than zeros and the digits that our file contents are of."""
    offsets = range(0, len(image), UNIT)
    return [at for at in offsets if image[at : at + UNIT].strip(b"\0") and not image[at : at + UNIT].isdigit()]


class Mutator:
    """Damages one image in many ways; `patches` of a seed is one to eight changes."""

    def __init__(self, image: bytes) -> None:
        self.image, self.units = image, metadata_units(image)

    def patches(self, seed: int) -> list[Patch]:
        rng = random.Random(seed)
        kinds = (self.bit, self.byte, self.word, self.word, self.word, self.half, self.long, self.copy, self.erase)
        return [rng.choice(kinds)(rng) for _ in range(rng.choice((1, 1, 2, 4, 8)))]

    def damaged(self, seed: int) -> tuple[bytes, str]:
        """The whole image after the changes of ``seed``, and what they are."""
        changed = bytearray(self.image)
        patches = self.patches(seed)
        for patch in patches:
            changed[patch.offset : patch.offset + len(patch.data)] = patch.data
        return bytes(changed), f"seed {seed}: " + "; ".join(f"{patch.text} at {patch.offset:#x}" for patch in patches)

    def place(self, rng: random.Random, size: int) -> int:
        """An aligned offset where the image is not all zero; one in eight in the superblock."""
        unit = UNIT if rng.randrange(8) == 0 else rng.choice(self.units)
        for _ in range(20):
            offset = unit + rng.randrange(UNIT // size) * size
            if any(self.image[offset & -16 : (offset & -16) + 16]):
                break
        return offset

    def bit(self, rng: random.Random) -> Patch:
        offset = self.place(rng, 1)
        return Patch(offset, bytes([self.image[offset] ^ 1 << rng.randrange(8)]), "bit flipped")

    def byte(self, rng: random.Random) -> Patch:
        return Patch(self.place(rng, 1), rng.choice((b"\0", b"/", b"\xff", rng.randbytes(1))), "byte")

    def half(self, rng: random.Random) -> Patch:
        value = rng.choice((0, 1, 3, 11, 12, 0xFFFF, 0x8000, rng.randrange(1 << 16)))
        return Patch(self.place(rng, 2), struct.pack("<H", value), f"u16 {value:#x}")

    def word(self, rng: random.Random) -> Patch:
        """An edge value, a number nearby, or a block or inode number that exists."""
        offset = self.place(rng, 4)
        (present,) = struct.unpack_from("<I", self.image, offset)
        near = (present + rng.choice((-1, 1, 2, 256))) % 2**32
        own = offset // UNIT
        value = rng.choice((*EDGES_32, near, own, rng.randrange(len(self.image) // UNIT), rng.randrange(1 << 32)))
        return Patch(offset, struct.pack("<I", value), f"u32 {value:#x}")

    def long(self, rng: random.Random) -> Patch:
        value = rng.choice((2**63 - 1, 2**63, 2**64 - 1, 2**48, 2**32, rng.randrange(2**64)))
        return Patch(self.place(rng, 8), struct.pack("<Q", value), f"u64 {value:#x}")

    def copy(self, rng: random.Random) -> Patch:
        """One unit over another, or one inode's record over another's."""
        size = rng.choice((UNIT, 256, 128, 12, 8))
        source, target = self.place(rng, size), self.place(rng, size)
        return Patch(target, self.image[source : source + size], f"{size} bytes from {source:#x}")

    def erase(self, rng: random.Random) -> Patch:
        size = rng.choice((UNIT, 256, 64))
        return Patch(
            self.place(rng, size), rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size))), f"{size} bytes"
        )
