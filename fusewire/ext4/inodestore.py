"""Changing inodes: setting fields of one, starting a new one, and encoding it.

A changed inode is encoded whole, but bytes that we do not understand survive.
"""

import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from . import checksum, group, inode, layout, superstore
from .errors import Check, Corrupt
from .features import Feature
from .inode import BASE_BYTES, FLAG_HUGE_FILE, Inode, Time
from .units import InodeNumber

if TYPE_CHECKING:
    from .transaction import Transaction

_U16, _U32 = struct.Struct("<H"), struct.Struct("<I")
# Runs of neighbouring fields of layout.INODE; between them stand dtime, faddr and the checksum.
_FIRST = struct.Struct("<HHIIII")           # mode … mtime
_MIDDLE = struct.Struct("<HHIII60sII")      # gid_lo … file_acl_lo
_HIGH = struct.Struct("<HHHH")              # blocks_hi … gid_hi
_EXTRA = struct.Struct("<IIIIIII")          # ctime_extra … projid of layout.INODE_EXTRA
_AT, _EXTRA_OFFSETS = layout.INODE.offsets, layout.INODE_EXTRA.offsets
_MIDDLE_AT, _SIZE_HI_AT, _HIGH_AT, _DTIME_AT = _AT["gid_lo"], _AT["size_hi"], _AT["blocks_hi"], _AT["dtime"]
_EXTRA_AT = BASE_BYTES + _EXTRA_OFFSETS["ctime_extra"]
_PROJECT_AT = BASE_BYTES + _EXTRA_OFFSETS["projid"]
_LOW, _LOW16 = 0xFFFFFFFF, 0xFFFF
_VERSIONS = (1 << 64) - 1
_MAPPING_FLAGS = inode.FLAG_EXTENTS | inode.FLAG_INLINE_DATA
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
    """Set the fields, encode the inode into its record, and put the record and the view of it in place."""
    for name, value in fields.items():
        setter = _SETTERS.get(name)
        if setter is None:
            setattr(new, name, value)
        else:
            setter(tx, new, raw, value)
    _encode(tx, new, raw)
    new.raw = bytes(raw)
    number, size = new.number, len(raw)
    block, offset = place(tx, number)
    entry = tx.edit_keeping(block)
    entry.data[offset:offset + size] = raw
    entry.views[number] = new
    if number not in entry.seals:
        entry.seals[number] = partial(_seal, tx.superblock.seed, number, offset, size) if tx.has_checksums else _nothing
    return new


def _seal(seed: int, number: int, offset: int, size: int, data: bytearray, _read: object) -> None:
    record = data[offset:offset + size]
    checksum.seal_inode(record, number, seed)
    data[offset:offset + size] = record


def _encode(tx: "Transaction", new: Inode, raw: bytearray) -> None:
    """Put all fields that we know into the record, as far as it and the file system's features have them."""
    size, sectors, acl = new.size, new.sectors, new.file_acl
    atime, ctime, mtime = new.atime, new.ctime, new.mtime
    if new.flags & FLAG_HUGE_FILE:
        sectors >>= tx.geometry.block_bits - 9
    _FIRST.pack_into(raw, 0, new.mode, new.uid & _LOW16, size & _LOW, atime[0] & _LOW, ctime[0] & _LOW,
                     mtime[0] & _LOW)
    _MIDDLE.pack_into(raw, _MIDDLE_AT, new.gid & _LOW16, new.links, sectors & _LOW, new.flags, new.version & _LOW,
                      new.block, new.generation, acl & _LOW)
    if new.is_regular or tx.has_large_dir:
        _U32.pack_into(raw, _SIZE_HI_AT, size >> 32)
    blocks_hi, acl_hi = sectors >> 32, acl >> 32
    if not (tx.has_huge_file and tx.is_64bit):
        old_blocks_hi, old_acl_hi, _, _ = _HIGH.unpack_from(raw, _HIGH_AT)
        blocks_hi, acl_hi = (blocks_hi if tx.has_huge_file else old_blocks_hi, acl_hi if tx.is_64bit else old_acl_hi)
    _HIGH.pack_into(raw, _HIGH_AT, blocks_hi, acl_hi, new.uid >> 16, new.gid >> 16)
    if new.extra_isize:
        _encode_extra(tx, new, raw)


def _encode_extra(tx: "Transaction", new: Inode, raw: bytearray) -> None:
    """The fields behind the first 128 bytes, each only if ``extra_isize`` reaches over it."""
    crtime = new.crtime or inode.NEVER
    project = new.project
    if not tx.has_project and len(raw) >= _PROJECT_AT + _U32.size:
        project = _U32.unpack_from(raw, _PROJECT_AT)[0]
    packed = _EXTRA.pack(_extra(new.ctime), _extra(new.mtime), _extra(new.atime), crtime[0] & _LOW, _extra(crtime),
                         new.version >> 32, project)
    end = min(_EXTRA_AT + _EXTRA.size, BASE_BYTES + new.extra_isize)
    raw[_EXTRA_AT:end] = packed[:end - _EXTRA_AT]


