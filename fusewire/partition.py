"""Partitions inside a whole disk or its image: GPT and MBR, logical partitions too.  Pure functions over ``read``.

Sources: UEFI Specification 2.10, chapter 5 (GPT, protective MBR); for MBR and extended boot records the layout that PC
systems agree on.  Partition numbers are Linux's: a GPT or primary slot's number whether or not others are empty;
logical ones from 5 on, in the order of their chain.

Every value is checked against the size of the disk, every chain and array is bounded: a hostile table costs 1 MiB and
some hundred reads at most.
"""

import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import Struct, unpack_from

Read = Callable[[int, int], bytes]      # (offset, length) in bytes → at most so many bytes of the disk

_SECTORS = (512, 4096)                  # logical sector sizes of disks
_MBR_BYTES = 512
_MOST_ARRAY_BYTES = 1 << 20             # of GPT entries; usual are 16 KiB
_MOST_LOGICAL = 128                     # in one chain; more than any system makes
_LISTED = 16                            # partitions named in an error


class PartitionError(Exception):
    """No such partition, or no usable table; the text says which partitions there are."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition."""

    number: int
    offset_bytes: int
    size_bytes: int
    kind: str           # what it is for, in words where the type is a usual one
    label: str = ""     # GPT only
    problem: str = ""   # why it cannot be used; "" for a sound one

    def __str__(self) -> str:
        size = _size_text(self.size_bytes)
        label = f' "{self.label}"' if self.label else ""
        return f"{self.number} ({size}, {self.kind}{label}{': ' if self.problem else ''}{self.problem})"


def _size_text(size_bytes: int) -> str:
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.3g} {name}" if size_bytes < 1000 * unit else f"{size_bytes // unit} {name}"
    return f"{size_bytes} bytes"


def _bounded(number: int, offset: int, size: int, disk_bytes: int, kind: str, label: str = "") -> Partition:
    problem = ""
    if size <= 0:
        problem = "its end lies before its start"
    elif offset + size > disk_bytes:
        problem = "reaches beyond the end of the disk"
    return Partition(number, offset, max(size, 0), kind, label, problem)


# --- GPT --------------------------------------------------------------------------------------------------------------

# signature, revision, header size [bytes], header checksum, reserved, own place [sector], other header's, first and
# last usable sector, disk GUID, place of the entries [sector], entries, size of one [bytes], checksum of all
_GPT_HEADER = Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = Struct("<16s16sQQQ72s")    # type, GUID, first and last sector, attributes, name in UTF-16
_GPT_SIGNATURE = b"EFI PART"
_PROTECTIVE = 0xEE

_GPT_KINDS = {
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux data",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root (x86-64)",
    "b921b045-1df0-41c3-af44-4c6f280d3fae": "Linux root (ARM 64)",
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "Linux home",
    "3b8f8425-20e0-4f3b-907f-1a25a76f98e8": "Linux server data",
    "bc13c2ff-59e6-4262-a352-b275fd6f7172": "Linux extended boot",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "LVM",
    "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "ca7d7ccb-63ed-4c53-861c-1742536059cc": "LUKS",
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI system",
    "21686148-6449-6e6f-744e-656564454649": "BIOS boot",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Windows data",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Windows reserved",
}


@dataclass(frozen=True, slots=True)
class _Gpt:
    """A header whose checksums hold, with its entries."""

    sector_bytes: int
    entry_bytes: int
    entries: bytes


def _read_gpt(read: Read, disk_bytes: int, sector_bytes: int, sector: int) -> _Gpt | None:
    """The table whose header is in a sector; None if it is not a whole, unchanged one."""
    raw = read(sector * sector_bytes, sector_bytes)
    if len(raw) < sector_bytes or not raw.startswith(_GPT_SIGNATURE):
        return None
    header = _GPT_HEADER.unpack_from(raw)
    header_bytes, checksum, own = header[2], header[3], header[5]
    place, count, entry_bytes, entries_checksum = header[10:]
    if not _GPT_HEADER.size <= header_bytes <= sector_bytes or own != sector:
        return None
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:header_bytes]) != checksum:
        return None
    array_bytes = count * entry_bytes
    if entry_bytes < _GPT_ENTRY.size or entry_bytes % 8 or array_bytes > _MOST_ARRAY_BYTES:
        return None
    if place * sector_bytes + array_bytes > disk_bytes:
        return None
    entries = read(place * sector_bytes, array_bytes)
    if len(entries) < array_bytes or zlib.crc32(entries) != entries_checksum:
        return None
    return _Gpt(sector_bytes, entry_bytes, entries)


