"""The journal's superblock and the codecs of its log, against bytes laid out by hand from the specification."""

from __future__ import annotations

import random
import struct

import pytest

from fusewire.ext4 import checksum, journalformat
from fusewire.ext4.errors import Check, Corrupt, Unsupported
from fusewire.ext4.journalformat import ESCAPED, LAST_TAG, SAME_UUID, Tag
from fusewire.ext4.journalsuper import Checksums, JournalFeature, JournalSuperblock, is_after
from tests.journals import JOURNAL_UUID, MemoryJournal, with_format

FORMATS = [(kind, wide) for kind in Checksums for wide in (False, True)]
TAG_BYTES = {(Checksums.NONE, False): 8, (Checksums.NONE, True): 12, (Checksums.V1, False): 8, (Checksums.V1, True): 12,
             (Checksums.V2, False): 10, (Checksums.V2, True): 14, (Checksums.V3, False): 16, (Checksums.V3, True): 16}
formats = pytest.mark.parametrize("kind, wide", FORMATS, ids=[f"{kind.value}-{32 << wide}" for kind, wide in FORMATS])


def parse(raw: bytes, block_bytes: int = 1024, blocks: int = 1024) -> JournalSuperblock:
    return JournalSuperblock.parse(raw, block_bytes, blocks)


def patched(offset: int, value: int, width: int = 4, kind: Checksums = Checksums.NONE) -> bytes:
    raw = bytearray(MemoryJournal(kind).blocks[0])
    raw[offset:offset + width] = value.to_bytes(width, "big")
    if kind in (Checksums.V2, Checksums.V3):
        checksum.seal_journal_superblock(raw)
    return bytes(raw)


# ---- superblock --------------------------------------------------------------------------------------------

@formats
def test_a_superblock_gives_the_sizes_of_its_format(kind: Checksums, wide: bool) -> None:
    journal = MemoryJournal(kind, wide, start=9).journal
    assert (journal.checksums, journal.wide, journal.tag_bytes) == (kind, wide, TAG_BYTES[kind, wide])
    assert journal.usable == 1024 - 4 * (kind in (Checksums.V2, Checksums.V3))
    assert (journal.first, journal.last, journal.start, journal.sequence) == (1, 1024, 9, 7)
    assert journal.uuid == JOURNAL_UUID and JournalFeature.REVOKE in journal


@pytest.mark.parametrize("field, raw", [
    ("magic", patched(0, 0xC03B3999)), ("kind", patched(4, 5)), ("kind", patched(4, 2)),
    ("block_bytes", patched(12, 4096)), ("maxlen", patched(16, 1023)), ("maxlen", patched(16, 1025)),
    ("first", patched(20, 0)), ("first", patched(20, 1024)), ("start", patched(28, 1024)),
    ("checksum_type", patched(0x50, 1, 1, Checksums.V3)), ("bytes", bytes(1023)),
])
def test_an_impossible_superblock_is_refused_by_field(field: str, raw: bytes) -> None:
    with pytest.raises(Corrupt) as refused:
        parse(raw)
    assert refused.value.check is Check.JOURNAL_SUPER and field in refused.value.where


@pytest.mark.parametrize("compat, incompat", [(1, 8), (1, 16), (0, 24)])
def test_two_checksum_versions_at_once_are_refused(compat: int, incompat: int) -> None:
    raw = bytearray(MemoryJournal(Checksums.V3).blocks[0])
    struct.pack_into(">II", raw, 0x24, compat, incompat)
    checksum.seal_journal_superblock(raw)
    with pytest.raises(Corrupt) as refused:
        parse(bytes(raw))
    assert refused.value.check is Check.JOURNAL_SUPER and "checksums" in refused.value.where


