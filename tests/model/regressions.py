"""Sequences that once told fusewire from kernel ext4: the shortest that did, by what was wrong."""

from __future__ import annotations

import os

from tests.model.generate import ACCESS, ACLS, DEFAULT, KEEP_SIZE, ZERO_RANGE
from tests.model.side import Operation

KIB = 1024

SEQUENCES: dict[str, tuple[str, list[Operation]]] = {
    "a list set again changes no time": ("4k-attributes", [
        ("mkdir", b"d", 0o755),
        ("setacl", b"d", ACCESS, ACLS[2]),
        ("setacl", b"d", ACCESS, ACLS[2]),
        ("setacl", b"d", DEFAULT, ACLS[1]),
        ("setacl", b"d", DEFAULT, ACLS[1]),
    ]),
    "a value set again changes no time": ("4k-attributes", [
        ("mkdir", b"d", 0o755),
        ("setxattr", b"d", b"user.a", 300, 1, 0),
        ("setxattr", b"d", b"user.a", 300, 1, 0),
        ("setxattr", b"d", b"user.b", 20, 1, 0),
        ("setxattr", b"d", b"user.c", 20, 1, os.XATTR_CREATE),
        ("removexattr", b"d", b"user.c"),
    ]),
    "times before 1970": ("4k-attributes", [
        ("create", b"f", 0o644),
        ("utimens", b"f", -1, -2 * 10**9 - 1),
        ("mkdir", b"d", 0o755),
        ("utimens", b"d", -(2**31) * 10**9, 123),
    ]),
    "inodes of 128 bytes have no fractions of a second": ("inode-128-attributes", [
        ("create", b"f", 0o644),
        ("utimens", b"f", 123456789_987654321, 1_999999999),
        ("stat", b"f"),
    ]),
    "what is refused zeroes nothing": ("ext3-1k-data", [
        ("open", 0, b"f", os.O_RDWR | os.O_CREAT, 0o644),
        ("pwrite", 0, 0, 40 * KIB, 1),
        ("fallocate", 0, ZERO_RANGE, 4 * KIB + 5, 20_000),
        ("fallocate", 0, ZERO_RANGE | KEEP_SIZE, 100, 200),
        ("read_file", b"f"),
    ]),
    "a file that grows keeps what is reserved behind its end": ("4k-data", [
        ("create", b"f", 0o644),
        ("fill_room", b"f", KEEP_SIZE, 1_991_517, 2_000_000),
        ("truncate", b"f", 266_239),
        ("syncfs",),
    ]),
    "a change of owner that changes none": ("4k-attributes", [
        ("create", b"f", 0o6755),
        ("chown", b"f", -1, -1),
        ("mkdir", b"d", 0o2755),
        ("chown", b"d", -1, -1),
    ]),
}
