"""COPY_FILE_RANGE: data from file to file without a way through the caller, in bounded windows.

    data in the source     ─▶ read them ─▶ room in the target, write, ``ioend``: one transaction ─▶ the next window
    a hole, or unwritten   ─▶ the target's blocks there are freed, the parts of blocks at both ends zeroed ─▶ the next

What one request copies is bounded; the caller asks for the rest.  Every step can be run again, for it finds what it
starts from in its ``Copy``, which never changes.  What was copied before an error counts.
"""

import errno
from collections.abc import Callable
from typing import NamedTuple

from fusewire import fileio, filewrite, uapi, wire
from fusewire.ext4 import iomap, iomapwrite, truncate
from fusewire.ext4.errors import Refused
from fusewire.ext4.transaction import Transaction
from fusewire.fileio import Plan, Segment
from fusewire.filewrite import ReadPlan, WritePlan
from fusewire.handlers import callers
from fusewire.handlers.writing import punch, writable
from fusewire.session import Session
from fusewire.wire import Request

WINDOW_BYTES = fileio.READ_MOST_BYTES
REQUEST_BYTES = 16 * WINDOW_BYTES   # copied for one request, if it is data
REQUEST_WINDOWS = 32                # each is a few calls deeper
NOTHING = memoryview(b"")

Reply = bytes | ReadPlan | WritePlan


class Copy(NamedTuple):
    """One request, and how far it has come: bytes ``start + done`` of the source go to ``to + done`` of the target."""

    session: Session
    request: Request
    source: int
    target: int
    start: int
    to: int
    length: int
    done: int = 0
    windows: int = 0

    @property
    def is_ended(self) -> bool:
        """Whether all is copied, or enough for one request."""
        return self.done >= self.length or self.windows >= REQUEST_WINDOWS or self.done >= REQUEST_BYTES

    def reply(self) -> bytes:
        """How much was copied."""
        if self.request.opcode == uapi.FUSE_COPY_FILE_RANGE_64:
            return wire.reply_copied(self.request.unique, self.done)
        return wire.reply_write(self.request.unique, self.done)

    def transaction(self) -> Transaction:
        """A transaction of the caller's."""
        return callers.transaction(self.session, self.request)


def copy_file_range(session: Session, request: Request) -> Reply:
    """COPY_FILE_RANGE, COPY_FILE_RANGE_64.  The kernel has written both ranges back; they do not overlap."""
    _, start, node, _, to, length, flags = request.body
    source, target = session.number_of(request.nodeid), session.number_of(node)
    with Transaction(session.fs) as tx:
        found = tx.inode(source)
        if flags or not found.is_regular:
            raise Refused(errno.EINVAL)
        most = tx.max_file_bytes(callers.dropped(tx, request, writable(tx, target))) - to
    length = min(length, found.size - start)
    if length > 0 >= most:
        raise Refused(errno.EFBIG)
    return _next(Copy(session, request, source, target, start, to, min(length, most)))


def _next(copy: Copy) -> Reply:
    if copy.is_ended:
        return copy.reply()
    length, segments = _window(copy)
    if not segments:
        return _or_short(copy, lambda: _store(copy, length, [], NOTHING))
    plan = Plan(length, segments, slice(0, length))
    return ReadPlan(plan, lambda data: _or_short(copy, lambda: _store(copy, length, _joined(segments), data)))


def _or_short(copy: Copy, step: Callable[[], Reply]) -> Reply:
    """What a step gives; if it is refused after something was copied, that is the answer."""
    try:
        return step()
    except Refused:
        if copy.done:
            return copy.reply()
        raise


def _window(copy: Copy) -> tuple[int, list[Segment]]:
    """(length, segments with data) of the source from here on; without any, the length is that of the hole."""
    fs, offset = copy.session.fs, copy.start + copy.done
    left, position = copy.length - copy.done, 0
    segments: list[Segment] = []
    of = fs.inode(copy.source)
    while position < left and (not segments or position < WINDOW_BYTES):
        mapping = iomap.begin(fs, of, offset + position, left - position)
        length = min(mapping.offset + mapping.length - offset - position, left - position)
        if mapping.type == iomap.MAPPED:
            if position and not segments:
                break
            length = min(length, WINDOW_BYTES - position)
            segments.append((position, length, mapping.addr + offset + position - mapping.offset))
        elif segments:
            length = min(length, WINDOW_BYTES - position)
        position += length
    return position, segments


def _joined(segments: list[Segment]) -> list[tuple[int, int]]:
    """(start, end) of the data, joined where segments follow each other: these may share a block of the target."""
    runs: list[tuple[int, int]] = []
    for start, length, _ in segments:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + length)
        else:
            runs.append((start, start + length))
    return runs


def _store(copy: Copy, length: int, runs: list[tuple[int, int]], data: memoryview) -> Reply:
    """Bring a window of ``length`` bytes into the target: ``data`` where ``runs`` say, nothing between them."""
    at = copy.to + copy.done
    edges = [0, *(edge for run in runs for edge in run), length]
    holes = [(at + start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
    for start, count in holes:
        punch(copy.session, copy.target, start, count)
    tx = copy.transaction()
    found = tx.inode(copy.target)
    writes = filewrite.plan_clear(tx, found) if at + length > found.size else []
    for start, count in holes:
        writes += filewrite.plan_zero_edges(tx, found, start, min(count, max(found.size - start, 0)))
    for start, end in runs:
        writes += filewrite.plan_place(tx, tx.inode(copy.target), at + start, data[start:end])
    return WritePlan(writes, lambda: _or_short(copy, lambda: _stored(copy, tx, length, runs)),
                     again=lambda: _or_short(copy, lambda: _store(copy, length, runs, data)))


def _stored(copy: Copy, tx: Transaction, length: int, runs: list[tuple[int, int]]) -> Reply:
    at = copy.to + copy.done
    with tx:
        found = tx.inode(copy.target)
        for start, end in runs:
            found = iomapwrite.ioend(tx, found, at + start, end - start)
        if at + length > found.size:
            truncate.set_size(tx, found, at + length)
        tx.wrote_data = True
    return _next(copy._replace(done=copy.done + length, windows=copy.windows + 1))