@pytest.mark.parametrize("kind", [Checksums.V2, Checksums.V3])
def test_a_superblock_that_does_not_match_its_checksum_is_refused(kind: Checksums) -> None:
    raw = bytearray(MemoryJournal(kind).blocks[0])
    for at in (0x18, 0x3F, 0xFC, 0x100, 1023):
        raw[at] ^= 0x10
        with pytest.raises(Corrupt) as refused:
            parse(bytes(raw))
        assert refused.value.check is Check.JOURNAL_SUPER_CHECKSUM
        raw[at] ^= 0x10
    parse(bytes(raw))


UNKNOWN = [(0x28, 6, "FEATURE_I6"), (0x28, 31, "FEATURE_I31"), (0x2C, 0, "FEATURE_R0")]


@pytest.mark.parametrize("offset, bit, name", UNKNOWN)
def test_unknown_features_are_refused_by_name(offset: int, bit: int, name: str) -> None:
    with pytest.raises(Unsupported, match=name):
        parse(patched(offset, 1 << bit))
    parse(patched(0x24, 1 << 7))  # an unknown compatible feature is harmless


def test_the_fast_commit_area_is_cut_off_the_ring() -> None:
    store = MemoryJournal(maxlen=2048, more_incompat=0x20, fc_blocks=100)
    journal = store.journal
    assert (journal.last, journal.fc_first, journal.fc_last) == (1948, 1949, 2048)
    assert MemoryJournal(maxlen=2048, more_incompat=0x20).journal.last == 2048 - 256
    with pytest.raises(Corrupt) as refused:
        parse(MemoryJournal(maxlen=2048, more_incompat=0x20, fc_blocks=1025).blocks[0], blocks=2048)
    assert refused.value.check is Check.JOURNAL_SUPER and refused.value.where["num_fc_blocks"] == 1025
    emptied = journal.emptied(99, 7)
    assert (emptied.last, emptied.start, emptied.sequence, emptied.head) == (2048, 0, 99, 7)


def test_version_1_has_no_features_and_gains_them_for_writing() -> None:
    raw = bytearray(MemoryJournal(Checksums.NONE).blocks[0])
    struct.pack_into(">I", raw, 4, 3)
    raw[0x24:0x100] = b"\xff" * (0x100 - 0x24)  # remains of whatever was there: these fields are not of version 1
    old = parse(bytes(raw))
    assert not old.features and old.checksums is Checksums.NONE and old.uuid == bytes(16)
    new = old.enabled(wide=True, checksums=True)
    assert new.version == 2 and new.checksums is Checksums.V3 and new.wide and JournalFeature.REVOKE in new


def test_enabling_turns_version_2_into_version_3_and_keeps_the_rest() -> None:
    before = MemoryJournal(Checksums.V2, wide=False).journal
    after = before.enabled(wide=False, checksums=True)
    assert after.checksums is Checksums.V3 and not after.wide and after.uuid == before.uuid
    assert MemoryJournal(Checksums.V1).journal.enabled(wide=True, checksums=False).checksums is Checksums.V1


def test_the_error_of_an_abort_is_read_as_the_kernel_stores_it() -> None:
    assert parse(patched(0x20, (1 << 32) - 5)).errno == 5
    assert parse(patched(0x20, 30)).errno == 30
    assert parse(patched(0x20, (1 << 32) - 5)).emptied(1).errno == 5
    assert parse(patched(0x20, (1 << 32) - 5)).emptied(1, forgive=True).errno == 0


def test_transaction_numbers_compare_across_their_end() -> None:
    assert is_after(5, 4) and not is_after(4, 4) and not is_after(3, 4)
    assert is_after(3, 0xFFFFFFFE) and not is_after(0xFFFFFFFE, 3)


# ---- tags --------------------------------------------------------------------------------------------------

def hand_made_descriptor(kind: Checksums, wide: bool, rows: list[tuple[int, int, int]]) -> bytearray:
    """A descriptor of (block, flags, checksum) packed field by field."""
    raw = bytearray(struct.pack(">III", 0xC03B3998, 1, 7))
    for block, flags, value in rows:
        if kind is Checksums.V3:
            raw += struct.pack(">IIII", block & 0xFFFFFFFF, flags, block >> 32, value)
        else:
            raw += struct.pack(">IHH", block & 0xFFFFFFFF, value & 0xFFFF, flags)
            raw += struct.pack(">I", block >> 32) if wide else b""
            raw += b"\0\0" if kind is Checksums.V2 else b""
        raw += b"" if flags & SAME_UUID else JOURNAL_UUID
    return raw + bytes(1024 - len(raw))


