"""Codecs of the blocks of the log: descriptors with their tags, revocations, commits.

Kernel documentation, ext4, "Journal (jbd2)".  All depend on the features in the journal's superblock, so the functions
take that first.

    feature                      tag bytes   checksums
    none                         8           none
    checksum (version 1)         8           crc32 of descriptors and logged blocks, in the commit block
    csum_v2                      10          crc32c of each block of the log; 16 bits of each logged block's in its tag
    csum_v3                      16          as version 2, but all 32 bits
    64bit                        + 4 (csum_v3: + 0)

The first tag of a descriptor is followed by the journal's UUID (16 bytes), unless it says "same UUID".
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from struct import Struct
from typing import NamedTuple

from . import checksum, journallayout
from .errors import Check, Corrupt
from .journalsuper import MAGIC, UUID_BYTES, Checksums, JournalSuperblock

MAGIC_BYTES = MAGIC.to_bytes(4, "big")
DESCRIPTOR, COMMIT, REVOKE = 1, 2, 5
ESCAPED, SAME_UUID, DELETED, LAST_TAG = 1, 2, 4, 8
CRC32, CRC32_BYTES = 1, 4       # checksum type and size of version 1
_START_OF_V1 = 0xFFFFFFFF


class Header(NamedTuple):
    """What every block of the log but the logged ones begins with."""

    kind: int
    sequence: int


class Tag(NamedTuple):
    """One entry of a descriptor: the home of a logged block, flags, and its checksum as far as the format keeps one."""

    block: int
    flags: int
    checksum: int


# ---- reading -----------------------------------------------------------------------------------------------

def header(raw: bytes) -> Header | None:
    """Kind and sequence of a block of the log; None if it has no header (logged data, or never written)."""
    magic, kind, sequence = journallayout.HEADER.unpack(raw)
    return Header(kind, sequence) if magic == MAGIC else None


def tail_ok(journal: JournalSuperblock, raw: bytes) -> bool:
    """Whether a descriptor or revocation block is as it was written, as far as its format can tell."""
    return journal.usable == journal.block_bytes or checksum.journal_tail_ok(raw, journal.seed)


def tags(journal: JournalSuperblock, raw: bytes) -> Iterator[Tag]:
    """The tags of a descriptor, up to the one marked last or as many as the block has room for."""
    unpack, width, wide = journal.tag_record.unpack, journal.tag_bytes, journal.wide
    read = _read_tag3 if journal.tag_record is journallayout.TAG3 else _read_tag
    at = journallayout.HEADER.size
    while at + width <= journal.usable:
        tag = read(unpack(raw, at), wide)
        yield tag
        if tag.flags & LAST_TAG:
            return
        at += width if tag.flags & SAME_UUID else width + UUID_BYTES


def _read_tag3(fields: tuple[int, ...], wide: bool) -> Tag:
    low, flags, high, value = fields
    return Tag(low | (high << 32 if wide else 0), flags, value)


def _read_tag(fields: tuple[int, ...], wide: bool) -> Tag:
    low, value, flags = fields[:3]
    return Tag(low | (fields[3] << 32 if wide else 0), flags, value)


def data_ok(journal: JournalSuperblock, tag: Tag, sequence: int, data: bytes) -> bool:
    """Whether a logged block, as it stands in the journal, matches its tag."""
    if journal.checksums is Checksums.V3:
        return checksum.journal_data(data, sequence, journal.seed) == tag.checksum
    if journal.checksums is Checksums.V2:
        return checksum.journal_data(data, sequence, journal.seed) & 0xFFFF == tag.checksum
    return True


def revocations(journal: JournalSuperblock, raw: bytes) -> tuple[int, ...]:
    """The blocks that a revocation block names.  Raises ``Corrupt`` (JOURNAL_REVOKE)."""
    *_, used = journallayout.REVOKE.unpack(raw)
    if used > journal.usable:
        raise Corrupt(Check.JOURNAL_REVOKE, count=used)
    records = max(used - journallayout.REVOKE.size, 0) // journal.record_bytes
    return Struct(f">{records}{'Q' if journal.wide else 'I'}").unpack_from(raw, journallayout.REVOKE.size)


class CommitRecord(NamedTuple):
    """What a commit block says: when, and for version 1 the checksum of the transaction."""

    seconds: int
    nanoseconds: int
    checksum_type: int
    checksum_size: int
    checksum: int


def commit_record(raw: bytes) -> CommitRecord:
    """The fields of a commit block."""
    _, _, _, kind, size, _, value, _, seconds, nanoseconds = journallayout.COMMIT.unpack(raw)
    return CommitRecord(seconds, nanoseconds, kind, size, value)


def commit_ok(journal: JournalSuperblock, raw: bytes, running: int) -> bool:
    """Whether a commit block matches; ``running`` is what ``running_sum`` made of its transaction (version 1).

    A commit block of version 1 may also carry no checksum: the feature was switched on after it was written.
    """
    if journal.checksums is Checksums.V1:
        record = commit_record(raw)
        return record[2:] in ((CRC32, CRC32_BYTES, running), (0, 0, 0))
    return journal.checksums is Checksums.NONE or checksum.journal_commit_ok(raw, journal.seed)


def running_sum(journal: JournalSuperblock, blocks: Iterable[bytes], before: int = _START_OF_V1) -> int:
    """The checksum of version 1 after these descriptor and logged blocks, in order; others need none."""
    if journal.checksums is Checksums.V1:
        for block in blocks:
            before = checksum.journal_commit_v1(before, block)
    return before


def unescaped(data: bytes, escaped: bool) -> bytes:
    """A logged block as it belongs to its home: the magic number back in place if it was escaped."""
    return MAGIC_BYTES + data[4:] if escaped else data


# ---- writing -----------------------------------------------------------------------------------------------

def tags_per_descriptor(journal: JournalSuperblock) -> int:
    """How many tags fit into one descriptor; only the first carries the UUID."""
    return (journal.usable - journallayout.HEADER.size - UUID_BYTES) // journal.tag_bytes


def records_per_revocation(journal: JournalSuperblock) -> int:
    """How many block numbers fit into one revocation block."""
    return (journal.usable - journallayout.REVOKE.size) // journal.record_bytes


def escape(data: bytes) -> tuple[bytes, int]:
    """(the block as it may stand in the log, its tag flag): no logged block may look like one of the log's own."""
    return (b"\0\0\0\0" + data[4:], ESCAPED) if data[:4] == MAGIC_BYTES else (data, 0)


