"""Notifications: their bytes as documented. tests/wire/test_kernel.py sends them."""

from __future__ import annotations

import struct

import pytest

from fusewire import wire

A, B, C = 0x1122334455667788, 0x99AABBCCDDEEFF00, 0x0102030405060708


def golden(code: int, layout: str, *values: int | bytes) -> bytes:
    """Unique 0, the code in the place of the error, then this body."""
    body = struct.pack("=" + layout, *values)
    return struct.pack("=IiQ", 16 + len(body), code, 0) + body


NOTIFICATIONS = {
    "poll": (wire.notify_poll(A), golden(1, "Q", A)),
    "inval_inode": (wire.notify_inval_inode(A, -1, -7), golden(2, "Qqq", A, -1, -7)),
    "inval_inode whole": (wire.notify_inval_inode(A), golden(2, "Qqq", A, 0, 0)),
    "inval_entry": (wire.notify_inval_entry(A, b"name"), golden(3, "QII5s", A, 4, 0, b"name\0")),
    "expire": (wire.notify_inval_entry(A, b"name", expire_only=True), golden(3, "QII5s", A, 4, 1, b"name\0")),
    "store": (wire.notify_store(A, C, b"data"), golden(4, "QQII4s", A, C, 4, 0, b"data")),
    "retrieve": (wire.notify_retrieve(A, B, C, 5), golden(5, "QQQII", A, B, C, 5, 0)),
    "delete": (wire.notify_delete(A, B, b"name"), golden(6, "QQII5s", A, B, 4, 0, b"name\0")),
    "resend": (wire.notify_resend(), golden(7, "")),
    "inc_epoch": (wire.notify_inc_epoch(), golden(8, "")),
    "prune": (wire.notify_prune([A, B, C]), golden(9, "IIQQQQ", 3, 0, 0, A, B, C)),
    "prune nothing": (wire.notify_prune([]), golden(9, "IIQ", 0, 0, 0)),
}


@pytest.mark.parametrize("name", NOTIFICATIONS)
def test_notifications_have_the_documented_bytes(name: str) -> None:
    pieces, expected = NOTIFICATIONS[name]
    assert b"".join(pieces) == expected


def test_stored_data_are_not_copied() -> None:
    data = memoryview(bytes(5))
    assert wire.notify_store(1, 2, data)[1] is data


def test_prune_is_bounded() -> None:
    assert len(b"".join(wire.notify_prune(range(wire.PRUNE_MAX)))) == 32 + 8 * wire.PRUNE_MAX
    with pytest.raises(ValueError, match="1025 nodes in one PRUNE"):
        wire.notify_prune(range(wire.PRUNE_MAX + 1))
