"""Bytes → Request: every opcode, recorded requests, and whatever else may come down the wire."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fusewire import uapi, wire
from tests.wire.messages import GID, NODE, PID, UID, UNIQUE, made, message, record_of, recorded

SECCTX = struct.pack("=II", 16, 1) + b"security"
GROUPS = struct.pack("=IIII", 16, uapi.FUSE_EXT_GROUPS, 1, 1000)


def decode(raw: bytes, flags: int = uapi.FUSE_SETXATTR_EXT) -> wire.Request:
    """Decoded from a buffer that is larger than the message and has other things behind it."""
    buffer = bytearray(raw + b"\xee" * 500)
    return wire.decode(memoryview(buffer), len(raw), wire.shapes_for(flags))


def test_header_fields_go_where_they_belong() -> None:
    request = decode(message(uapi.FUSE_STATFS))
    assert (request.opcode, request.unique, request.nodeid) == (uapi.FUSE_STATFS, UNIQUE, NODE)
    assert (request.uid, request.gid, request.pid) == (UID, GID, PID)
    assert (request.body, request.names, request.payload, request.resent) == ((), (), None, False)


BODIES = {
    "FUSE_FORGET": ("Q", 0),
    "FUSE_GETATTR": ("I4xQ", 0),
    "FUSE_SETATTR": ("I4xQQQqqqIIII4xII4x", 0),
    "FUSE_MKNOD": ("III4x", 1),
    "FUSE_MKDIR": ("II", 1),
    "FUSE_RENAME": ("Q", 2),
    "FUSE_RENAME2": ("QI4x", 2),
    "FUSE_LINK": ("Q", 1),
    "FUSE_OPEN": ("II", 0),
    "FUSE_CREATE": ("IIII", 1),
    "FUSE_READ": ("QQIIQI4x", 0),
    "FUSE_WRITE": ("QQIIQI4x", 0),
    "FUSE_RELEASE": ("QIIQ", 0),
    "FUSE_FLUSH": ("Q8xQ", 0),
    "FUSE_FSYNC": ("QI4x", 0),
    "FUSE_SETXATTR": ("III4x", 1),
    "FUSE_GETXATTR": ("I4x", 1),
    "FUSE_LISTXATTR": ("I4x", 0),
    "FUSE_INIT": ("IIIII44x", 0),
    "FUSE_GETLK": ("QQQQIII4x", 0),
    "FUSE_ACCESS": ("I4x", 0),
    "FUSE_INTERRUPT": ("Q", 0),
    "FUSE_BMAP": ("QI4x", 0),
    "FUSE_IOCTL": ("QIIQII", 0),
    "FUSE_POLL": ("QQII", 0),
    "FUSE_NOTIFY_REPLY": ("8xQI20x", 0),
    "FUSE_BATCH_FORGET": ("I4x", 0),
    "FUSE_FALLOCATE": ("QQQI4x", 0),
    "FUSE_LSEEK": ("QQI4x", 0),
    "FUSE_COPY_FILE_RANGE": ("QQQQQQQ", 0),
    "FUSE_SETUPMAPPING": ("QQQQQ", 0),
    "FUSE_REMOVEMAPPING": ("I", 0),
    "FUSE_SYNCFS": ("8x", 0),
    "FUSE_TMPFILE": ("IIII", 1),
    "FUSE_STATX": ("I4xQII", 0),
    "FUSE_COPY_FILE_RANGE_64": ("QQQQQQQ", 0),
}
"""Layout of each body as the header has it, written down once more, and the names that follow."""


@pytest.mark.parametrize("name", BODIES)
def test_bodies_are_decoded_field_by_field(name: str) -> None:
    layout, names = BODIES[name]
    raw = bytes((37 * i + 11) & 0xFF for i in range(struct.calcsize("=" + layout)))
    words = tuple(b"a name \xff %d" % i for i in range(names))
    request = decode(message(getattr(uapi, name), raw + b"".join(word + b"\0" for word in words)))
    assert request.body == struct.unpack("=" + layout, raw)
    assert request.names == words


def test_every_opcode_of_the_header_has_a_shape() -> None:
    swapped = {uapi.CUSE_INIT_BSWAP_RESERVED, uapi.FUSE_INIT_BSWAP_RESERVED}
    assert set(wire.SHAPES) == set(uapi.enumerators("fuse_opcode")) - swapped


@pytest.mark.parametrize("raw", made(), ids=lambda raw: f"opcode{raw[4] + 256 * raw[5]}")
def test_every_shape_is_decoded_whole(raw: bytes) -> None:
    request = decode(raw)
    shape = wire.SHAPES[request.opcode]
    assert request.names == tuple(b"name \xff %d" % i for i in range(shape.names))
    assert (request.payload is not None and bytes(request.payload)) == (b"payload\0more" if shape.payload else False)
    if shape.codec:
        assert request.body == shape.codec.unpack(record_of(shape.codec))


@pytest.mark.parametrize("raw", recorded(), ids=lambda raw: f"{raw[4] + 256 * raw[5]}-{raw[8] + 256 * raw[9]}")
def test_recorded_requests_are_decoded(raw: bytes) -> None:
    request = decode(raw)
    assert request.opcode in wire.SHAPES
    assert all(b"\0" not in name and name for name in request.names)


# ---- particular requests ----------------------------------------------------------------------------------------


def test_init_of_a_kernel_before_flags2() -> None:
    request = decode(message(uapi.FUSE_INIT, struct.pack("=IIII", 7, 34, 131072, 0x3FFFFFB)))
    assert request.body == (7, 34, 131072, 0x3FFFFFB, 0)


def test_init_longer_than_known() -> None:
    body = struct.pack("=IIIII", 7, 50, 1, 2, 3) + bytes(44) + b"\xff" * 64
    assert decode(message(uapi.FUSE_INIT, body)).body == (7, 50, 1, 2, 3)


def test_init_without_flags() -> None:
    with pytest.raises(wire.ProtocolError, match="init_in has 12 of at least 16 bytes"):
        decode(message(uapi.FUSE_INIT, bytes(12)))


def test_setxattr_has_two_layouts() -> None:
    value = b"\0value\0"
    new = decode(message(uapi.FUSE_SETXATTR, struct.pack("=IIII", 7, 2, 1, 0) + b"user.x\0" + value))
    old = decode(message(uapi.FUSE_SETXATTR, struct.pack("=II", 7, 2) + b"user.x\0" + value), flags=0)
    assert (new.body, old.body) == ((7, 2, 1), (7, 2, 0))
    for request in (new, old):
        assert request.names == (b"user.x",)
        assert request.payload is not None and bytes(request.payload) == value


@pytest.mark.parametrize("extension", [SECCTX, GROUPS, SECCTX + GROUPS])
def test_extensions_are_left_out(extension: bytes) -> None:
    request = decode(message(uapi.FUSE_CREATE, bytes(16) + b"file\0", extension))
    assert request.names == (b"file",)
    write = decode(message(uapi.FUSE_WRITE, bytes(40) + b"data", extension))
    assert write.payload is not None and bytes(write.payload) == b"data"


def test_security_context_of_kernels_that_do_not_count_it() -> None:
    """Before 7.38 it stood behind the name without a word in the header."""
    request = decode(message(uapi.FUSE_MKDIR, bytes(8) + b"folder\0" + SECCTX))
    assert request.names == (b"folder",)


@pytest.mark.parametrize("body", [b"", bytes(16) + b"file\0"])
def test_extensions_longer_than_the_message(body: bytes) -> None:
    raw = bytearray(message(uapi.FUSE_CREATE if body else uapi.FUSE_STATFS, body))
    raw[36:38] = struct.pack("=H", 0xFFFF)
    with pytest.raises(wire.ProtocolError) as caught:
        decode(bytes(raw))
    assert caught.value.unique == UNIQUE


def test_extension_cannot_eat_the_name() -> None:
    with pytest.raises(wire.ProtocolError, match="0 of 1 names"):
        decode(message(uapi.FUSE_LOOKUP, b"", b"namename\0\0\0\0\0\0\0\0"))


def test_resent_requests_keep_their_bit() -> None:
    request = decode(message(uapi.FUSE_STATFS, unique=8 | wire.RESEND_BIT))
    assert request.resent
    assert request.unique == 8 + (1 << 63)
    assert wire.reply_empty(request.unique)[8:] == (8 + (1 << 63)).to_bytes(8, "little")


def test_interrupts_name_their_victim() -> None:
    request = decode(message(uapi.FUSE_INTERRUPT, struct.pack("=Q", 8 | wire.RESEND_BIT), unique=9))
    assert (request.unique, request.body) == (9, (8 | wire.RESEND_BIT,))


def test_unknown_opcodes_are_requests_too() -> None:
    request = decode(message(4094, b"whatever"))
    assert (request.body, request.names) == ((), ())
    assert request.payload is not None and bytes(request.payload) == b"whatever"


def test_detached_requests_outlive_the_buffer() -> None:
    raw = message(uapi.FUSE_WRITE, bytes(40) + b"data")
    buffer = bytearray(raw)
    request = wire.decode(memoryview(buffer), len(raw))
    kept = request.detach()
    buffer[:] = bytes(len(buffer))
    assert kept.payload is not None and bytes(kept.payload) == b"data"
    assert request.payload is not None and bytes(request.payload) == bytes(4), "a view, as announced"
    fields = ("opcode", "unique", "nodeid", "uid", "gid", "pid", "body", "names")
    assert [getattr(kept, f) for f in fields] == [getattr(request, f) for f in fields]
    lookup = decode(message(uapi.FUSE_LOOKUP, b"x\0"))
    assert lookup.detach() is lookup, "names own their bytes: nothing to copy"


# ---- bad bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("claimed", "length"), [(41, 40), (39, 40), (0, 40), (0xFFFFFFFF, 40), (40, 48)])
def test_length_must_be_what_was_read(claimed: int, length: int) -> None:
    raw = bytearray(message(uapi.FUSE_STATFS) + bytes(length - 40))
    raw[:4] = struct.pack("=I", claimed)
    with pytest.raises(wire.ProtocolError, match=f"message of {length} bytes says {claimed}") as caught:
        decode(bytes(raw))
    assert caught.value.unique == UNIQUE


@pytest.mark.parametrize("length", [-1, 0, 39, 1000])
def test_length_must_fit_the_buffer(length: int) -> None:
    with pytest.raises(wire.ProtocolError, match=f"message of {length} bytes"):
        wire.decode(memoryview(bytes(100)), length)


def test_bodies_and_names_must_be_whole() -> None:
    with pytest.raises(wire.ProtocolError, match="open_in has 7 of 8 bytes") as caught:
        decode(message(uapi.FUSE_OPEN, bytes(7)))
    assert (caught.value.unique, caught.value.opcode) == (UNIQUE, uapi.FUSE_OPEN)
    with pytest.raises(wire.ProtocolError, match="0 of 1 names"):
        decode(message(uapi.FUSE_LOOKUP, b"no end"))
    with pytest.raises(wire.ProtocolError, match="1 of 2 names"):
        decode(message(uapi.FUSE_RENAME, bytes(8) + b"one\0two"))


def check(raw: bytes) -> None:
    """W1: a Request or a ProtocolError."""
    for flags in (0, uapi.FUSE_SETXATTR_EXT):
        try:
            request = decode(raw, flags)
        except wire.ProtocolError:
            continue
        assert isinstance(request, wire.Request)
        assert repr(request)
        assert len(request.payload or b"") + sum(map(len, request.names)) <= len(raw)


def samples() -> list[bytes]:
    """One message for each opcode and length."""
    return list({(raw[4:8], len(raw)): raw for raw in made() + recorded()}.values())


def test_every_truncation() -> None:
    for raw in samples():
        for length in range(len(raw)):
            check(raw[:length])
            check(struct.pack("=I", length) + raw[4:length])


def test_every_bit_flip() -> None:
    for raw in samples():
        damaged = bytearray(raw)
        for bit in range(8 * min(len(raw), 200)):
            damaged[bit // 8] ^= 1 << bit % 8
            check(bytes(damaged))
            damaged[bit // 8] ^= 1 << bit % 8


@given(st.binary(max_size=400), st.sampled_from(sorted(wire.SHAPES)), st.integers(0, 0xFFFF))
@example(b"", uapi.FUSE_LOOKUP, 0)
def test_any_body(body: bytes, opcode: int, extension: int) -> None:
    raw = bytearray(message(opcode, body))
    raw[36:38] = struct.pack("=H", extension if extension < 60 else 0)
    check(bytes(raw))


@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    check(raw)


# ---- cursor -----------------------------------------------------------------------------------------------------


def test_cursor_reads_part_by_part() -> None:
    body = struct.pack("=QQ", 5, 6) + b"name\0" + struct.pack("=QQ", 7, 8) + b"rest"
    cursor = wire.Cursor(memoryview(body))
    assert len(cursor) == len(body)
    assert cursor.record(uapi.forget_one) == (5, 6)
    assert cursor.name() == b"name"
    assert cursor.record(uapi.forget_one) == (7, 8)
    assert bytes(cursor.rest()) == b"rest"
    assert (len(cursor), bytes(cursor.rest())) == (0, b"")


def test_cursor_stops_at_the_end() -> None:
    cursor = wire.Cursor(memoryview(bytes(15)))
    with pytest.raises(wire.ProtocolError, match="forget_one has 15 of 16 bytes"):
        cursor.record(uapi.forget_one)
    assert cursor.name() == b"", "a failed verb takes nothing"
    with pytest.raises(wire.ProtocolError, match="name without NUL"):
        wire.Cursor(memoryview(b"abc")).name()
