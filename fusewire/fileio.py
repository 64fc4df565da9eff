"""Carries out the mappings of ``ext4.iomap`` where the kernel cannot: file data between the device and a reply.

A ``Plan`` is all that a READ needs, worked out by the core without waiting.  ``fill_now`` carries it out from what is
resident, ``fill`` waits for the device and belongs in a worker thread.

F1  Carrying out a plan touches no state of the core: a plan may be carried out while the loop serves other requests.
F2  A plan's memory is bounded by ``READ_MOST_BYTES`` whatever the file looks like; holes cost none.
"""

import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING

from fusewire.blockdev import BlockDevice
from fusewire.ext4 import iomap

if TYPE_CHECKING:
    from fusewire.ext4.filesystem import Ext4
    from fusewire.ext4.inode import Inode

READ_MOST_BYTES = 1 << 20           # the largest READ: max_pages of 4 KiB; larger requests gain nothing
MERKLE_MOST_BYTES = 1 << 16         # a verity file is read in whole blocks of its hash tree
BUFFER_BYTES = READ_MOST_BYTES + 2 * MERKLE_MOST_BYTES

# Never written, so every page of it is the kernel's one page of zeroes.
ZEROES = memoryview(mmap.mmap(-1, BUFFER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ))

Verify = Callable[[memoryview], None]
Segment = tuple[int, int, int]      # (first byte in the buffer, length, address on the device)


class Plan:
    """How to get the bytes of one READ.

    Attributes:
        length: bytes of the buffer that the plan fills.
        reply: the slice of them that answers the request.
        segments: the parts that stand on the device, in order; everything between them is zero.
        verify: checks the filled buffer and raises what the caller shall get instead, or None.
    """

    __slots__ = ("length", "reply", "segments", "verify")

    def __init__(self, length: int, segments: list[Segment], reply: slice, verify: Verify | None = None) -> None:
        self.length = length
        self.segments = segments
        self.reply = reply
        self.verify = verify


def buffer() -> memoryview:
    """A buffer that any plan fits in; its pages cost memory once they were used."""
    return memoryview(mmap.mmap(-1, BUFFER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def plan(fs: "Ext4", inode: "Inode", offset: int, end: int, mapping: iomap.Mapping) -> Plan:
    """The plan for bytes [offset, end) of a file whose data are not inline; ``end`` is at most the file's size.

    ``mapping`` is that of ``offset``; the further ones are asked for.  Raises what ``iomap.begin`` raises.
    """
    at, mapped, address, kind, _ = mapping
    if at + mapped >= end:  # the usual case: one extent holds all of it
        length = end - offset
        if kind == iomap.MAPPED:
            return Plan(length, [(0, length, address + offset - at)], slice(0, length))
        return Plan(length, [], slice(0, length))
    return _plan_of_many(fs, inode, offset, end)


def _plan_of_many(fs: "Ext4", inode: "Inode", offset: int, end: int) -> Plan:
    segments: list[Segment] = []
    position = offset
    while position < end:
        mapping = iomap.begin(fs, inode, position, end - position)
        stop = min(mapping.offset + mapping.length, end)
        if mapping.type == iomap.MAPPED:
            address = mapping.addr + position - mapping.offset
            _append(segments, (position - offset, stop - position, address))
        position = stop
    return Plan(end - offset, segments, slice(0, end - offset))


def _append(segments: list[Segment], new: Segment) -> None:
    """Add a segment, joined to the one before it where both the buffer and the device go on."""
    if segments:
        start, length, address = segments[-1]
        if start + length == new[0] and address + length == new[2]:
            segments[-1] = (start, length + new[1], address)
            return
    segments.append(new)


def fill_now(device: BlockDevice, what: Plan, view: memoryview) -> bool:
    """Whether the plan could be carried out without waiting; if not, the kernel may have begun to read."""
    segments = what.segments
    if what.verify is not None:     # hashing takes longer than a hop to a thread
        return False
    if len(segments) == 1 and segments[0][1] == what.length:    # the usual case: one extent holds all of it
        return device.read_into_now(view[:what.length], segments[0][2]) == what.length
    done = 0
    for start, length, address in segments:
        if device.read_into_now(view[start:start + length], address) < length:
            return False
        if start > done:
            view[done:start] = ZEROES[:start - done]
        done = start + length
    if done < what.length:
        view[done:what.length] = ZEROES[:what.length - done]
    return True


def fill(device: BlockDevice, what: Plan, view: memoryview) -> None:
    """Carry the plan out, waiting for the device.  Raises its OSError, or what ``verify`` raises."""
    if len(what.segments) > 1:
        for _, length, address in what.segments:
            device.will_need(address, length)
    done = 0
    for start, length, address in what.segments:
        view[done:start] = ZEROES[:start - done]
        device.read_into(view[start:start + length], address)
        done = start + length
    view[done:what.length] = ZEROES[:what.length - done]
    if what.verify is not None:
        what.verify(view[:what.length])