def _extra(time: Time) -> int:
    """Nanoseconds and the two bits that go before 32 bits of seconds; "Inode Timestamps"."""
    return time[1] << 2 | (time[0] - FIRST_SECOND) >> 32


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


def _has(new: Inode, name: str) -> bool:
    return _EXTRA_OFFSETS[name] + _U32.size <= new.extra_isize


def has_project(of: Inode) -> bool:
    """Whether an inode reaches far enough to hold a project id."""
    return _has(of, "projid")


# ---- fields that are more than a value to be kept ------------------------------------------------------------------

def _mode(_tx: "Transaction", new: Inode, _raw: bytearray, value: int) -> None:
    new.mode, new.kind = value, value & 0o170000


def _size(tx: "Transaction", new: Inode, _raw: bytearray, value: int) -> None:
    new.size = value
    if value > MAX_SIZE_WITHOUT_LARGE and Feature.LARGE_FILE not in tx.superblock.features:
        have = superstore.get(tx, "feature_ro_compat")
        if not have & Feature.LARGE_FILE.mask:
            superstore.change(tx, feature_ro_compat=have | Feature.LARGE_FILE.mask)


def _sectors(tx: "Transaction", new: Inode, _raw: bytearray, value: int) -> None:
    """Above 48 bits of sectors the count is kept in blocks instead, which the flag says."""
    if value < 0 or (value > MAX_SECTORS_WITHOUT_HUGE and not tx.has_huge_file):
        raise Corrupt(Check.INODE_SIZE, inode=new.number, sectors=value)
    new.sectors = value
    new.flags = new.flags | FLAG_HUGE_FILE if value >= 1 << 48 else new.flags & ~FLAG_HUGE_FILE


def _flags(_tx: "Transaction", new: Inode, _raw: bytearray, value: int) -> None:
    value = value & ~FLAG_HUGE_FILE | new.flags & FLAG_HUGE_FILE  # which goes with ``sectors`` alone
    if (new.flags ^ value) & _MAPPING_FLAGS:
        new.mapping = None
    new.flags = value


def _block(_tx: "Transaction", new: Inode, _raw: bytearray, value: bytes) -> None:
    new.block, new.mapping = bytes(value), None
    new.rdev = inode.device_of(new.block) if new.kind in inode.DEVICES else (0, 0)


def _time(name: str) -> "Setter":
    needed = _EXTRA_OFFSETS[f"{name}_extra"] + _U32.size

    def store(_tx: "Transaction", new: Inode, _raw: bytearray, value: Time) -> None:
        wide = new.extra_isize >= needed
        last = LAST_SECOND if wide else LAST_OLD_SECOND
        if not wide or not FIRST_SECOND < value[0] < last:     # no nanoseconds are kept, or it is cut off where it ends
            value = (max(min(value[0], last), FIRST_SECOND), 0)
        setattr(new, name, value)

    return store


def _crtime(tx: "Transaction", new: Inode, raw: bytearray, value: Time) -> None:
    if _has(new, "crtime"):
        _set_crtime(tx, new, raw, value)


def _project(tx: "Transaction", new: Inode, raw: bytearray, value: int) -> None:
    if _has(new, "projid"):
        new.project = value if tx.has_project else 0
        _U32.pack_into(raw, _PROJECT_AT, value)


def _version(_tx: "Transaction", new: Inode, _raw: bytearray, value: int) -> None:
    new.version = value & (_VERSIONS if _has(new, "version_hi") else _LOW)


def _dtime(_tx: "Transaction", _new: Inode, raw: bytearray, value: int) -> None:
    _U32.pack_into(raw, _DTIME_AT, value)


def _tail(_tx: "Transaction", new: Inode, raw: bytearray, value: bytes) -> None:
    new.attributes = None
    assert len(value) == len(raw) - BASE_BYTES - new.extra_isize
    raw[BASE_BYTES + new.extra_isize:] = value


Setter = Callable[["Transaction", Inode, bytearray, Any], None]
_set_crtime = _time("crtime")
_SETTERS: dict[str, Setter] = {
    "mode": _mode, "size": _size, "sectors": _sectors, "flags": _flags, "block": _block, "atime": _time("atime"),
    "ctime": _time("ctime"), "mtime": _time("mtime"), "crtime": _crtime, "project": _project, "version": _version,
    "dtime": _dtime, "tail": _tail}
