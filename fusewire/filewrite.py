"""Carries out the writing half of ``ext4.iomapwrite`` where the kernel cannot: file data from a request to the device.

A ``WritePlan`` says what goes where; the server writes it and takes the next step, which tells the core, before anybody
else's turn.  So a transaction that was begun for the plan is still true then, and applies once the data are written:
where that fails, nothing has happened.

FW1 What a fresh block (unwritten, or new) does not get from the request it gets as zeroes, in the same write.
FW2 What stands behind the end of a file in its last block is zero before the file grows over it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fusewire.ext4 import iomap, iomapwrite
from fusewire.fileio import ZEROES, Plan

if TYPE_CHECKING:
    from fusewire.ext4.filesystem import Ext4
    from fusewire.ext4.inode import Inode
    from fusewire.ext4.transaction import Transaction

Buffer = bytes | memoryview
Writes = list[tuple[int, list[Buffer]]]     # (address on the device, the pieces that follow each other there)

STREAM_BYTES = 8 << 20      # that follow each other on the device, before it is told to begin with them


class WritePlan:
    """Data for the device, and the step that follows in the same turn; if that has to wait, all is planned anew."""

    __slots__ = ("again", "then", "writes")

    def __init__(self, writes: Writes, then: Callable[[], Any], again: Callable[[], Any] | None = None) -> None:
        """``again`` makes the plan anew; None: the request's handler does."""
        self.writes = writes
        self.then = then
        self.again = again


class Stream:
    """Notices data that are written one after the other, so that the device begins before a flush waits for it."""

    def __init__(self, begin: Callable[[int, int], None]) -> None:
        """``begin`` is called with ranges (address, bytes) that the device shall begin with."""
        self._begin = begin
        self._start = self._end = 0

    def add(self, address: int, length: int) -> None:
        """Data were written."""
        if address != self._end:
            self._start = address
        self._end = address + length
        if self._end - self._start >= STREAM_BYTES:
            start, self._start = self._start, self._end
            self._begin(start, self._end - start)


class ReadPlan:
    """File data to be read, and the step that gets them, its own from then on; the step may be taken again."""

    __slots__ = ("plan", "then")

    def __init__(self, plan: Plan, then: Callable[[memoryview], Any]) -> None:
        self.plan = plan
        self.then = then


class DiscardPlan:
    """Ranges of the device (address, bytes) that hold nothing, and the step that follows once it was told."""

    __slots__ = ("ranges", "then")

    def __init__(self, ranges: list[tuple[int, int]], then: Callable[[], Any]) -> None:
        self.ranges = ranges
        self.then = then


def plan_write(tx: "Transaction", inode: "Inode", offset: int, data: memoryview) -> Writes:
    """Where the data of a file from ``offset`` on go; blocks for them are allocated in the transaction.

    Raises what ``iomapwrite.begin`` raises.
    """
    writes = plan_clear(tx, inode) if offset > inode.size else []
    return writes + plan_place(tx, inode, offset, data)


def plan_place(tx: "Transaction", inode: "Inode", offset: int, data: memoryview) -> Writes:
    """As ``plan_write``, for a file whose last block was taken care of (FW2)."""
    writes: Writes = []
    position, end = offset, offset + len(data)
    while position < end:
        inode, mapping = iomapwrite.begin(tx, inode, position, end - position, unwritten=False)
        stop = min(mapping.offset + mapping.length, end)
        piece = data[position - offset:stop - offset]
        address = mapping.addr + position - mapping.offset
        if mapping.type == iomap.UNWRITTEN or mapping.flags & iomapwrite.NEW:
            before = tx.geometry.within_block(position)
            behind = -tx.geometry.within_block(stop) % tx.geometry.block_bytes
            writes.append((address - before, [ZEROES[:before], piece, ZEROES[:behind]]))
        else:
            writes.append((address, [piece]))
        position = stop
    return writes


def plan_zero_edges(fs: "Ext4", inode: "Inode", offset: int, length: int) -> Writes:
    """Zeroes for the parts of blocks at both ends of a range, as far as they hold data."""
    geometry, end = fs.geometry, offset + length
    first = min(geometry.byte_of(geometry.blocks_for(offset)), end)
    last = max(geometry.byte_of(geometry.block_of(end)), first)
    writes: Writes = []
    for start, stop in ((offset, first), (last, end)):
        if start < stop:
            mapping = iomap.begin(fs, inode, start, stop - start, iomap.OP_REPORT)
            if mapping.type == iomap.MAPPED:
                writes.append((mapping.addr + start - mapping.offset, [ZEROES[:stop - start]]))
    return writes


def plan_clear(fs: "Ext4", inode: "Inode") -> Writes:
    """Zeroes for what stands behind the end of a file in its last block (FW2).

    Raises ``CommitFirst`` if it was cut off just now: a crash must not bring the old size back with zeroes.
    """
    tail = iomapwrite.tail_to_clear(fs, inode)
    return [] if tail is None else [(tail[0], [ZEROES[:tail[1]]])]
