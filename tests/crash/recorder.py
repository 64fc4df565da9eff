"""A device that remembers what was written to it and when it was flushed, and what a power cut could leave of that.

``Recorder`` stands in for ``fusewire.blockdev.BlockDevice``.  Its events are writes and flushes in order; a *cut* is a
number of events after which the power goes.  What was written before the last flush is there then.  Of what was written
after it, each sector may hold any version: the old one, or any that was written since (``Fate``).

The one thing that is not torn is the file system's superblock: its checksum stands in its second sector, and the
kernel's ext4 writes it in one piece as well and relies on the device for the rest.
"""

from __future__ import annotations

import errno
import random
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from fusewire.blockdev import Buffer

SECTOR = 512
SUPERBLOCK_SECTORS = (2, 3)
DISCARDED = b"\xddGONE"
_SUPERBLOCK_AT, _SUPERBLOCK_END = 1024, 2048


class Write(NamedTuple):
    """One write of whole sectors: where, and its bytes."""

    offset: int
    data: bytes


class Flush(NamedTuple):
    """Everything before is durable."""


Event = Write | Flush


class Fate(Enum):
    """What becomes of the writes since the last flush."""

    ALL = "all of them"
    NONE = "none of them"
    PREFIX = "the first ones"
    SUBSET = "some of them"
    ONE = "one of them"
    BUT_ONE = "all but one"
    TORN = "some sectors of them"
    MIXED = "any version of each sector"


class Fault(NamedTuple):
    """What the device does at its n-th call: fail with ``number`` after a part (0 to 1) of the write has got there."""

    number: int
    part: float = 0.0
    torn: bool = False          # the part is any of the sectors, not the first ones


