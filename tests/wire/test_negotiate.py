"""INIT: what is agreed with kernels from 7.34 to 7.46, with iomap kernels, and with those that are refused."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewire import uapi, wire
from tests.wire.messages import message

LOW = 0x73FFFFFB
"""Flags that 5.15 and later offer, INIT_EXT (since 5.17) among them: measured on 6.18, without virtio-fs's."""

HIGHEST_BIT = {34: 29, 35: 29, 36: 33, 37: 33, 38: 35, 39: 36, 40: 39, 41: 40, 42: 41, 43: 42, 44: 42, 45: 42, 46: 43}
"""Minor → the last flag that its kernel knows."""

EVERYTHING = (1 << 64) - 1


def offered_by(minor: int) -> int:
    """What a kernel of that protocol offers at most."""
    every = (1 << (HIGHEST_BIT[min(minor, 46)] + 1)) - 1
    return every & (EVERYTHING << 32 | LOW)


def init(minor: int, offered: int, major: int = 7, readahead: int = 131072) -> wire.Request:
    """The decoded INIT of such a kernel; before 7.36 it has 16 bytes."""
    body = struct.pack("=IIIIII40x", major, minor, readahead, offered & 0xFFFFFFFF, offered >> 32, 0)
    raw = message(uapi.FUSE_INIT, body[:16] if minor < 36 else body, unique=2)
    return wire.decode(memoryview(raw), len(raw))


def agree(minor: int, wants: wire.Wants, offered: int | None = None) -> tuple[wire.Negotiated, dict[str, int]]:
    """The agreement, and the fields of the reply, whose framing is checked here."""
    agreed, reply = wire.negotiate(init(minor, offered_by(minor) if offered is None else offered), wants)
    assert struct.unpack_from("=IiQ", reply) == (len(reply), 0, 2)
    assert len(reply) == 16 + 64
    return agreed, {name: int(value) for name, value in uapi.init_out.decode(reply[16:]).items()}


def flags_of(reply: dict[str, int]) -> int:
    return reply["flags"] | reply["flags2"] << 32


@pytest.mark.parametrize("minor", [*range(34, 47), 47, 60, 99])
@pytest.mark.parametrize("wanted", [EVERYTHING, 0, uapi.FUSE_MAX_PAGES | uapi.FUSE_HAS_RESEND])
def test_every_minor_gets_what_it_knows(minor: int, wanted: int) -> None:
    wants = wire.Wants(flags=wanted, default_permissions=True, request_timeout=60, max_stack_depth=1)
    agreed, reply = agree(minor, wants)
    granted = flags_of(reply)
    assert reply["major"] == 7
    assert reply["minor"] == agreed.minor == min(minor, 46)
    assert granted == agreed.flags
    assert granted & ~offered_by(minor) == 0, "N1"
    assert granted & (1 << 43) == 0, "N2"
    assert bool(granted >> 32) == bool(granted & uapi.FUSE_INIT_EXT), "N3"
    assert not granted & (uapi.FUSE_NO_OPEN_SUPPORT | uapi.FUSE_NO_OPENDIR_SUPPORT | uapi.FUSE_INIT_RESERVED)
    assert not agreed.iomap
    if wanted == EVERYTHING and minor >= 41:
        assert granted & uapi.FUSE_ALLOW_IDMAP
    assert agreed.offers(uapi.FUSE_HAS_RESEND) == (minor >= 40)


@given(st.integers(0, EVERYTHING), st.integers(0, EVERYTHING), st.integers(34, 120))
def test_no_flag_that_was_not_offered(offered: int, wanted: int, minor: int) -> None:
    for permissions, iomap in ((False, False), (True, True)):
        wants = wire.Wants(flags=wanted, default_permissions=permissions, iomap=iomap, request_timeout=1)
        agreed, reply = agree(minor, wants, offered)
        seen = offered if minor >= 36 else offered & 0xFFFFFFFF
        if not offered & uapi.FUSE_INIT_EXT:
            seen &= 0xFFFFFFFF
        assert flags_of(reply) & ~seen == 0
        assert flags_of(reply) & (1 << 43) == 0 or (minor == 99 and iomap)
        assert agreed.offered == seen


