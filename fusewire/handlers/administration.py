"""IOCTL of administrators: FITRIM and EXT4_IOC_SHUTDOWN."""

import errno
from struct import Struct
from typing import NamedTuple

from fusewire import ioctl as numbers
from fusewire import wire
from fusewire.ext4 import trim
from fusewire.ext4.errors import Refused
from fusewire.ext4.transaction import Transaction
from fusewire.filewrite import DiscardPlan
from fusewire.handlers.callers import ROOT_USER
from fusewire.session import Session, Shutdown
from fusewire.wire import Request

SHUTDOWN_DEFAULT, SHUTDOWN_FLUSH_LOG, SHUTDOWN_AT_ONCE = 0, 1, 2     # EXT4_GOING_FLAGS_*
_U32 = Struct("=I")


class Trim(NamedTuple):
    """One FITRIM, and how far it has come: blocks [first, end), from group ``number`` on."""

    session: Session
    unique: int
    asked: bytes
    first: int
    end: int
    shortest: int
    number: int
    bytes_done: int = 0

    def reply(self) -> wire.Pieces:
        """How much was discarded, in the record's length."""
        start, _, shortest = numbers.FSTRIM_RANGE.unpack(self.asked)
        return wire.reply_ioctl(self.unique, 0, numbers.FSTRIM_RANGE.pack(start, self.bytes_done, shortest))


def fitrim(session: Session, request: Request) -> wire.Pieces | DiscardPlan:
    """FITRIM: tell the device what is free, a group at a time.

    ``Refused``: EPERM, EROFS, EINVAL for a range that begins beyond the end or is shorter than a block, or extents
    longer than a group; EOPNOTSUPP where the device does not want to know.
    """
    _check_root(session, request)
    payload = bytes(request.payload or b"")
    if len(payload) != numbers.FSTRIM_RANGE.size:
        raise Refused(errno.EINVAL)
    start, length, shortest = numbers.FSTRIM_RANGE.unpack(payload)
    geometry = session.fs.geometry
    first, least = geometry.block_of(start), geometry.blocks_for(shortest)
    if first >= geometry.blocks or length < geometry.block_bytes or least > geometry.blocks_per_group:
        raise Refused(errno.EINVAL)
    first = max(first, geometry.first_data_block)
    end = min(geometry.block_of(start + length), geometry.blocks)
    number = (first - geometry.first_data_block) // geometry.blocks_per_group
    return _next(Trim(session, request.unique, payload, first, end, least, number))


def _next(of: Trim) -> wire.Pieces | DiscardPlan:
    geometry = of.session.fs.geometry
    if of.number >= geometry.groups or geometry.first_block_of(of.number) >= of.end:
        return of.reply()
    with Transaction(of.session.fs) as tx:
        runs = trim.free_runs(tx, of.number, of.first, of.end, of.shortest)
    ranges = [(geometry.byte_of(block), geometry.byte_of(count)) for block, count in runs]
    done = of.bytes_done + sum(length for _, length in ranges)
    return DiscardPlan(ranges, lambda: _next(of._replace(number=of.number + 1, bytes_done=done)))


def shut_down(session: Session, request: Request) -> Shutdown:
    """EXT4_IOC_SHUTDOWN: no access succeeds any more until the file system is mounted anew.

    Its number says that the kernel fills in the argument, so it is not sent; it is read in the caller's memory.
    ``Refused``: EPERM, EROFS, EFAULT, EINVAL for an unknown mode.
    """
    _check_root(session, request)
    argument = numbers.argument_of(request.pid, request.body[3], _U32.size)
    if argument is None:
        raise Refused(errno.EFAULT)
    mode = _U32.unpack(argument)[0]
    if mode not in (SHUTDOWN_DEFAULT, SHUTDOWN_FLUSH_LOG, SHUTDOWN_AT_ONCE):
        raise Refused(errno.EINVAL)
    return Shutdown(mode == SHUTDOWN_AT_ONCE, wire.reply_ioctl(request.unique, 0, argument))


def _check_root(session: Session, request: Request) -> None:
    if request.uid != ROOT_USER:
        raise Refused(errno.EPERM)
    if session.read_only or session.mounted.read_only:
        raise Refused(errno.EROFS)
