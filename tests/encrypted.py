"""Encrypted directories, through the ioctls of linux/fscrypt.h; the key goes away with the mount it was added to."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from tests.populate import folder, pattern

FS_IOC_SET_ENCRYPTION_POLICY = 0x800C6613
FS_IOC_ADD_ENCRYPTION_KEY = 0xC0506617
MODE_AES_256_XTS, MODE_AES_256_CTS = 1, 4
MODE_ADIANTUM = 9
PAD_32 = 3
RAW_KEY = bytes(range(64))
V1_DESCRIPTOR = b"fusewire"


def add_key(root: Path, version: int) -> bytes:
    """The identifier (version 2) or descriptor (version 1) under which the mount at ``root`` now knows the key."""
    specifier = struct.pack("<II32s", version, 0, V1_DESCRIPTOR if version == 1 else b"")
    argument = bytearray(specifier + struct.pack("<II32x", len(RAW_KEY), 0) + RAW_KEY)
    fd = os.open(root, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_ADD_ENCRYPTION_KEY, argument)
    finally:
        os.close(fd)
    return bytes(argument[8:24]) if version == 2 else V1_DESCRIPTOR


def set_policy(directory: Path, version: int, key: bytes) -> None:
    """Encrypt what will be made in the empty ``directory``."""
    modes = struct.pack("<BBBB", version - 1 if version == 1 else 2, MODE_AES_256_XTS, MODE_AES_256_CTS, PAD_32)
    policy = modes + (key if version == 1 else struct.pack("<B3x16s", 0, key))
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_SET_ENCRYPTION_POLICY, policy)
    finally:
        os.close(fd)


def write_tree(root: Path, version: int) -> None:
    """Names short and long (the longest are presented as a hash), files, links, and a large directory."""
    key = add_key(root, version)
    here = folder(root, "encrypted")
    set_policy(here, version, key)
    for length in (1, 15, 16, 17, 31, 32, 33, 100, 143, 148, 149, 150, 160, 200, 255):
        (here / ("n" * length)).write_bytes(pattern(f"secret{length}", 5000))
    os.symlink("secret target", here / "symlink")
    os.symlink("long " * 200, here / "long-symlink")
    os.mkfifo(here / "fifo")
    inner = folder(here, "inner")
    for index in range(300):
        (inner / f"secret-{index}").write_bytes(b"")
    deeper = folder(inner, "deeper")
    (deeper / "leaf").write_bytes(b"leaf")