def test_iomap_needs_all_three_signs() -> None:
    wants = wire.Wants(flags=0, iomap=True)
    offered = LOW | 1 << 43
    agreed, reply = agree(99, wants, offered)
    assert agreed.iomap
    assert (reply["minor"], flags_of(reply)) == (99, 1 << 43 | uapi.FUSE_INIT_EXT)
    for minor, want, offer in (
        (46, wants, offered),  # there bit 43 asks for buffer pools
        (98, wants, offered),
        (100, wants, offered),
        (99, wire.Wants(flags=1 << 43), offered),  # the device was not asked
        (99, wants, LOW),
        (99, wants, offered & ~uapi.FUSE_INIT_EXT),
    ):
        agreed, reply = agree(minor, want, offer)
        assert not agreed.iomap
        assert reply["minor"] == 46
        assert flags_of(reply) == 0


RULES = {
    "EXPLICIT_INVAL_DATA beats AUTO": (
        uapi.FUSE_EXPLICIT_INVAL_DATA | uapi.FUSE_AUTO_INVAL_DATA, {}, uapi.FUSE_EXPLICIT_INVAL_DATA),
    "KILLPRIV_V2 beats the first": (
        uapi.FUSE_HANDLE_KILLPRIV | uapi.FUSE_HANDLE_KILLPRIV_V2, {}, uapi.FUSE_HANDLE_KILLPRIV_V2),
    "NO_EXPORT beats EXPORT": (
        uapi.FUSE_NO_EXPORT_SUPPORT | uapi.FUSE_EXPORT_SUPPORT, {},
        uapi.FUSE_NO_EXPORT_SUPPORT | uapi.FUSE_INIT_EXT),
    "writeback cache excludes passthrough": (
        uapi.FUSE_PASSTHROUGH | uapi.FUSE_WRITEBACK_CACHE, {"max_stack_depth": 1}, uapi.FUSE_WRITEBACK_CACHE),
    "passthrough with a depth": (
        uapi.FUSE_PASSTHROUGH, {"max_stack_depth": 1}, uapi.FUSE_PASSTHROUGH | uapi.FUSE_INIT_EXT),
    "passthrough without a depth": (uapi.FUSE_PASSTHROUGH, {}, 0),
    "auto without readdirplus": (uapi.FUSE_READDIRPLUS_AUTO, {}, 0),
    "auto with readdirplus": (
        uapi.FUSE_READDIRPLUS_AUTO | uapi.FUSE_DO_READDIRPLUS, {},
        uapi.FUSE_READDIRPLUS_AUTO | uapi.FUSE_DO_READDIRPLUS),
    "idmap without the kernel's checks": (uapi.FUSE_ALLOW_IDMAP, {}, 0),
    "idmap with default_permissions": (
        uapi.FUSE_ALLOW_IDMAP, {"default_permissions": True}, uapi.FUSE_ALLOW_IDMAP | uapi.FUSE_INIT_EXT),
    "idmap with ACLs": (
        uapi.FUSE_ALLOW_IDMAP | uapi.FUSE_POSIX_ACL, {},
        uapi.FUSE_ALLOW_IDMAP | uapi.FUSE_POSIX_ACL | uapi.FUSE_INIT_EXT),
    "timeout without seconds": (uapi.FUSE_REQUEST_TIMEOUT, {}, 0),
    "timeout with seconds": (
        uapi.FUSE_REQUEST_TIMEOUT, {"request_timeout": 90}, uapi.FUSE_REQUEST_TIMEOUT | uapi.FUSE_INIT_EXT),
    "truncation with OPEN": (uapi.FUSE_ATOMIC_O_TRUNC, {}, uapi.FUSE_ATOMIC_O_TRUNC),
    "what the kernel can is not switched on": (
        uapi.FUSE_NO_OPEN_SUPPORT | uapi.FUSE_HAS_RESEND | uapi.FUSE_HAS_EXPIRE_ONLY | uapi.FUSE_INIT_EXT, {}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_flags_that_depend_on_each_other(name: str) -> None:
    wanted, more, granted = RULES[name]
    _, reply = agree(46, dataclasses.replace(wire.Wants(flags=wanted), **more))  # type: ignore[arg-type]
    assert flags_of(reply) == granted


def test_fallback_where_the_better_flag_is_missing() -> None:
    wanted = uapi.FUSE_EXPLICIT_INVAL_DATA | uapi.FUSE_AUTO_INVAL_DATA
    _, reply = agree(46, wire.Wants(flags=wanted), LOW & ~uapi.FUSE_EXPLICIT_INVAL_DATA)
    assert flags_of(reply) == uapi.FUSE_AUTO_INVAL_DATA


def test_zero_message_open_excludes_atomic_truncation() -> None:
    with pytest.raises(ValueError, match="loses truncations"):
        wire.Wants(flags=uapi.FUSE_ATOMIC_O_TRUNC, no_open=True)


@pytest.mark.parametrize(
    ("wants", "offers", "agreed"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_zero_message_open_needs_the_kernel(wants: bool, offers: bool, agreed: bool) -> None:
    offered = LOW if offers else LOW & ~uapi.FUSE_NO_OPEN_SUPPORT
    assert agree(46, wire.Wants(flags=0, no_open=wants), offered)[0].no_open is agreed


def test_numbers_go_where_they_belong() -> None:
    flags = uapi.FUSE_MAX_PAGES | uapi.FUSE_BIG_WRITES | uapi.FUSE_REQUEST_TIMEOUT | uapi.FUSE_PASSTHROUGH
    wants = wire.Wants(
        flags=flags, max_write=0x54000, max_pages=0x99, max_readahead=0x1234, max_background=0x51,
        congestion_threshold=0x32, time_gran=100, request_timeout=0x77, max_stack_depth=2,
    )  # fmt: skip
    agreed, reply = wire.negotiate(init(46, offered_by(46)), wants)
    low, high = (flags | uapi.FUSE_INIT_EXT) & 0xFFFFFFFF, flags >> 32
    assert reply[16:] == struct.pack(
        "=IIIIHHIIHHIIH22x", 7, 46, 0x1234, low, 0x51, 0x32, 0x54000, 100, 0x99, 0, high, 2, 0x77
    )
    assert (agreed.max_write, agreed.max_pages, agreed.buffer_size) == (0x54000, 0x99, 0x54000 + 4096)


def test_limits_follow_the_flags() -> None:
    wants = wire.Wants(flags=uapi.FUSE_BIG_WRITES, max_pages=256, request_timeout=5, max_stack_depth=1)
    agreed, reply = agree(46, wants)
    assert (agreed.max_pages, agreed.max_write) == (32, 32 * 4096), "without MAX_PAGES 128 KiB is all"
    assert (reply["max_pages"], reply["request_timeout"], reply["max_stack_depth"]) == (0, 0, 0)
    small, _ = agree(46, dataclasses.replace(wants, flags=0))
    assert (small.max_write, small.buffer_size) == (4096, 8192)
    assert agree(46, wire.Wants(flags=0, max_readahead=1 << 20))[0].max_readahead == 131072, "the kernel's is less"


@pytest.mark.parametrize("wrong", [
    {"max_write": 4095}, {"max_pages": 0}, {"max_pages": 65536}, {"max_background": 0}, {"max_background": 65536},
    {"max_background": 5, "congestion_threshold": 6}, {"congestion_threshold": 0}, {"time_gran": 0},
    {"time_gran": 10**9 + 1}, {"request_timeout": 65536}, {"max_stack_depth": 3}, {"max_readahead": -1},
])  # fmt: skip
def test_wants_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="not in"):
        wire.Wants(flags=0, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("major", "minor"), [(7, 33), (7, 0), (6, 99), (0, 0)])
def test_old_kernels_are_refused(major: int, minor: int) -> None:
    with pytest.raises(wire.Refused, match=rf"speaks FUSE {major}\.{minor}, at least 7\.34 \(Linux 5\.15\)") as caught:
        wire.negotiate(init(minor, LOW, major), wire.Wants(flags=EVERYTHING & ~uapi.FUSE_ATOMIC_O_TRUNC))
    assert caught.value.reply == struct.pack("=IiQ", 16, -71, 2)
    assert caught.value.unique == 2


def test_another_major_is_told_ours() -> None:
    with pytest.raises(wire.Refused, match=r"speaks FUSE 8\.1, this is 7\.46") as caught:
        wire.negotiate(init_of_major_8(), wire.Wants(flags=0))
    assert caught.value.reply[:24] == struct.pack("=IiQII", 80, 0, 2, 7, 46)
    assert caught.value.reply[24:] == bytes(56)


def init_of_major_8() -> wire.Request:
    """8.1 with the body of today."""
    raw = message(uapi.FUSE_INIT, struct.pack("=II56x", 8, 1), unique=2)
    return wire.decode(memoryview(raw), len(raw))
