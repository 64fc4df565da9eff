"""What the superblock remembers of errors: how many, the first and the last one, and that a check is due.

Kernel documentation, ext4, "The Super Block" (s_error_count and what follows it); the codes are those of
fs/ext4/ext4.h, as dumpe2fs shows them.
"""

import errno
from typing import TYPE_CHECKING, NamedTuple

from . import layout, superstore
from .errors import Corrupt, errno_of
from .superblock import STATE_ERRORS

if TYPE_CHECKING:
    from .transaction import Transaction

MOST_COUNTED = 0xFFFFFFFF
FUNCTION_BYTES = 32
UNKNOWN = 1
CODES = {errno.EIO: 2, errno.ENOMEM: 3, errno.EBADMSG: 4, errno.EUCLEAN: 5, errno.ENOSPC: 6, errno.ENOKEY: 7,
         errno.EROFS: 8, errno.EFBIG: 9, errno.EEXIST: 10, errno.ERANGE: 11, errno.EOVERFLOW: 12, errno.EBUSY: 13,
         errno.ENOTDIR: 14, errno.ENOTEMPTY: 15}
CONTINUE, REMOUNT_READ_ONLY, PANIC = 1, 2, 3        # s_errors
POLICIES = {CONTINUE: "continue", REMOUNT_READ_ONLY: "remount-ro", PANIC: "panic"}
_FIRST = layout.SUPERBLOCK.offsets["error_count"]
_END = layout.SUPERBLOCK.offsets["mount_opts"]
_CODES_AT, _CODES_END = layout.SUPERBLOCK.offsets["first_error_time_hi"], layout.SUPERBLOCK.offsets["encoding"]
_STATE = layout.SUPERBLOCK.offsets["state"]


class Occurrence(NamedTuple):
    """One error: which code found it, about what, and what it is called."""

    function: str
    line: int
    inode: int
    block: int
    code: int


def occurrence(error: Corrupt | OSError) -> Occurrence:
    """An error as the superblock describes it: found in the innermost function that it comes from."""
    function, line, trace = "", 0, error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        function = f"{frame.f_globals.get('__name__', '').rpartition('.')[2]}.{frame.f_code.co_name}"
        line, trace = trace.tb_lineno, trace.tb_next
    where = error.where if isinstance(error, Corrupt) else {}
    number = error.errno if isinstance(error, OSError) else errno_of(error)
    return Occurrence(function, line, _number(where.get("inode"), 32), _number(where.get("block"), 64),
                      CODES.get(number or 0, UNKNOWN))


def _number(value: object, bits: int) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << bits else 0


def record(tx: "Transaction", what: Occurrence) -> None:
    """Note an error in the superblock: from now on the file system is to be checked."""
    count, now = superstore.get(tx, "error_count"), tx.now[0]
    superstore.change(tx, state=superstore.get(tx, "state") | STATE_ERRORS, error_count=min(count + 1, MOST_COUNTED))
    for which in ("last",) if superstore.get(tx, "first_error_time") or count else ("first", "last"):
        fields: dict[str, int | bytes] = {
            f"{which}_error_time": now & 0xFFFFFFFF, f"{which}_error_time_hi": now >> 32 & 0xFF,
            f"{which}_error_ino": what.inode, f"{which}_error_block": what.block,
            f"{which}_error_func": what.function.encode("ascii", "replace")[:FUNCTION_BYTES],
            f"{which}_error_line": what.line, f"{which}_error_errcode": what.code}
        superstore.change(tx, **fields)


def policy(superblock_errors: int, option: str) -> str:
    """What to do about errors: the mount option, else what the superblock says, else go on."""
    return option or POLICIES.get(superblock_errors, POLICIES[CONTINUE])


def carry_over(before: bytes, after: bytes, journal_errno: int) -> bytes:
    """The superblock's record (not sealed) after a replay, with what must not get lost.

    Errors are also noted in its place, past the journal, so a replayed copy may not know of them; and why a journal
    was aborted (``journal_errno``, 0: it was not) counts as an error of the file system.
    """
    raw = bytearray(after)
    errors = bool(journal_errno) or bool(_state(before) & STATE_ERRORS)
    if _count(before) > _count(after):
        raw[_FIRST:_END] = before[_FIRST:_END]
        raw[_CODES_AT:_CODES_END] = before[_CODES_AT:_CODES_END]
    state = _state(after) | (STATE_ERRORS if errors else 0)
    raw[_STATE:_STATE + 2] = state.to_bytes(2, "little")
    return bytes(raw)


def _state(record_: bytes) -> int:
    return int.from_bytes(record_[_STATE:_STATE + 2], "little")


def _count(record_: bytes) -> int:
    return int.from_bytes(record_[_FIRST:_FIRST + 4], "little")
