"""Puts compiled twins in the place of the ext4 core's slowest pure functions, where ``fusewire._accel`` was built.

The core works the same without: each twin has the signature and gives the results of the function that it stands in
for, and leaves to that one whatever is unusual, errors above all.  Measured with CPython 3.11:

    dirhash.dirhash   name of 20 bytes, half MD4     9.5 µs → 0.8 µs     80 bytes: 28 µs → 1.0 µs
    checksum.crc16    group descriptor of 64 bytes   5.2 µs → 0.9 µs
    checksum.inode_ok inode of 256 bytes             6.0 µs → 0.7 µs
    dirblock.decode   4 KiB with 127 names           141 µs → 57 µs
    Attributes        of an inode, checked            15 µs → 1 µs      (which has no place to be put in)

Left out, because they gained nothing where they are used: CRC-32C (the library has it), searching one name in a block
(blocks stay decoded), runs of bits (``bytes.find`` and regular expressions are compiled too).
"""

import zlib
from pathlib import Path
from struct import Struct
from typing import Any

from fusewire.ext4 import checksum, dirblock, dirhash
from fusewire.ext4.dirblock import D_TYPES, SMALLEST, DirBlock, Entry
from fusewire.ext4.features import Feature
from fusewire.ext4.inode import (
    FLAG_CASEFOLD,
    FLAG_EA_INODE,
    FLAG_ENCRYPT,
    FLAG_EXTENTS,
    FLAG_HUGE_FILE,
    FLAG_INLINE_DATA,
    FLAG_VERITY,
)
from fusewire.ext4.units import ROOT_INODE

try:
    from fusewire._accel import ffi as _ffi
    from fusewire._accel import lib as _lib
except ImportError:  # no compiler when fusewire was installed
    _ffi = _lib = None


def _is_current() -> bool:
    """Whether what was built was built from the source that stands beside this file."""
    source = Path(__file__).with_name("accel_build.py")
    return getattr(_lib, "FW_DIGEST", None) == zlib.crc32(source.read_bytes())


AVAILABLE = _lib is not None and _is_current()

_RECORD = Struct("=5I")
_decode_python = dirblock.decode
_inode_ok_python = checksum.inode_ok


def install() -> bool:
    """Whether the compiled twins are in place now; False where there are none."""
    if AVAILABLE:
        dirhash.compute = compute
        checksum.crc16 = crc16
        checksum.inode_ok = inode_ok
        dirblock.decode = decode
    return AVAILABLE


def remove() -> None:
    """Put the pure functions back."""
    dirhash.compute = dirhash.compute_python
    checksum.crc16 = checksum.crc16_python
    checksum.inode_ok = _inode_ok_python
    dirblock.decode = _decode_python


class Attributes:
    """Reads attributes from the inode tables of one file system without making an inode of each.  For one thread.

    Its twin is ``inode.load`` with ``inode.check_in_use``; what that refuses, and what is not a usual file, directory
    or symbolic link, is not read here.
    """

    def __init__(self, fs: Any) -> None:
        superblock, geometry = fs.superblock, fs.geometry
        features = superblock.features
        read_elsewhere = FLAG_ENCRYPT | FLAG_EA_INODE | FLAG_VERITY | FLAG_HUGE_FILE | FLAG_INLINE_DATA
        for flag, feature in ((FLAG_EXTENTS, Feature.EXTENTS), (FLAG_CASEFOLD, Feature.CASEFOLD)):
            read_elsewhere |= 0 if feature in features else flag
        self._how = _ffi.new("fw_inodes *", {
            "inode_bytes": geometry.inode_bytes, "block_bytes": geometry.block_bytes, "seed": superblock.seed,
            "flags": 0xFFFFFFFF & ~read_elsewhere, "checksums": fs.has_checksums, "huge_files": fs.has_huge_file,
            "large_directories": fs.has_large_dir, "largest_directory": geometry.byte_of(geometry.blocks),
            "largest_mapped": fs.largest_file(extents=False), "largest_extents": fs.largest_file(extents=True),
        })
        self._reserved = frozenset(range(superblock.first_inode)) - {ROOT_INODE} | superblock.special_inodes
        self._out = _ffi.new("uint8_t[88]")
        self._buffer = _ffi.buffer(self._out)

    def read(self, block: bytes, offset: int, number: int) -> tuple[int, bytes] | None:
        """(generation, packed attributes) of the inode at an offset of a block; None for what is read elsewhere.

        Packed: ino, size, sectors, atime, mtime, ctime of 8 bytes; their nanoseconds, mode, links, uid, gid, rdev,
        block size and 0 of 4 bytes.
        """
        if number in self._reserved:
            return None
        generation: int = _lib.fw_attributes(block, len(block), offset, number, self._how, self._out)
        return None if generation < 0 else (generation, self._buffer[:])


def compute(name: bytes, version: int, start: dirhash.Four) -> tuple[int, int]:
    """``dirhash.compute_python``."""
    both: int = _lib.fw_dirhash(name, len(name), version, *start)
    return both >> 32, both & 0xFFFFFFFF


def crc16(seed: int, data: checksum.Bytes) -> int:
    """``checksum.crc16_python``."""
    value: int = _lib.fw_crc16(seed, bytes(data), len(data))
    return value


def inode_ok(raw: checksum.Bytes, number: int, seed: int) -> bool:
    """``checksum.inode_ok``."""
    return bool(_lib.fw_inode_ok(bytes(raw), len(raw), number, seed))


def decode(fs: Any, data: bytes, *, encrypted: bool, base: int = 0, **particulars: Any) -> DirBlock:
    """``dirblock.decode``; a block with anything wrong, or with hashes behind its names, goes to that one."""
    if particulars.get("hashed"):
        return _decode_python(fs, data, encrypted=encrypted, base=base, **particulars)
    room = len(data) // SMALLEST + 1
    records = _ffi.new("fw_entry[]", room)
    found = _lib.fw_entries(data, len(data), fs.geometry.inodes, encrypted, records, room)
    if found < 0:
        return _decode_python(fs, data, encrypted=encrypted, base=base, **particulars)
    types = D_TYPES if fs.has_file_types else bytes(256)
    return DirBlock([Entry(base + end, inode, types[kind], data[name:name_end])
                     for end, inode, kind, name, name_end in _RECORD.iter_unpack(_ffi.buffer(records)[:20 * found])])