@formats
def test_tags_are_read_in_every_format(kind: Checksums, wide: bool) -> None:
    high = 0x0000_0066_0000_0000 if wide else 0
    rows = [(0x11223344 | high, 0, 0xAABBCCDD), (0x55667788 | high, SAME_UUID | ESCAPED, 0x01020304),
            (0x99AABBCC, 0, 0x05060708), (0x10, SAME_UUID | LAST_TAG, 0x090A0B0C), (0x20, SAME_UUID, 0)]
    raw = bytes(hand_made_descriptor(kind, wide, rows))
    mask = 0xFFFFFFFF if kind is Checksums.V3 else 0xFFFF
    expected = [Tag(block, flags, value & mask) for block, flags, value in rows[:4]]
    assert list(journalformat.tags(MemoryJournal(kind, wide).journal, raw)) == expected


@formats
def test_tags_without_a_last_one_end_with_the_block(kind: Checksums, wide: bool) -> None:
    journal = MemoryJournal(kind, wide).journal
    for flags in (0, SAME_UUID):
        raw = struct.pack(">III", 0xC03B3998, 1, 7) + bytes(1012)
        if flags:
            rows = [(1, SAME_UUID, 0)] * ((journal.usable - 12) // journal.tag_bytes)
            raw = bytes(hand_made_descriptor(kind, wide, rows)[:1024])
        found = list(journalformat.tags(journal, raw))
        width = journal.tag_bytes + (0 if flags else 16)
        assert len(found) == -(-(journal.usable - 12 - journal.tag_bytes + 1) // width)


@formats
def test_what_is_encoded_is_what_is_read(kind: Checksums, wide: bool) -> None:
    journal = MemoryJournal(kind, wide).journal
    most = journalformat.tags_per_descriptor(journal)
    chance = random.Random(1)
    entries = [(chance.getrandbits(40 if wide else 32), chance.randbytes(1024), index % 2) for index in range(most)]
    raw = journalformat.encode_descriptor(journal, 77, entries)
    assert journalformat.header(raw) == (journalformat.DESCRIPTOR, 77) and journalformat.tail_ok(journal, raw)
    found = list(journalformat.tags(journal, raw))
    assert [(tag.block, tag.flags & ESCAPED) for tag in found] == [(block, flags) for block, _, flags in entries]
    assert all(journalformat.data_ok(journal, tag, 77, data) for tag, (_, data, _) in zip(found, entries, strict=True))
    assert raw[12 + journal.tag_bytes:][:16] == JOURNAL_UUID and found[-1].flags & LAST_TAG
    sealed = kind in (Checksums.V2, Checksums.V3)
    assert journalformat.tail_ok(journal, b"\xff" + raw[1:]) is not sealed
    assert journalformat.data_ok(journal, found[0], 78, entries[0][1]) is not sealed


@formats
def test_revocations_are_encoded_and_read(kind: Checksums, wide: bool) -> None:
    journal = MemoryJournal(kind, wide).journal
    most = journalformat.records_per_revocation(journal)
    assert most == (journal.usable - 16) // (8 if wide else 4)
    blocks = [(1 << 40) - index if wide else index for index in range(most)]
    raw = journalformat.encode_revocations(journal, 5, blocks)
    assert journalformat.header(raw) == (journalformat.REVOKE, 5) and journalformat.tail_ok(journal, raw)
    assert list(journalformat.revocations(journal, raw)) == blocks
    assert struct.unpack_from(">I", raw, 12) == (16 + most * journal.record_bytes,)


def test_a_revocation_block_that_claims_more_than_it_holds_is_malformed() -> None:
    journal = MemoryJournal(Checksums.V3).journal
    raw = bytearray(journalformat.encode_revocations(journal, 5, [1, 2]))
    for used, count in ((0, 0), (15, 0), (16, 0), (23, 0), (24, 1), (1020, 125)):
        struct.pack_into(">I", raw, 12, used)
        assert len(journalformat.revocations(journal, bytes(raw))) == count
    for used in (1021, 1024, 0xFFFFFFFF):
        struct.pack_into(">I", raw, 12, used)
        with pytest.raises(Corrupt) as refused:
            journalformat.revocations(journal, bytes(raw))
        assert refused.value.check is Check.JOURNAL_REVOKE


# ---- commits -----------------------------------------------------------------------------------------------

@formats
def test_a_commit_block_is_encoded_and_judged(kind: Checksums, wide: bool) -> None:
    journal = MemoryJournal(kind, wide).journal
    running = journalformat.running_sum(journal, [b"a" * 1024, b"b" * 1024])
    raw = journalformat.encode_commit(journal, 9, 1_700_000_000_123_456_789, running)
    record = journalformat.commit_record(raw)
    assert journalformat.header(raw) == (journalformat.COMMIT, 9)
    assert (record.seconds, record.nanoseconds) == (1_700_000_000, 123_456_789)
    assert struct.unpack_from(">QI", raw, 0x30) == (1_700_000_000, 123_456_789)
    assert journalformat.commit_ok(journal, raw, running)
    assert journalformat.commit_ok(journal, raw, running ^ 1) is (kind is not Checksums.V1)
    damaged = raw[:0x38] + b"\1" + raw[0x39:]
    assert journalformat.commit_ok(journal, damaged, running) is (kind in (Checksums.NONE, Checksums.V1))


def test_version_1_accepts_a_commit_block_that_carries_no_checksum() -> None:
    journal = MemoryJournal(Checksums.V1).journal
    bare = struct.pack(">III", 0xC03B3998, 2, 9) + bytes(1012)
    assert journalformat.commit_ok(journal, bare, 0x12345678)
    assert not journalformat.commit_ok(journal, bare[:12] + b"\1\4\0\0" + bare[16:], 0x12345678)


def test_logged_blocks_that_look_like_the_log_are_escaped() -> None:
    data = b"\xc0\x3b\x39\x98" + b"z" * 1020
    stored, flags = journalformat.escape(data)
    assert stored == bytes(4) + b"z" * 1020 and flags == ESCAPED and journalformat.header(stored) is None
    assert journalformat.unescaped(stored, True) == data
    assert journalformat.escape(stored) == (stored, 0) and journalformat.unescaped(stored, False) == stored


def test_formats_of_images_are_what_the_helper_makes() -> None:
    raw = with_format(MemoryJournal().blocks[0], Checksums.V2, False)
    assert parse(raw).checksums is Checksums.V2


# ---- any bytes ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_any_superblock_is_parsed_or_refused_in_a_known_way(seed: int) -> None:
    print(f"seed {seed}")
    chance, outcomes = random.Random(seed), set()
    for _ in range(400):
        raw = bytearray(MemoryJournal(chance.choice(list(Checksums)), chance.random() < 0.5).blocks[0])
        for _ in range(chance.randrange(1, 4)):
            raw[chance.choice((chance.randrange(12, 0x30), 0x50, chance.randrange(1024)))] = chance.getrandbits(8)
        if chance.random() < 0.8:
            checksum.seal_journal_superblock(raw)
        try:
            journal = parse(bytes(raw))
            assert 1 <= journal.first < journal.last <= journal.maxlen <= 1024
            assert journal.last < journal.fc_first or journal.fc_first == journal.fc_last
            outcomes.add("parsed")
        except (Corrupt, Unsupported) as refused:
            outcomes.add(type(refused).__name__)
    assert outcomes == {"parsed", "Corrupt", "Unsupported"}
