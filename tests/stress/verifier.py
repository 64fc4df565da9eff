"""Data written to a few files in every way there is, and the bytes that must be there; the device is full of old ones.

Everything follows from the seed: ``python -m tests.stress.verifier SHAPE SEED [OPERATIONS]`` repeats a run (as root),
on kernel ext4 with ``--kernel``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.model.generate import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from tests.model.run import fsck
from tests.model.side import Side, fallocate
from tests.mount.writable_mount import MOUNTS, stale_image
from tests.mounting import kernel_mount, private_mounts
from tests.stress.run import SHAPES

PAGE, SECTOR = 4096, 512
WINDOW_BYTES = 500_000      # of a file that is in use
# Where the windows begin: ordinary files, where ext3 of 1 KiB blocks needs its third level, and at 32 bits.
BASES = (0, 0, 0, (12 + 256 + 65536) * 1024 - 200_000 & -PAGE, (1 << 32) - 250_000 & -PAGE)
REMEMBERED = 60


class Mismatch(Exception):
    """A file is not what was written."""


class File:
    """One file: ``data`` is what it holds from ``base`` on, and what stands before is a hole."""

    def __init__(self, name: str, base: int) -> None:
        self.name, self.base = name, base
        self.data = bytearray()
        self.log: deque[str] = deque(maxlen=REMEMBERED)
        self.fd = self.direct = -1

    @property
    def size(self) -> int:
        return self.base + len(self.data)

    def open(self, root: Path) -> None:
        path = root / self.name
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)

    def close(self) -> None:
        for fd in (self.fd, self.direct):
            if fd >= 0:
                os.close(fd)
        self.fd = self.direct = -1

    def put(self, start: int, data: bytes) -> None:
        """The model of a write."""
        self.grow(start + len(data))
        self.data[start:start + len(data)] = data

    def grow(self, size: int) -> None:
        self.data.extend(bytes(max(size - len(self.data), 0)))

    def expect(self, start: int, found: bytes, how: str) -> None:
        """Raise ``Mismatch`` unless these bytes are what the file holds from ``start`` of its window on."""
        wanted = self.data[start:start + len(found)]
        if found == wanted:
            return
        first = next((index for index, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]),
                     min(len(found), len(wanted)))
        wrong = sum(left != right for left, right in zip(found, wanted, strict=False))
        raise Mismatch("\n".join([
            f"{self.name} (window from {self.base}, {len(self.data)} bytes), {how}: {wrong} bytes differ, the first is "
            f"{start + first}: {bytes(wanted[first:first + 16])!r} was written, {found[first:first + 16]!r} is there",
            *self.log]))


class Verifier:
    """The files, and what is done to them."""

    def __init__(self, seed: int, root: Path, has_extents: bool, by_kernel: bool) -> None:
        """``by_kernel``: kernel ext4 wants whole sectors for direct I/O, and shows what was stored behind a file's end
        once a direct write makes the file longer; the first is kept, the second left out."""
        self.chance, self.root, self.by_kernel = random.Random(seed), root, by_kernel
        self.files = [File(f"file-{index}", base) for index, base in enumerate(BASES)]
        self.count = 0
        self.kinds: list[tuple[Callable[[File], str], int]] = [
            (self.write, 14), (self.append, 4), (self.store, 8), (self.store_behind, 0 if by_kernel else 3),
            (self.write_direct, 8), (self.truncate, 6), (self.copy, 5), (self.sync, 5), (self.forget, 4),
            (self.read, 8), (self.read_direct, 5), (self.read_mapped, 4), (self.check, 2), (self.check_holes, 3),
            (self.begin_again, 1)]
        if has_extents:
            self.kinds += [(self.punch, 6), (self.zero, 5), (self.reserve, 5)]

    @contextmanager
    def opened(self, root: Path) -> Iterator[None]:
        """The files are open on this mount, and checked at both ends."""
        self.root = root
        try:
            for file in self.files:
                file.open(root)
                file.log.append("    opened on a new mount")
                self.check(file)
            yield
            for file in self.files:
                self.check(file)
        finally:
            for file in self.files:
                file.close()

    def work(self, operations: int) -> None:
        """So many random operations."""
        for _ in range(operations):
            self.count += 1
            kind = self.chance.choices([kind for kind, _ in self.kinds], [weight for _, weight in self.kinds])[0]
            file = self.chance.choice(self.files)
            file.log.append(f"    {self.count} {kind.__name__}")
            file.log[-1] += f" {kind(file)}"

    # ---- choosing

    def place(self, reach: int = WINDOW_BYTES) -> int:
        """Anywhere, and often at or beside the border of a block or a page."""
        if self.chance.random() < 0.5:
            return self.chance.randrange(reach)
        border = self.chance.randrange(reach // 1024) * 1024
        return max(border + self.chance.choice((-512, -1, 0, 0, 0, 1, 512)), 0)

    def length(self) -> int:
        return self.chance.choice((1, 7, 512, 1000, 1024, 4095, 4096, 4097, 12_288, self.chance.randrange(1, 150_000)))

    def span(self, file: File) -> tuple[int, int]:
        """(start, length) within the file; of length 0 if it has no content."""
        start = self.place() % max(len(file.data), 1)
        return start, min(self.length(), len(file.data) - start)

    def room(self) -> tuple[int, int]:
        """(start, length) within the window."""
        start = self.place()
        return start, min(self.length(), WINDOW_BYTES - start) or 1

    def bytes(self, length: int) -> bytes:
        return self.chance.randbytes(length)

    # ---- changes; each returns what it did, for the log

    def write(self, file: File) -> str:
        start, length = self.room()
        return self._written(file, file.fd, start, self.bytes(length))

    def append(self, file: File) -> str:
        start = len(file.data)
        return self._written(file, file.fd, start, self.bytes(min(self.length(), WINDOW_BYTES - start)))

    def _written(self, file: File, fd: int, start: int, data: Any) -> str:
        if not len(data):
            return "nothing"
        done = os.pwrite(fd, data, file.base + start)
        if done != len(data):
            raise Mismatch(f"{file.name}: {done} of {len(data)} bytes written")
        file.put(start, bytes(data))
        return f"{start} +{len(data)}: size {len(file.data)}"

    def write_direct(self, file: File) -> str:
        start, length = self._direct(*self.room())
        with mmap.mmap(-1, length) as buffer:
            buffer[:] = self.bytes(length)
            return self._written(file, file.direct, start, buffer)

    def _direct(self, start: int, length: int) -> tuple[int, int]:
        if not self.by_kernel and self.chance.random() < 0.3:
            return start, length
        return start & -SECTOR, max(length & -SECTOR, SECTOR)

    def store(self, file: File) -> str:
        """Through a shared mapping, and sometimes msync(2)."""
        start, length = self.span(file)
        if not length:
            return "nothing"
        first = start & -PAGE
        with mmap.mmap(file.fd, start + length - first, offset=file.base + first) as mapped:
            data = self.bytes(length)
            mapped[start - first:] = data
            synced = self.chance.random() < 0.4
            if synced:
                mapped.flush()
        file.put(start, data)
        return f"{start} +{length}{' msync' if synced else ''}"

    def store_behind(self, file: File) -> str:
        """Through a mapping, behind the end of the file in its last page: what nobody may see later."""
        behind = -len(file.data) % PAGE
        if not behind or not file.data:
            return "nothing"
        first = len(file.data) & -PAGE
        with mmap.mmap(file.fd, len(file.data) - first, offset=file.base + first) as mapped:
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            ctypes.memset(address + len(file.data) - first, 0x5A, behind)
        return f"{len(file.data)} +{behind}"

    def truncate(self, file: File) -> str:
        size = self.chance.choice((self.place(), self.place() % (len(file.data) + 1)))
        os.ftruncate(file.fd, file.base + size)
        del file.data[size:]
        file.grow(size)
        return f"{size}"

    def begin_again(self, file: File) -> str:
        """Shortened to nothing, what stands before the window included."""
        os.ftruncate(file.fd, 0)
        os.ftruncate(file.fd, file.base)
        file.data.clear()
        return ""

    def punch(self, file: File) -> str:
        start, length = self.room()
        fallocate(file.fd, PUNCH_HOLE | KEEP_SIZE, file.base + start, length)
        self._zeroed(file, start, length)
        return f"{start} +{length}"

    def zero(self, file: File) -> str:
        start, length = self.room()
        keep = self.chance.choice((0, KEEP_SIZE))
        fallocate(file.fd, ZERO_RANGE | keep, file.base + start, length)
        if not keep:
            file.grow(start + length)
        self._zeroed(file, start, length)
        return f"{start} +{length}{' keeping the size' if keep else ''}"

    def _zeroed(self, file: File, start: int, length: int) -> None:
        length = min(length, len(file.data) - start)
        if length > 0:
            file.data[start:start + length] = bytes(length)

    def reserve(self, file: File) -> str:
        start, length = self.room()
        keep = self.chance.choice((0, KEEP_SIZE))
        fallocate(file.fd, keep, file.base + start, length)
        if not keep:
            file.grow(start + length)
        return f"{start} +{length}{' keeping the size' if keep else ''}"

    def copy(self, file: File) -> str:
        """copy_file_range(2) to this file, sometimes from itself."""
        source = self.chance.choice(self.files)
        start, length = self.span(source)
        to = self.place()
        length = min(length, WINDOW_BYTES - to)
        if length <= 0 or (source is file and abs(start - to) < length):
            return "nothing"
        done = 0
        while done < length:
            count = os.copy_file_range(source.fd, file.fd, length - done, source.base + start + done,
                                       file.base + to + done)
            if not count:
                raise Mismatch(f"{file.name}: copy_file_range copied {done} of {length} bytes")
            done += count
        source.log.append(f"    {self.count} copied from {start} +{length} to {file.name} {to}")
        file.put(to, bytes(source.data[start:start + length]))
        return f"from {source.name} {start} +{length} to {to}: size {len(file.data)}"

    def sync(self, file: File) -> str:
        how = self.chance.choice(("fsync", "fdatasync", "syncfs"))
        if how == "syncfs":
            Side(self.root).syncfs()
        else:
            getattr(os, how)(file.fd)
        return how

    def forget(self, file: File) -> str:
        """Have the page cache lose what it has of the file."""
        os.fsync(file.fd)
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return ""

    # ---- looks

    def read(self, file: File) -> str:
        start, length = self.span(file)
        file.expect(start, os.pread(file.fd, length, file.base + start), "read")
        return f"{start} +{length}"

    def read_direct(self, file: File) -> str:
        start, length = self._direct(*self.room())
        with mmap.mmap(-1, length) as buffer:
            count = os.preadv(file.direct, [buffer], file.base + start)
            if count != max(min(length, len(file.data) - start), 0):
                raise Mismatch(f"{file.name}: {count} bytes at {start} of {len(file.data)} read directly, not {length}")
            file.expect(start, buffer[:count], "read directly")
        return f"{start} +{length}"

    def read_mapped(self, file: File) -> str:
        """Through a mapping, the zeroes behind the end of the file included."""
        if not file.data:
            return "nothing"
        with mmap.mmap(file.fd, len(file.data), mmap.MAP_SHARED, mmap.PROT_READ, offset=file.base) as mapped:
            file.expect(0, mapped[:], "read through a mapping")
        return ""

    def check(self, file: File) -> str:
        """All of it, its size included."""
        size = os.fstat(file.fd).st_size
        if size != (file.size if file.data or size else 0):
            raise Mismatch("\n".join([f"{file.name}: {size} bytes long, not {file.size}", *file.log]))
        file.expect(0, os.pread(file.fd, WINDOW_BYTES * 2, file.base), "read whole")
        return ""

    def check_holes(self, file: File) -> str:
        """What SEEK_HOLE calls a hole holds nothing."""
        os.fsync(file.fd)
        at = 0
        while at < len(file.data):
            hole = os.lseek(file.fd, file.base + at, os.SEEK_HOLE) - file.base
            try:
                at = os.lseek(file.fd, file.base + hole, os.SEEK_DATA) - file.base
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                at = len(file.data)
            if any(file.data[hole:at]):
                raise Mismatch("\n".join([f"{file.name}: SEEK_HOLE finds a hole from {hole} to {at}", *file.log]))
        return ""


def verify(name: str, seed: int, operations: int, folder: Path, driver: str = "fusewire") -> None:
    """So many operations on a new file system, with remounts.  Raises ``Mismatch`` or AssertionError."""
    shape, path = SHAPES[name], folder / "verifier.img"
    stale_image(path, shape.mkfs, shape.mib << 20)
    by_kernel = driver == "kernel"
    verifier = Verifier(seed, folder, shape.has_extents, by_kernel)
    chance = random.Random(f"mounts:{seed}")
    while verifier.count < operations:
        options = "rw,noatime" if by_kernel else shape.options
        with MOUNTS[driver](path, options) as mount, verifier.opened(mount.root):
            verifier.work(min(chance.randrange(20, 250), operations - verifier.count))
            text = mount.log_text()
            assert '"level": "error"' not in text and "Traceback" not in text, text
        complaint = fsck(path, kernels=by_kernel)
        assert not complaint, complaint
    with kernel_mount(path, "rw,noatime") as mount, verifier.opened(mount.root):
        for file in verifier.files:
            verifier.check_holes(file)
    path.unlink()


def main(name: str, seed: str, operations: str = "500", *more: str) -> None:
    private_mounts()
    with tempfile.TemporaryDirectory(prefix="fusewire-verifier-") as folder:
        verify(name, int(seed), int(operations), Path(folder), "kernel" if "--kernel" in more else "fusewire")


if __name__ == "__main__":
    main(*sys.argv[1:])
