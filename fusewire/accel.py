"""Puts compiled twins in the place of the ext4 core's slowest pure functions, where ``fusewire._accel`` was built.

The core works the same without: each twin has the signature and gives the results of the function that it stands in
for, and leaves to that one whatever is unusual, errors above all.  Measured with CPython 3.11:

    dirhash.dirhash   name of 20 bytes, half MD4     9.5 µs → 0.8 µs     80 bytes: 28 µs → 1.0 µs
    checksum.crc16    group descriptor of 64 bytes   5.2 µs → 0.9 µs
    dirblock.decode   4 KiB with 127 names           141 µs → 57 µs

Left out, because they gained nothing where they are used: CRC-32C (the library has it), searching one name in a block
(blocks stay decoded), runs of bits (``bytes.find`` and regular expressions are compiled too).
"""

from struct import Struct
from typing import Any

from fusewire.ext4 import checksum, dirblock, dirhash
from fusewire.ext4.dirblock import D_TYPES, SMALLEST, DirBlock, Entry

try:
    from fusewire._accel import ffi as _ffi
    from fusewire._accel import lib as _lib
except ImportError:  # no compiler when fusewire was installed
    _ffi = _lib = None

AVAILABLE = _lib is not None

_RECORD = Struct("=5I")
_decode_python = dirblock.decode


def install() -> bool:
    """Whether the compiled twins are in place now; False where there are none."""
    if AVAILABLE:
        dirhash.compute = compute
        checksum.crc16 = crc16
        dirblock.decode = decode
    return AVAILABLE


def remove() -> None:
    """Put the pure functions back."""
    dirhash.compute = dirhash.compute_python
    checksum.crc16 = checksum.crc16_python
    dirblock.decode = _decode_python


def compute(name: bytes, version: int, start: dirhash.Four) -> tuple[int, int]:
    """``dirhash.compute_python``."""
    both: int = _lib.fw_dirhash(name, len(name), version, *start)
    return both >> 32, both & 0xFFFFFFFF


def crc16(seed: int, data: checksum.Bytes) -> int:
    """``checksum.crc16_python``."""
    value: int = _lib.fw_crc16(seed, bytes(data), len(data))
    return value


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
