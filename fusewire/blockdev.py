"""The backing device or image file: its only file descriptor, its size, and reads of bytes and of metadata blocks.

Each read exists twice: one that never waits (``preadv`` with RWF_NOWAIT: 0.7 µs for a resident 4 KiB, against 70 to
100 µs for a hop to a thread) and one that does, for worker threads.

D1  All offsets are in bytes from the start of the file system, which may begin inside the device (a partition).
D2  A read beyond the end of the device is an EIO, never a short result.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Sequence

from fusewire import ioctl
from fusewire.ext4.errors import Refused
from fusewire.ext4.units import Geometry

Buffer = bytes | bytearray | memoryview
Runs = Iterable[tuple[int, int]]
Fetched = dict[int, bytes | OSError]

# Who walks a tree reads small pieces that lie close together, in no order that the kernel's own readahead would notice.
# A read that has to wait, near to where the last one waited, brings in all around it: of "grep -r" over 20,000 files
# one in ten waits, not each (server CPU 2.6 → 0.7 s).  Reads at random places of a large file are rarely near.
AROUND_BYTES = 512 << 10
NEAR_BYTES = 2 << 20

_RANGE_WRITE = 2        # SYNC_FILE_RANGE_WRITE of sync_file_range(2): starts, waits for nothing, reports nothing
_libc = ctypes.CDLL(None)
_WOULD_WAIT = frozenset((errno.EAGAIN, errno.EOPNOTSUPP))


class BlockDevice:
    """An open block device or image file, of which the file system occupies [start, start + size).

    ``barrier``: whether ``flush`` has the device empty its cache.
    """

    def __init__(self, fd: int, start_bytes: int = 0, size_bytes: int = 0) -> None:
        """Take over ``fd``; with ``size_bytes`` 0 the file system's part reaches to the end."""
        self.fd = fd
        self.start_bytes = start_bytes
        self.barrier = True
        self._waited_at = -NEAR_BYTES   # where the last read that waited was, and the window that was brought in
        self._around = -1
        end = self.end_bytes()
        self.size_bytes = max(end - start_bytes, 0)
        if size_bytes:
            self.size_bytes = min(self.size_bytes, size_bytes)

    def end_bytes(self) -> int:
        """The size of the whole device or file now."""
        status = os.fstat(self.fd)
        return ioctl.device_bytes(self.fd) if stat.S_ISBLK(status.st_mode) else status.st_size

    def close(self) -> None:
        """Close the file descriptor.  May be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def read_into_now(self, view: memoryview, offset: int) -> int:
        """Bytes read without waiting, possibly fewer than ``view`` holds or 0; OSError when the device fails."""
        try:
            return os.preadv(self.fd, [view], self.start_bytes + offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno in _WOULD_WAIT:
                return 0
            raise

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on.  Waits.  OSError when the device fails or ends before."""
        self._read_around(offset, len(view))
        position = self.start_bytes + offset
        while view:
            count = os.preadv(self.fd, [view], position)
            if count == 0:
                raise OSError(errno.EIO, "the device ends here", f"byte {position}")
            view, position = view[count:], position + count

    def _read_around(self, offset: int, length: int) -> None:
        """Have the kernel read what lies around a read that waits, if the last one waited nearby."""
        before, self._waited_at = self._waited_at, offset
        start = offset - offset % AROUND_BYTES
        if length < AROUND_BYTES and abs(offset - before) < NEAR_BYTES and start != self._around:
            self._around = start
            self.will_need(start, AROUND_BYTES)

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes, fewer at the end of the device.  Waits."""
        length = max(min(length, self.size_bytes - offset), 0)
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def write(self, offset: int, pieces: Sequence[Buffer]) -> None:
        """Write the pieces one after the other from ``offset`` on.  OSError when the device fails or is full."""
        position, left = self.start_bytes + offset, [memoryview(piece) for piece in pieces]
        if position + sum(map(len, left)) > self.start_bytes + self.size_bytes:
            raise OSError(errno.EIO, "a write beyond the end of the device", f"byte {position}")
        while left:
            count = os.pwritev(self.fd, left, position)
            if count == 0:
                raise OSError(errno.EIO, "the device takes no more", f"byte {position}")
            position += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left:
                left[0] = left[0][count:]

    def begin_writing(self, offset: int, length: int) -> None:
        """Have the kernel begin to write a range to the device: a flush finds less to do then.  May wait a little."""
        _libc.sync_file_range(self.fd, ctypes.c_int64(self.start_bytes + offset), ctypes.c_int64(length), _RANGE_WRITE)

    def flush(self) -> None:
        """Make everything that was written durable.  Waits.  OSError if any of it could not be written.

        With ``barrier`` off, the device has got it then, and may still lose it with its power.
        """
        if self.barrier:
            os.fdatasync(self.fd)
        else:
            ioctl.write_out(self.fd)

    def discard(self, offset: int, length: int) -> None:
        """Tell the device that a range holds nothing.  ``Refused(EOPNOTSUPP)`` where it does not want to know."""
        try:
            if stat.S_ISBLK(os.fstat(self.fd).st_mode):
                ioctl.discard(self.fd, self.start_bytes + offset, length)
            else:
                ioctl.punch(self.fd, self.start_bytes + offset, length)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                raise Refused(errno.EOPNOTSUPP) from error
            raise

    def will_need(self, offset: int, length: int) -> None:
        """Have the kernel begin to read a range, so that several are read at once."""
        os.posix_fadvise(self.fd, self.start_bytes + offset, length, os.POSIX_FADV_WILLNEED)


class BlockReader:
    """Reads runs of metadata blocks, each as ``bytes``, through a scratch buffer that nobody else uses meanwhile."""

    def __init__(self, device: BlockDevice, geometry: Geometry, scratch: memoryview) -> None:
        self._device = device
        self._geometry = geometry
        self._scratch = scratch
        self._most = geometry.block_of(len(scratch))  # blocks of one read; longer runs are read in pieces

    def read_now(self, runs: Runs) -> tuple[Fetched, list[tuple[int, int]]]:
        """The blocks that are resident, and the runs that are not (whose reading the kernel may have begun)."""
        found: Fetched = {}
        missing: list[tuple[int, int]] = []
        for first, count in self._pieces(runs):
            try:
                length = self._device.read_into_now(self._window(count), self._geometry.byte_of(first))
            except OSError:
                length = 0  # the thread finds out which of the blocks it is
            here = self._geometry.block_of(length)
            self._split(first, here, found)
            if here < count:
                missing.append((first + here, count - here))
        return found, missing

    def read(self, runs: Runs) -> Fetched:
        """Every block's bytes, or the error that its own read gave.  Waits."""
        found: Fetched = {}
        pieces = list(self._pieces(runs))
        if len(pieces) > 1:
            for first, count in pieces:
                self._device.will_need(self._geometry.byte_of(first), self._geometry.byte_of(count))
        for first, count in pieces:
            self._read_piece(first, count, found)
        return found

    def _read_piece(self, first: int, count: int, found: Fetched) -> None:
        try:
            self._device.read_into(self._window(count), self._geometry.byte_of(first))
        except OSError as error:
            if count == 1:
                found[first] = error
                return
            for block in range(first, first + count):
                self._read_piece(block, 1, found)
            return
        self._split(first, count, found)

    def _pieces(self, runs: Runs) -> Iterable[tuple[int, int]]:
        for first, count in runs:
            for start in range(first, first + count, self._most):
                yield start, min(self._most, first + count - start)

    def _window(self, count: int) -> memoryview:
        return self._scratch[:self._geometry.byte_of(count)]

    def _split(self, first: int, count: int, found: Fetched) -> None:
        byte_of, scratch = self._geometry.byte_of, self._scratch
        for index in range(count):
            found[first + index] = bytes(scratch[byte_of(index):byte_of(index + 1)])
