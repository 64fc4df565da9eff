"""Several threads write to one file at once, each to stripes of its own; no border of a stripe is one of a block.

``python -m tests.stress.together SHAPE SEED [OPERATIONS]`` repeats a run (as root), as far as threads let it.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.model.generate import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from tests.model.run import fsck
from tests.model.side import fallocate
from tests.mount.writable_mount import stale_image
from tests.mounting import fusewire_mount, kernel_mount, private_mounts
from tests.stress.run import SHAPES
from tests.stress.verifier import PAGE, Mismatch

THREADS = 4
STRIPES = 60
STRIPE_BYTES = 3001
# A page that is written directly may lose that to one that was read before: these are never mixed in one file.
FILES = ("cached", "direct", "mapped")


class Striper:
    """One thread: what it has written to its stripes of one file."""

    def __init__(self, path: Path, number: int, seed: int, has_extents: bool) -> None:
        self.path, self.number, self.has_extents = path, number, has_extents
        self.chance = random.Random(f"{path.name}:{seed}:{number}")
        self.model = {stripe: bytearray(STRIPE_BYTES) for stripe in range(number, STRIPES, THREADS)}
        self.log: list[str] = []
        self.fd = -1

    def work(self, root: Path, operations: int) -> None:
        """So many random operations on a mount."""
        way = self.path.name
        self.fd = os.open(root / self.path, os.O_RDWR | (os.O_DIRECT if way == "direct" else 0))
        kinds: list[Callable[[int, int, int], None]] = [
            self.store if way == "mapped" else self.write] * 6 + [self.read] * 4 + [self.sync]
        if self.has_extents:
            # A store into a page of which another part is punched brings that back: fs/fuse does not hold faults off.
            kinds += [self.reserve] if way == "mapped" else [self.punch, self.zero, self.reserve]
        try:
            for _ in range(operations):
                stripe = self.chance.choice(list(self.model))
                start = self.chance.randrange(STRIPE_BYTES)
                length = self.chance.choice((1, 100, STRIPE_BYTES)) % (STRIPE_BYTES - start + 1) or 1
                kind = self.chance.choice(kinds)
                self.log.append(f"    {kind.__name__} stripe {stripe}: {start} +{length}")
                kind(stripe, start, length)
        finally:
            os.close(self.fd)

    def verify(self, root: Path) -> None:
        """All stripes are as this thread left them."""
        data = (root / self.path).read_bytes()
        if len(data) != STRIPES * STRIPE_BYTES:
            raise Mismatch(f"{self.path}: {len(data)} bytes")
        for stripe in self.model:
            self._expect(stripe, 0, data[stripe * STRIPE_BYTES:(stripe + 1) * STRIPE_BYTES])

    def _expect(self, stripe: int, start: int, found: bytes) -> None:
        wanted = self.model[stripe][start:start + len(found)]
        if found != wanted:
            first = next(index for index in range(len(found)) if found[index] != wanted[index])
            mine = [text for text in self.log if f"stripe {stripe}:" in text]
            raise Mismatch("\n".join([f"{self.path}: byte {start + first} of stripe {stripe} is {found[first]}, not "
                                      f"{wanted[first]}; {wanted.count(0)} zeroes are there", *mine[-20:]]))

    # ---- operations on a part of a stripe

    def write(self, stripe: int, start: int, length: int) -> None:
        data = self.chance.randbytes(length)
        if os.pwrite(self.fd, data, stripe * STRIPE_BYTES + start) != length:
            raise Mismatch(f"{self.path}: a short write")
        self.model[stripe][start:start + length] = data

    def store(self, stripe: int, start: int, length: int) -> None:
        place, data = stripe * STRIPE_BYTES + start, self.chance.randbytes(length)
        first = place & -PAGE
        with mmap.mmap(self.fd, place + length - first, offset=first) as mapped:
            mapped[place - first:] = data
        self.model[stripe][start:start + length] = data

    def read(self, stripe: int, start: int, length: int) -> None:
        self._expect(stripe, start, os.pread(self.fd, length, stripe * STRIPE_BYTES + start))

    def punch(self, stripe: int, start: int, length: int) -> None:
        fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, stripe * STRIPE_BYTES + start, length)
        self.model[stripe][start:start + length] = bytes(length)

    def zero(self, stripe: int, start: int, length: int) -> None:
        fallocate(self.fd, ZERO_RANGE | KEEP_SIZE, stripe * STRIPE_BYTES + start, length)
        self.model[stripe][start:start + length] = bytes(length)

    def reserve(self, stripe: int, start: int, length: int) -> None:
        fallocate(self.fd, KEEP_SIZE, stripe * STRIPE_BYTES + start, length)

    def sync(self, _stripe: int, _start: int, _length: int) -> None:
        """And have the page cache forget, so that later reads come from the device."""
        os.fsync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def together(name: str, seed: int, operations: int, folder: Path) -> None:
    """So many operations of each thread on each of ``FILES``, on two mounts one after the other."""
    shape, path = SHAPES[name], folder / "together.img"
    stale_image(path, shape.mkfs, shape.mib << 20)
    threads = [Striper(Path(way), number, seed, shape.has_extents) for way in FILES for number in range(THREADS)]
    for mounts in range(2):
        with fusewire_mount(path, shape.options) as mount:
            for way in FILES if not mounts else ():
                (mount.root / way).touch()
                os.truncate(mount.root / way, STRIPES * STRIPE_BYTES)
            with ThreadPoolExecutor(len(threads)) as pool:
                for done in [pool.submit(thread.work, mount.root, operations // 2) for thread in threads]:
                    done.result()
            for thread in threads:
                thread.verify(mount.root)
            text = mount.log_text()
            assert '"level": "error"' not in text and "Traceback" not in text, text
        assert not fsck(path), fsck(path)
    with kernel_mount(path) as mount:
        for thread in threads:
            thread.verify(mount.root)
    path.unlink()


def main(name: str, seed: str, operations: str = "400") -> None:
    private_mounts()
    with tempfile.TemporaryDirectory(prefix="fusewire-together-") as folder:
        together(name, int(seed), int(operations), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