def encode_descriptor(journal: JournalSuperblock, sequence: int,
                      entries: Sequence[tuple[int, bytes, int]]) -> bytes:
    """A descriptor for (home block, escaped data, ESCAPED or 0), which follow it in this order."""
    raw = bytearray(journal.block_bytes)
    journallayout.HEADER.struct.pack_into(raw, 0, MAGIC, DESCRIPTOR, sequence)
    pack = _tag_packer(journal, raw, sequence)
    at, last = journallayout.HEADER.size, len(entries) - 1
    for index, (block, data, flags) in enumerate(entries):
        place = (SAME_UUID if index else 0) | (LAST_TAG if index == last else 0)
        pack(at, block, flags | place, data)
        at += journal.tag_bytes
        if not index:
            raw[at:at + UUID_BYTES] = journal.uuid
            at += UUID_BYTES
    _seal_tail(journal, raw)
    return bytes(raw)


def _tag_packer(journal: JournalSuperblock, raw: bytearray,
                sequence: int) -> Callable[[int, int, int, bytes], None]:
    pack_into, seed = journal.tag_record.struct.pack_into, journal.seed
    wide, kind = journal.wide, journal.checksums

    def pack3(at: int, block: int, flags: int, data: bytes) -> None:
        pack_into(raw, at, block & 0xFFFFFFFF, flags, block >> 32, checksum.journal_data(data, sequence, seed))

    def pack(at: int, block: int, flags: int, data: bytes) -> None:
        value = checksum.journal_data(data, sequence, seed) & 0xFFFF if kind is Checksums.V2 else 0
        high = (block >> 32,) if wide else ()
        pack_into(raw, at, block & 0xFFFFFFFF, value, flags, *high)

    return pack3 if kind is Checksums.V3 else pack


def encode_revocations(journal: JournalSuperblock, sequence: int, blocks: Sequence[int]) -> bytes:
    """A revocation block that names these blocks."""
    raw = bytearray(journal.block_bytes)
    used = journallayout.REVOKE.size + len(blocks) * journal.record_bytes
    journallayout.REVOKE.struct.pack_into(raw, 0, MAGIC, REVOKE, sequence, used)
    Struct(f">{len(blocks)}{'Q' if journal.wide else 'I'}").pack_into(raw, journallayout.REVOKE.size, *blocks)
    _seal_tail(journal, raw)
    return bytes(raw)


def _seal_tail(journal: JournalSuperblock, raw: bytearray) -> None:
    if journal.usable != journal.block_bytes:
        checksum.seal_journal_tail(raw, journal.seed)


def encode_commit(journal: JournalSuperblock, sequence: int, time_ns: int, running: int) -> bytes:
    """A commit block; ``time_ns`` since 1970, ``running`` the sum of version 1 over the transaction's blocks."""
    raw = bytearray(journal.block_bytes)
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    first = journal.checksums is Checksums.V1
    journallayout.COMMIT.struct.pack_into(raw, 0, MAGIC, COMMIT, sequence, CRC32 if first else 0,
                                          CRC32_BYTES if first else 0, 0, running if first else 0, b"",
                                          seconds, nanoseconds)
    if journal.usable != journal.block_bytes:
        checksum.seal_journal_commit(raw, journal.seed)
    return bytes(raw)
