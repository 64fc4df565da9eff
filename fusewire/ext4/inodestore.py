"""Changing inodes: patching the fields of one on disk, starting a new one.

Only known fields are patched in place; bytes that we do not understand survive.
"""

import struct
from typing import TYPE_CHECKING, Any

from . import checksum, group, inode, layout, superstore
from .errors import Check, Corrupt
from .features import Feature
from .inode import BASE_BYTES, FLAG_HUGE_FILE, Inode, Time
from .units import InodeNumber

if TYPE_CHECKING:
    from .transaction import Transaction

_U16, _U32 = struct.Struct("<H"), struct.Struct("<I")
_AT = {**layout.INODE.offsets, **{f"x_{name}": BASE_BYTES + at for name, at in layout.INODE_EXTRA.offsets.items()}}
_MAPPING_FLAGS = inode.FLAG_EXTENTS | inode.FLAG_INLINE_DATA
_TIMES = ("atime", "ctime", "mtime", "crtime")
MAX_SECTORS_WITHOUT_HUGE = (1 << 32) - 1
MAX_SIZE_WITHOUT_LARGE = (1 << 31) - 1
WANT_EXTRA_BYTES = 32
FIRST_SECOND, LAST_SECOND, LAST_OLD_SECOND = -(1 << 31), (1 << 34) - (1 << 31) - 1, (1 << 31) - 1


def change(tx: "Transaction", old: Inode, **fields: Any) -> Inode:
    """Store new values of an inode's fields, and return the inode as it is now.

    Fields: mode, uid, gid, size (bytes), links, sectors, flags, generation, block (60 bytes), file_acl, atime, ctime,
    mtime, crtime (seconds, nanoseconds), project, version, dtime (also: next inode of the orphan list), and ``tail``:
    the bytes behind the fields, where attributes are stored.
    """
    block, offset = place(tx, old.number)
    entry = tx.edit_keeping(block)
    current = entry.views.get(old.number)
    assert current is None or current is old or current.raw == old.raw, "an inode was changed since it was looked at"
    new, raw = old.clone(), entry.data[offset:offset + tx.geometry.inode_bytes]
    if not old.extra_isize and len(raw) > BASE_BYTES:
        _start_extra(new, raw)
    return _store(tx, new, raw, fields)


def _start_extra(new: Inode, raw: bytearray) -> None:
    """Say how far the fields reach in an inode that never did: they count all the same, here and in the kernel."""
    new.extra_isize, new.attributes = WANT_EXTRA_BYTES, None
    _U16.pack_into(raw, BASE_BYTES, WANT_EXTRA_BYTES)


def create(tx: "Transaction", number: int, mode: int, **fields: Any) -> Inode:
    """Start a new inode in an unused place: all zero, then ``mode`` and the fields of ``change``; times are now."""
    raw = bytearray(tx.geometry.inode_bytes)
    if len(raw) > BASE_BYTES:
        _U16.pack_into(raw, BASE_BYTES, extra_bytes(tx))
    new = inode.blank(InodeNumber(number), extra_bytes(tx) if len(raw) > BASE_BYTES else 0)
    now = tx.now
    return _store(tx, new, raw, {"mode": mode, "atime": now, "ctime": now, "mtime": now, "crtime": now, **fields})


def _store(tx: "Transaction", new: Inode, raw: bytearray, fields: dict[str, Any]) -> Inode:
    """Patch the fields into a record, and put it and the view of it in place."""
    for name, value in fields.items():
        _STORES[name](tx, new, raw, value)
    new.raw = bytes(raw)
    block, offset = place(tx, new.number)
    entry = tx.edit_keeping(block)
    entry.data[offset:offset + len(raw)] = raw
    entry.views[new.number] = new
    if tx.has_checksums:
        number, seed = new.number, tx.superblock.seed
        size = len(raw)

        def seal(data: bytearray, _read: object) -> None:
            record = data[offset:offset + size]
            checksum.seal_inode(record, number, seed)
            data[offset:offset + size] = record

        entry.seals[number] = seal
    else:
        entry.seals[new.number] = _nothing
    return new


def _nothing(_data: bytearray, _read: object) -> None:
    """Nothing is sealed where there are no checksums."""


def extra_bytes(tx: "Transaction") -> int:
    """How many bytes of fields a new inode has behind its first 128: at least those that we know, more if the
    superblock asks for it and they fit."""
    fields, room = tx.superblock.fields, tx.geometry.inode_bytes - BASE_BYTES
    wanted = WANT_EXTRA_BYTES
    if Feature.EXTRA_ISIZE in tx.superblock.features:
        wanted = max(wanted, fields["want_extra_isize"], fields["min_extra_isize"])
    return wanted if wanted <= room and wanted % 4 == 0 else min(WANT_EXTRA_BYTES, room)


def place(tx: "Transaction", number: int) -> tuple[int, int]:
    """(block, byte offset in it) of an inode's record."""
    in_group, index = tx.geometry.group_of_inode(number)
    table = tx.tables.get(in_group)
    if table is None:
        table = tx.tables[in_group] = group.load(tx, in_group).inode_table
    block, offset = tx.geometry.inode_place(index)
    return table + block, offset


