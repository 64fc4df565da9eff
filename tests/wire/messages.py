"""Requests as the kernel would send them: recorded ones, and one made by hand for every opcode."""

from __future__ import annotations

import struct
from pathlib import Path

from fusewire import uapi, wire, wirelog

TRANSCRIPTS = Path(__file__).with_name("transcripts")

UNIQUE, NODE, UID, GID, PID = 0x1122334455667788, 0x99AABBCCDDEEFF01, 0x02030405, 0x06070809, 0x0A0B0C0D


def message(opcode: int, body: bytes = b"", extension: bytes = b"", unique: int = UNIQUE) -> bytes:
    """A request with distinct values in every header field."""
    assert len(extension) % 8 == 0
    length = 40 + len(body) + len(extension)
    head = struct.pack("=IIQQIIIHH", length, opcode, unique, NODE, UID, GID, PID, len(extension) // 8, 0)
    return head + body + extension


def record_of(codec: uapi.Codec) -> bytes:
    """A record whose bytes are all different."""
    return bytes((37 * i + 11) & 0xFF for i in range(codec.size))


def made() -> list[bytes]:
    """One request for every opcode that has a shape."""
    found = []
    for opcode, shape in wire.SHAPES.items():
        body = record_of(shape.codec) if shape.codec else b""
        body += b"".join(b"name \xff %d\0" % i for i in range(shape.names))
        found.append(message(opcode, body + (b"payload\0more" if shape.payload else b"")))
    return found


def recorded() -> list[bytes]:
    """The requests of every transcript."""
    paths = sorted(TRANSCRIPTS.glob("*.jsonl"))
    assert paths
    return [wirelog.raw_of(r) for path in paths for r in wirelog.read(path) if r["direction"] == "request"]
