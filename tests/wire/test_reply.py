"""Values → bytes: golden bytes with distinct values, so that a swapped or shifted field shows."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from fusewire import uapi, wire

U = 0x1122334455667788
U64 = tuple(0x0101010101010101 * n for n in range(1, 20))
U32 = tuple(0x01010101 * n for n in range(1, 20))

ATTR_VALUES = (
    U64[0], U64[1], U64[2], -3, 4, -5, U32[5], U32[6], U32[7], U32[8], U32[9], U32[10], U32[11], U32[12], U32[13],
    U32[14],
)  # fmt: skip
ATTR = wire.pack_attr(*ATTR_VALUES)
ATTR_GOLDEN = struct.pack("=QQQqqqIIIIIIIIII", *ATTR_VALUES)
STATX = bytes(range(256))
ENTRY = wire.pack_entry(1, 2, 3, 4, 5, 6, ATTR)


def golden(layout: str, *values: int | bytes, error: int = 0) -> bytes:
    """A reply whose body has this layout, written from the header's declaration."""
    body = struct.pack("=" + layout, *values)
    return struct.pack("=IiQ", 16 + len(body), error, U) + body


def joined(reply: bytes | wire.Pieces) -> bytes:
    return reply if isinstance(reply, bytes) else b"".join(reply)


def test_attributes_are_packed_in_order() -> None:
    assert ATTR == ATTR_GOLDEN
    assert len(ATTR) == 88


def test_entries_are_packed_in_order() -> None:
    """The kernel has both times in seconds before both in nanoseconds; the function takes them in pairs."""
    packed = wire.pack_entry(U64[0], U64[1], U64[2], U32[3], U64[4], U32[5], ATTR)
    assert packed == struct.pack("=QQQQII", U64[0], U64[1], U64[2], U64[4], U32[3], U32[5]) + ATTR_GOLDEN


REPLIES: dict[str, tuple[Callable[[], bytes | wire.Pieces], bytes]] = {
    "empty": (lambda: wire.reply_empty(U), golden("")),
    "error": (lambda: wire.reply_error(U, 2), golden("", error=-2)),
    "data": (lambda: wire.reply_data(U, b"data"), golden("4s", b"data")),
    "no data": (lambda: wire.reply_data(U, b""), golden("")),
    "entry": (
        lambda: wire.reply_entry(U, U64[0], U64[1], U64[2], U32[3], U64[4], U32[5], ATTR),
        golden("QQQQII88s", U64[0], U64[1], U64[2], U64[4], U32[3], U32[5], ATTR_GOLDEN),
    ),
    "negative": (
        lambda: wire.reply_negative(U, U64[0], U32[1]),
        golden("QQQQII88s", 0, 0, U64[0], 0, U32[1], 0, bytes(88)),
    ),
    "entry at once": (
        lambda: wire.pack_entry_reply(144, 0, U, U64[0], U64[1], U64[2], U64[3], U32[4], U32[5], *ATTR_VALUES),
        golden("QQQQII88s", U64[0], U64[1], U64[2], U64[3], U32[4], U32[5], ATTR_GOLDEN),
    ),
    "attr": (
        lambda: wire.reply_attr(U, U64[0], U32[1], ATTR),
        golden("QII88s", U64[0], U32[1], 0, ATTR_GOLDEN),
    ),
    "attr at once": (
        lambda: wire.pack_attr_reply(120, 0, U, U64[0], U32[1], *ATTR_VALUES),
        golden("QII88s", U64[0], U32[1], 0, ATTR_GOLDEN),
    ),
    "statx": (
        lambda: wire.reply_statx(U, U64[0], U32[1], STATX, U32[2]),
        golden("QIIQQ256s", U64[0], U32[1], U32[2], 0, 0, STATX),
    ),
    "create": (
        lambda: wire.reply_create(U, ENTRY, U64[0], U32[1], 7),
        golden("128sQIi", ENTRY, U64[0], U32[1], 7),
    ),
    "open": (lambda: wire.reply_open(U, U64[0], U32[1], 7), golden("QIi", U64[0], U32[1], 7)),
    "write": (lambda: wire.reply_write(U, U32[0]), golden("II", U32[0], 0)),
    "statfs": (
        lambda: wire.reply_statfs(U, *U64[:5], *U32[5:8]),
        golden("QQQQQIII28x", *U64[:5], *U32[5:8]),
    ),
    "xattr size": (lambda: wire.reply_xattr_size(U, U32[0]), golden("II", U32[0], 0)),
    "lseek": (lambda: wire.reply_lseek(U, U64[0]), golden("Q", U64[0])),
    "block": (lambda: wire.reply_block(U, U64[0]), golden("Q", U64[0])),
    "copied": (lambda: wire.reply_copied(U, U64[0]), golden("Q", U64[0])),
    "ioctl": (lambda: wire.reply_ioctl(U, -5, b"data", U32[0]), golden("iIII4s", -5, U32[0], 0, 0, b"data")),
    "ioctl without data": (lambda: wire.reply_ioctl(U, 9), golden("iIII", 9, 0, 0, 0)),
    "poll": (lambda: wire.reply_poll(U, U32[0]), golden("II", U32[0], 0)),
    "lock": (
        lambda: wire.reply_lock(U, U64[0], U64[1], U32[2], U32[3]),
        golden("QQII", U64[0], U64[1], U32[2], U32[3]),
    ),
}


@pytest.mark.parametrize("name", REPLIES)
def test_replies_have_the_documented_bytes(name: str) -> None:
    make, expected = REPLIES[name]
    assert joined(make()) == expected


@pytest.mark.parametrize(("errno", "sent"), [(1, -1), (511, -511), (512, -5), (0, -5), (-2, -5), (10**6, -5)])
def test_errors_stay_within_what_the_kernel_takes(errno: int, sent: int) -> None:
    assert wire.reply_error(U, errno) == golden("", error=sent)


def test_headers_count_themselves() -> None:
    assert wire.header(U, 100) == struct.pack("=IiQ", 116, 0, U)
    assert wire.header(U, 0, -5) == struct.pack("=IiQ", 16, -5, U)


def test_data_are_not_copied() -> None:
    data = memoryview(bytearray(10))
    assert wire.reply_data(U, data)[1] is data
    assert wire.reply_ioctl(U, 0, data)[1] is data


def test_statx_is_packed_in_order() -> None:
    values = [n + 1 for n in range(len(uapi.statx.fields))]
    assert wire.pack_statx(*values) == struct.pack(
        "=IIQIIIH2xQQQQqI4xqI4xqI4xqI4xIIII112x", *values
    )  # fmt: skip


# ---- directory entries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 255])
def test_dirents_are_aligned(length: int) -> None:
    name = b"n" * length
    padding = bytes(-length % 8)
    plain = wire.dirent(U64[0], U64[1], name, U32[2])
    assert plain == struct.pack("=QQII", U64[0], U64[1], length, U32[2]) + name + padding
    assert len(plain) == wire.dirent_size(length)
    assert len(plain) % 8 == 0
    plus = wire.direntplus(ENTRY, U64[0], U64[1], name, U32[2])
    assert plus == ENTRY + plain
    assert len(plus) == wire.direntplus_size(length)


def test_an_entry_without_node() -> None:
    assert wire.direntplus(wire.NO_ENTRY, 1, 2, b".", 4) == bytes(128) + wire.dirent(1, 2, b".", 4)