def _find_gpt(read: Read, disk_bytes: int, sector_sizes: tuple[int, ...]) -> _Gpt | None:
    """The primary table, or the backup in the last sector where the primary is damaged, at any sector size."""
    for where in (lambda _size: 1, lambda size: disk_bytes // size - 1):
        for size in sector_sizes:
            if disk_bytes >= 2 * size:
                table = _read_gpt(read, disk_bytes, size, where(size))
                if table is not None:
                    return table
    return None


def _gpt_partitions(table: _Gpt, disk_bytes: int) -> Iterator[Partition]:
    for index in range(len(table.entries) // table.entry_bytes):
        kind, _, first, last, _, name = _GPT_ENTRY.unpack_from(table.entries, index * table.entry_bytes)
        if kind == bytes(16):
            continue
        guid = str(uuid.UUID(bytes_le=kind))
        sector = table.sector_bytes
        size = (last - first + 1) * sector
        yield _bounded(index + 1, first * sector, size, disk_bytes, _GPT_KINDS.get(guid, guid), _label(name))


def _label(name: bytes) -> str:
    """A partition's name, with what could upset a terminal replaced."""
    text = name.decode("utf-16-le", "replace").partition("\0")[0]
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


# --- MBR --------------------------------------------------------------------------------------------------------------

_SLOTS_OFFSET = 446
_SLOT_BYTES = 16
_EXTENDED = frozenset((0x05, 0x0F, 0x85))
_MBR_KINDS = {
    0x06: "FAT16", 0x07: "NTFS or exFAT", 0x0B: "FAT32", 0x0C: "FAT32", 0x0E: "FAT16", 0x82: "Linux swap",
    0x83: "Linux", 0x8E: "LVM", 0xEF: "EFI system", 0xFD: "Linux RAID",
    0x05: "extended", 0x0F: "extended", 0x85: "extended",
}


@dataclass(frozen=True, slots=True)
class _Slot:
    """One of the four entries of a boot record."""

    index: int
    kind: int
    start: int      # sectors from where the record's kind says
    sectors: int


def _boot_record(read: Read, offset_bytes: int) -> list[_Slot] | None:
    """The used entries of a boot record; None if there is none there."""
    raw = read(offset_bytes, _MBR_BYTES)
    if len(raw) < _MBR_BYTES or raw[510:512] != b"\x55\xaa":
        return None
    slots = []
    for index in range(4):
        offset = _SLOTS_OFFSET + index * _SLOT_BYTES
        start, sectors = unpack_from("<II", raw, offset + 8)
        if raw[offset] not in (0x00, 0x80):     # boot code or a FAT boot sector rather than a table
            return None
        if raw[offset + 4] and sectors:
            slots.append(_Slot(index, raw[offset + 4], start, sectors))
    return slots


def _mbr_kind(kind: int) -> str:
    return _MBR_KINDS.get(kind, f"type {kind:#04x}")


def _mbr_partitions(read: Read, slots: list[_Slot], disk_bytes: int, sector: int) -> Iterator[Partition]:
    logical_number = 5
    chains = []
    for slot in slots:
        if slot.kind in _EXTENDED:
            chains.append(slot.start)
            place = (slot.start * sector, slot.sectors * sector)
            yield Partition(slot.index + 1, *place, "extended", problem="holds the logical partitions")
        else:
            yield _bounded(
                slot.index + 1, slot.start * sector, slot.sectors * sector, disk_bytes, _mbr_kind(slot.kind)
            )
    for start in chains:
        for offset, size, kind in _logical(read, start, disk_bytes, sector):
            yield _bounded(logical_number, offset, size, disk_bytes, _mbr_kind(kind))
            logical_number += 1


def _logical(read: Read, extended: int, disk_bytes: int, sector: int) -> Iterator[tuple[int, int, int]]:
    """(offset, size, type) of the logical partitions in a chain that starts at a sector, loops cut."""
    record, seen, found = extended, set[int](), 0
    while record not in seen and len(seen) < _MOST_LOGICAL and record * sector < disk_bytes:
        seen.add(record)
        slots = _boot_record(read, record * sector) or []
        for slot in slots:
            if slot.kind not in _EXTENDED and found < _MOST_LOGICAL:
                found += 1
                yield (record + slot.start) * sector, slot.sectors * sector, slot.kind
        following = [slot.start for slot in slots if slot.kind in _EXTENDED]
        if not following:
            return
        record = extended + following[0]


# --- Both -------------------------------------------------------------------------------------------------------------


def list_partitions(read: Read, disk_bytes: int, sector_bytes: int = 0) -> list[Partition]:
    """The partitions of a disk, by number; unusable ones carry their ``problem``.

    Args:
        sector_bytes: logical sector size where it is known (a block device's); 0 for an image: the GPT tells it, an MBR
            counts sectors of 512 bytes.

    Raises: PartitionError: there is no table, or a GPT of which both copies are damaged.
    """
    slots = _boot_record(read, 0)
    if slots is None:
        raise PartitionError("no partition table (neither GPT nor MBR)")
    if any(slot.kind == _PROTECTIVE for slot in slots):
        table = _find_gpt(read, disk_bytes, (sector_bytes,) if sector_bytes else _SECTORS)
        if table is None:
            raise PartitionError("the GPT is damaged: neither the primary nor the backup table is sound")
        return list(_gpt_partitions(table, disk_bytes))
    return sorted(_mbr_partitions(read, slots, disk_bytes, sector_bytes or 512), key=lambda part: part.number)


def find_partition(read: Read, disk_bytes: int, number: int, sector_bytes: int = 0) -> Partition:
    """The partition of that number.  ``PartitionError`` says which there are, or why this one cannot be used."""
    found = list_partitions(read, disk_bytes, sector_bytes)
    for partition in found:
        if partition.number == number:
            if partition.problem:
                raise PartitionError(f"partition {number} cannot be used: {partition.problem}")
            return partition
    named = ", ".join(map(str, found[:_LISTED])) + (", …" if len(found) > _LISTED else "")
    raise PartitionError(f"no partition {number}; there {'are' if found else 'is'} {named or 'none'}")