def _u16(raw: bytearray, name: str, value: int) -> None:
    _U16.pack_into(raw, _AT[name], value & 0xFFFF)


def _u32(raw: bytearray, name: str, value: int) -> None:
    _U32.pack_into(raw, _AT[name], value & 0xFFFFFFFF)


def _has(new: Inode, name: str) -> bool:
    return _AT[f"x_{name}"] + 4 <= BASE_BYTES + new.extra_isize


def has_project(of: Inode) -> bool:
    """Whether an inode reaches far enough to hold a project id."""
    return _has(of, "projid")


def _mode(_tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    new.mode, new.kind = value, value & 0o170000
    _u16(raw, "mode", value)


def _uid(_tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    new.uid = value
    _u16(raw, "uid_lo", value)
    _u16(raw, "uid_hi", value >> 16)


def _gid(_tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    new.gid = value
    _u16(raw, "gid_lo", value)
    _u16(raw, "gid_hi", value >> 16)


def _size(tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    new.size = value
    _u32(raw, "size_lo", value)
    if new.is_regular or tx.has_large_dir:
        _u32(raw, "size_hi", value >> 32)
    if value > MAX_SIZE_WITHOUT_LARGE and Feature.LARGE_FILE not in tx.superblock.features:
        have = superstore.get(tx, "feature_ro_compat")
        if not have & Feature.LARGE_FILE.mask:
            superstore.change(tx, feature_ro_compat=have | Feature.LARGE_FILE.mask)


def _links(_tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    new.links = value
    _u16(raw, "links_count", value)


def _sectors(tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    """Above 48 bits of sectors the count is kept in blocks instead, which the flag says."""
    if value < 0 or (value > MAX_SECTORS_WITHOUT_HUGE and not tx.has_huge_file):
        raise Corrupt(Check.INODE_SIZE, inode=new.number, sectors=value)
    new.sectors = value
    huge = value >= 1 << 48
    new.flags = new.flags | FLAG_HUGE_FILE if huge else new.flags & ~FLAG_HUGE_FILE
    _u32(raw, "flags", new.flags)
    count = value >> (tx.geometry.block_bits - 9) if huge else value
    _u32(raw, "blocks_lo", count)
    if tx.has_huge_file:
        _u16(raw, "blocks_hi", count >> 32)


def _flags(_tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    value = value & ~FLAG_HUGE_FILE | new.flags & FLAG_HUGE_FILE  # which goes with ``sectors`` alone
    if (new.flags ^ value) & _MAPPING_FLAGS:
        new.mapping = None
    new.flags = value
    _u32(raw, "flags", value)


def _generation(_tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    new.generation = value
    _u32(raw, "generation", value)


def _block(_tx: "Transaction", new: Inode, raw: bytearray, value: bytes) -> None:
    new.block, new.mapping = bytes(value), None
    raw[_AT["block"]:_AT["block"] + 60] = value
    new.rdev = inode.device_of(new.block) if new.kind in inode.DEVICES else (0, 0)


def _file_acl(tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    new.file_acl = value
    _u32(raw, "file_acl_lo", value)
    if tx.is_64bit:
        _u16(raw, "file_acl_hi", value >> 32)


def _time(name: str) -> Any:
    def store(_tx: "Transaction", new: Inode, raw: bytearray, value: Time) -> None:
        seconds, nanoseconds = value
        wide = _has(new, f"{name}_extra")
        last = LAST_SECOND if wide else LAST_OLD_SECOND
        seconds = max(min(seconds, last), FIRST_SECOND)
        if not wide or seconds in (FIRST_SECOND, last):
            nanoseconds = 0  # none are kept, or the time was cut off as far as it goes
        if wide:
            _u32(raw, f"x_{name}_extra", nanoseconds << 2 | (seconds - FIRST_SECOND) >> 32)
        if name == "crtime":
            if not _has(new, name):
                return
            _u32(raw, "x_crtime", seconds)
        else:
            _u32(raw, name, seconds)
        setattr(new, name, (seconds, nanoseconds))

    return store


def _project(tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    if _has(new, "projid"):
        new.project = value if tx.has_project else 0
        _u32(raw, "x_projid", value)


def _version(_tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    new.version = value if _has(new, "version_hi") else value & 0xFFFFFFFF
    _u32(raw, "version_lo", value)
    if _has(new, "version_hi"):
        _u32(raw, "x_version_hi", value >> 32)


def _dtime(_tx: "Transaction", _new: Inode, raw: bytearray, value: int) -> None:
    _u32(raw, "dtime", value)


def _tail(_tx: "Transaction", new: Inode, raw: bytearray, value: bytes) -> None:
    new.attributes = None
    assert len(value) == len(raw) - BASE_BYTES - new.extra_isize
    raw[BASE_BYTES + new.extra_isize:] = value


_STORES = {"mode": _mode, "uid": _uid, "gid": _gid, "size": _size, "links": _links, "sectors": _sectors,
           "flags": _flags, "generation": _generation, "block": _block, "file_acl": _file_acl,
           **{name: _time(name) for name in _TIMES}, "project": _project, "version": _version, "dtime": _dtime,
           "tail": _tail}