class Recorder:
    """The device.  ``data`` is what reads see.

    ``before_call``, if set, is called in the thread that writes or flushes, before it does.  ``faults`` names calls
    (numbered from 0 over writes and flushes together) that fail.
    """

    def __init__(self, data: bytes) -> None:
        self.initial = data
        self.data = bytearray(data)
        self.events: list[Event] = []
        self.start_bytes, self.size_bytes = 0, len(data)
        self.before_call: Callable[[], None] | None = None
        self.faults: dict[int, Fault] = {}
        self.calls = 0
        self.failed_at: int | None = None       # events at the first fault, what it still wrote among them
        self.chance = random.Random(0)
        self._lock = threading.Lock()

    # ---- as BlockDevice

    def end_bytes(self) -> int:
        return self.size_bytes

    def close(self) -> None:
        """Nothing to close."""

    def will_need(self, _offset: int, _length: int) -> None:
        """Everything is in memory."""

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset:offset + length])

    def read_into(self, view: memoryview, offset: int) -> None:
        if offset + len(view) > self.size_bytes:
            raise OSError(errno.EIO, "the device ends here")
        view[:] = self.data[offset:offset + len(view)]

    def read_into_now(self, view: memoryview, offset: int) -> int:
        self.read_into(view, offset)
        return len(view)

    def write(self, offset: int, pieces: Sequence[Buffer]) -> None:
        data = b"".join(pieces)
        fault = self._call()
        if offset + len(data) > self.size_bytes:
            raise OSError(errno.EIO, "a write beyond the end of the device")
        with self._lock:
            if fault is None:
                self._put(offset, data)
            else:
                for start, piece in self._parts(offset, data, fault):
                    self._put(start, piece)
                self.failed_at = len(self.events)
                raise OSError(fault.number, "injected")

    def flush(self) -> None:
        fault = self._call()
        if fault is not None:
            self.failed_at = len(self.events)
            raise OSError(fault.number, "injected")
        self.events.append(Flush())

    def discard(self, offset: int, length: int) -> None:
        """Whoever still needs what was there finds something else."""
        fault = self._call()
        if fault is not None:
            raise OSError(fault.number, "injected")
        self._put(offset, (DISCARDED * (length // len(DISCARDED) + 1))[:length])

    def _call(self) -> Fault | None:
        if self.before_call is not None:
            self.before_call()
        fault = self.faults.get(self.calls)
        self.calls += 1
        return fault

    def _put(self, offset: int, data: bytes) -> None:
        """Devices write whole sectors; the caches above them complete what is less."""
        if data:
            self.data[offset:offset + len(data)] = data
            first, end = offset - offset % SECTOR, offset + len(data) + -(offset + len(data)) % SECTOR
            self.events.append(Write(first, bytes(self.data[first:end])))

    def _parts(self, offset: int, data: bytes, fault: Fault) -> Iterable[tuple[int, bytes]]:
        if not fault.torn:
            end = offset + int(len(data) * fault.part)
            return [(offset, data[:(_SUPERBLOCK_AT if _SUPERBLOCK_AT < end < _SUPERBLOCK_END else end) - offset])]
        whole = self.chance.random() < fault.part
        return [(start, piece) for start, piece in sectors_of(offset, data)
                if (whole if start // SECTOR in SUPERBLOCK_SECTORS else self.chance.random() < fault.part)]


def sectors_of(offset: int, data: bytes) -> Iterable[tuple[int, bytes]]:
    """The write as writes that stay within a sector each."""
    position = 0
    while position < len(data):
        count = min(SECTOR - (offset + position) % SECTOR, len(data) - position)
        yield offset + position, data[position:position + count]
        position += count


class Cuts:
    """The images that power cuts could leave of a recording."""

    def __init__(self, recorder: Recorder) -> None:
        self.events = recorder.events
        self.flushes = [index for index, event in enumerate(self.events) if isinstance(event, Flush)]
        self._durable = bytearray(recorder.initial)
        self._upto = 0      # events that ``_durable`` holds

    def window(self, cut: int) -> tuple[int, int]:
        """(first, end) of the events whose fate is open when the power goes after ``cut`` events."""
        before = bisect_right(self.flushes, cut - 1)
        return (self.flushes[before - 1] + 1 if before else 0), cut

    def image(self, cut: int, fate: Fate, chance: random.Random) -> bytearray:
        """The device after a cut.  Cheapest when called with growing ``cut``."""
        first, end = self.window(cut)
        self._advance(first)
        image = bytearray(self._durable)
        for offset, data in _survivors(self.events[first:end], fate, chance):
            image[offset:offset + len(data)] = data
        return image

    def _advance(self, upto: int) -> None:
        assert upto >= self._upto, "cuts are taken in order"
        for event in self.events[self._upto:upto]:
            if isinstance(event, Write):
                self._durable[event.offset:event.offset + len(event.data)] = event.data
        self._upto = upto


def _survivors(events: Iterable[Event], fate: Fate, chance: random.Random) -> list[tuple[int, bytes]]:
    writes = [(event.offset, event.data) for event in events if isinstance(event, Write)]
    if fate is Fate.ALL or not writes:
        return writes
    if fate is Fate.NONE:
        return []
    if fate is Fate.PREFIX:
        return writes[:chance.randrange(len(writes) + 1)]
    if fate is Fate.ONE:
        return [chance.choice(writes)]
    if fate is Fate.BUT_ONE:
        gone = chance.randrange(len(writes))
        return writes[:gone] + writes[gone + 1:]
    if fate is Fate.SUBSET:
        share = chance.random()
        kept = [write for write in writes if chance.random() < share]
        chance.shuffle(kept)
        return kept
    return _sectors(writes, fate, chance)


def _sectors(writes: list[tuple[int, bytes]], fate: Fate, chance: random.Random) -> list[tuple[int, bytes]]:
    """Some sectors of the writes, in order (TORN), or of each sector a version that anyone wrote, or none (MIXED)."""
    pieces: list[tuple[int, bytes]] = []
    together: list[tuple[int, bytes]] = []
    for offset, data in writes:
        for start, piece in sectors_of(offset, data):
            (together if start // SECTOR in SUPERBLOCK_SECTORS else pieces).append((start, piece))
    if fate is Fate.TORN:
        share = chance.random()
        kept = [piece for piece in pieces if chance.random() < share]
    else:
        kept = [piece for piece in pieces if chance.random() < 0.7]
        chance.shuffle(kept)
    supers = len(together) // len(SUPERBLOCK_SECTORS)
    if supers:
        which = chance.randrange(supers + 1)
        kept += together[:which * len(SUPERBLOCK_SECTORS)]
    return kept
