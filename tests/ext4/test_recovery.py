"""The rules of recovery, each on a small log in memory that our writer made and the test then damaged."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from fusewire.ext4 import journalformat
from fusewire.ext4.errors import Check, Corrupt
from fusewire.ext4.journal import Encoded, JournalWriter
from fusewire.ext4.journalsuper import Checksums
from fusewire.ext4.recovery import MAX_DAMAGE, Replay
from tests.journals import MemoryJournal

ASYNC = 0x4
SECOND = 1_000_000_000
kinds = pytest.mark.parametrize("kind", Checksums, ids=lambda kind: kind.value)
sealed = pytest.mark.parametrize("kind", [Checksums.V2, Checksums.V3], ids=lambda kind: kind.value)


def filled(number: int) -> bytes:
    return struct.pack(">I", number) * 256


class Log:
    """A journal in memory with what was committed to it."""

    def __init__(self, kind: Checksums = Checksums.V3, more_incompat: int = 0, wide: bool = True) -> None:
        self.store = MemoryJournal(kind, wide, more_incompat=more_incompat)
        self.writer = self.store.writer()
        self.encoded: list[Encoded] = []

    def add(self, logged: dict[int, bytes], revoked: tuple[int, ...] = (), at: int = 100) -> Encoded:
        encoded = self.writer.encode(list(logged.items()), revoked, at * SECOND)
        self.store.commit(encoded)
        self.encoded.append(encoded)
        return encoded

    def damage(self, position: int, at: int = 500) -> None:
        raw = bytearray(self.store.read(position))
        raw[at] ^= 0x40
        self.store.write(position, bytes(raw))

    def recover(self) -> Replay:
        return self.store.recover()


def contents(replay: Replay) -> dict[int, bytes]:
    return dict(replay.blocks())


def three(kind: Checksums, more_incompat: int = 0, times: tuple[int, int, int] = (100, 101, 102)) -> Log:
    """Three transactions of one block each: 10, 20, 30."""
    log = Log(kind, more_incompat)
    for index, at in enumerate(times, 1):
        log.add({10 * index: filled(index)}, at=at)
    return log


def test_an_empty_journal_asks_for_nothing() -> None:
    replay = MemoryJournal(start=0).recover()
    assert not len(replay) and not replay.transactions and not replay.damage
    assert (replay.end_sequence, replay.next_sequence, replay.head) == (7, 8, 1)


@kinds
def test_the_last_copy_of_each_block_is_replayed(kind: Checksums) -> None:
    log = Log(kind)
    log.add({50: filled(1), 60: filled(2)})
    log.add({60: filled(3), 70: b"\xc0\x3b\x39\x98" + bytes(1020)})
    replay = log.recover()
    assert contents(replay) == {50: filled(1), 60: filled(3), 70: b"\xc0\x3b\x39\x98" + bytes(1020)}
    assert [transaction.sequence for transaction in replay.transactions] == [7, 8]
    assert (replay.end_sequence, replay.next_sequence, replay.head) == (9, 10, log.writer.head)
    assert 60 in replay and 61 not in replay and replay.content(61) is None and replay.content(50) == filled(1)
    assert replay.source(70) == (log.encoded[1].records[2][0], True)
    assert replay.journal_after().start == 0 and replay.journal_after().sequence == 10


@kinds
def test_a_revoked_block_stays_away_until_it_is_logged_again(kind: Checksums) -> None:
    log = Log(kind)
    log.add({50: filled(1), 60: filled(2), 80: filled(8)})
    log.add({70: filled(3)}, revoked=(50, 60, 999))
    log.add({60: filled(4)})
    replay = log.recover()
    assert contents(replay) == {60: filled(4), 70: filled(3), 80: filled(8)} and replay.revoked == 1


@kinds
def test_a_revocation_covers_the_transaction_that_it_is_part_of(kind: Checksums) -> None:
    log = Log(kind)
    journal, at = log.store.journal, log.writer.head
    descriptor = journalformat.encode_descriptor(journal, 7, [(50, filled(1), 0), (51, filled(2), 0)])
    running = journalformat.running_sum(journal, (descriptor, filled(1), filled(2)))
    for block in (journalformat.encode_revocations(journal, 7, [50]), descriptor, filled(1), filled(2),
                  journalformat.encode_commit(journal, 7, 100 * SECOND, running)):
        log.store.write(at, block)
        at += 1
    assert contents(log.recover()) == {51: filled(2)}


@kinds
def test_a_transaction_without_its_commit_block_never_happened(kind: Checksums) -> None:
    log = three(kind)
    log.store.write(log.encoded[2].commit[0], bytes(1024))
    replay = log.recover()
    assert sorted(replay.copies) == [10, 20] and not replay.damage and replay.failed_commit is None
    assert replay.end_sequence == 9 and replay.head == log.encoded[2].records[0][0]


@kinds
def test_the_log_ends_at_a_wrong_sequence_number(kind: Checksums) -> None:
    log = three(kind)
    position, raw = log.encoded[1].records[0]
    log.store.write(position, raw[:8] + struct.pack(">I", 6) + raw[12:])
    assert sorted(log.recover().copies) == [10]


@kinds
def test_an_unknown_kind_of_block_ends_the_log(kind: Checksums) -> None:
    log = three(kind)
    position, raw = log.encoded[1].records[0]
    log.store.write(position, raw[:4] + struct.pack(">I", 6) + raw[8:])
    assert sorted(log.recover().copies) == [10]


def assert_failed_commit(replay: Replay) -> None:
    """The second transaction of ``three`` is found wrong."""
    assert sorted(replay.copies) == [10] and replay.failed_commit == 8 and replay.end_sequence == 8
    with pytest.raises(Corrupt) as refused:
        contents(replay)
    assert refused.value.check is Check.JOURNAL_CHECKSUM and refused.value.where["transaction"] == 8


# ---- checksums -----------------------------------------------------------------------------------------

@sealed
@pytest.mark.parametrize("record", ["descriptor", "revocation"])
def test_a_wrong_descriptor_in_a_finished_transaction_forbids_the_replay(kind: Checksums, record: str) -> None:
    log = Log(kind)
    log.add({10: filled(1)})
    log.add({20: filled(2)}, revoked=(10,) if record == "revocation" else ())
    log.add({30: filled(3)})
    log.damage(log.encoded[1].records[0][0])
    replay = log.recover()
    with pytest.raises(Corrupt) as refused:
        contents(replay)
    assert refused.value.check is Check.JOURNAL_CHECKSUM and refused.value.where["transaction"] == 8


@sealed
def test_a_wrong_descriptor_whose_commit_time_went_back_is_from_an_older_round(kind: Checksums) -> None:
    log = three(kind, times=(100, 101, 102))
    journal, sequence = log.store.journal, 10
    stale = journalformat.encode_descriptor(journal, sequence, [(40, filled(4), 0)])
    at = log.writer.head
    for block in (stale[:500] + b"!" + stale[501:], filled(4),
                  journalformat.encode_commit(journal, sequence, 99 * SECOND, 0)):
        log.store.write(at, block)
        at += 1
    replay = log.recover()
    assert sorted(replay.copies) == [10, 20, 30] and not replay.damage and replay.end_sequence == 10


@kinds
def test_a_wrong_commit_block_ends_the_log_and_is_named(kind: Checksums) -> None:
    log = three(kind)
    log.damage(log.encoded[1].commit[0], 0x10)
    replay = log.recover()
    if kind is Checksums.NONE:
        assert sorted(replay.copies) == [10, 20, 30]
        return
    assert_failed_commit(replay)
    assert replay.head == log.encoded[1].records[0][0]


@pytest.mark.parametrize("kind", [Checksums.V1, Checksums.V2, Checksums.V3], ids=lambda kind: kind.value)
def test_a_wrong_commit_block_whose_time_went_back_is_from_an_older_round(kind: Checksums) -> None:
    log = three(kind)
    last = log.encoded[2]
    raw = bytearray(journalformat.encode_commit(log.store.journal, last.sequence, 100 * SECOND, 1))
    raw[0x10] ^= 1
    log.store.write(last.commit[0], bytes(raw))
    replay = log.recover()
    assert sorted(contents(replay)) == [10, 20] and replay.failed_commit is None


def test_version_1_finds_a_wrong_logged_block() -> None:
    log = three(Checksums.V1)
    log.damage(log.encoded[1].records[1][0])
    assert_failed_commit(log.recover())


@sealed
def test_versions_2_and_3_find_a_wrong_logged_block(kind: Checksums) -> None:
    log = three(kind)
    log.damage(log.encoded[1].records[1][0])
    replay = log.recover()
    assert [str(damage) for damage in replay.damage] == [str(Corrupt(Check.JOURNAL_DATA_CHECKSUM, block=20,
                                                                     transaction=8))]
    with pytest.raises(Corrupt):
        list(replay.blocks())


@sealed
def test_a_wrong_copy_that_nobody_needs_does_no_harm(kind: Checksums) -> None:
    log = Log(kind)
    log.add({10: filled(1), 20: filled(2)})
    log.add({10: filled(3)}, revoked=(20,))
    log.damage(log.encoded[0].records[1][0])
    log.damage(log.encoded[0].records[2][0])
    assert contents(log.recover()) == {10: filled(3)}


# ---- async_commit --------------------------------------------------------------------------------------

def test_async_commit_takes_a_wrong_last_transaction_for_one_that_was_cut_off() -> None:
    for kind, record in ((Checksums.V1, 1), (Checksums.V2, 1), (Checksums.V3, 1), (Checksums.V3, -1)):
        log = three(kind, ASYNC)
        last = log.encoded[2]
        log.damage(last.commit[0] if record < 0 else last.records[record][0], 0x10)
        replay = log.recover()
        assert sorted(contents(replay)) == [10, 20] and replay.failed_commit is None, kind
        assert replay.end_sequence == 9 and replay.head == last.records[0][0]


@pytest.mark.parametrize("kind", [Checksums.V1, Checksums.V2, Checksums.V3], ids=lambda kind: kind.value)
def test_async_commit_names_a_wrong_transaction_that_another_follows(kind: Checksums) -> None:
    log = three(kind, ASYNC)
    log.damage(log.encoded[1].commit[0], 0x10)
    assert_failed_commit(log.recover())


# ---- what a log must not do ------------------------------------------------------------------------------

@kinds
@pytest.mark.parametrize("block", [0, 8192, 1 << 31, 4000, 5023])
def test_a_home_outside_the_file_system_or_in_the_journal_is_refused(kind: Checksums, block: int) -> None:
    log = Log(kind)
    log.add({block: filled(1)})
    replay = log.recover()
    with pytest.raises(Corrupt) as refused:
        contents(replay)
    assert refused.value.check is Check.JOURNAL_TARGET and refused.value.where["block"] == block
    log.add({}, revoked=(block,))
    assert contents(log.recover()) == {}


def test_damage_is_listed_up_to_a_limit() -> None:
    log = Log()
    for first in (10_000, 20_000):
        log.add({first + index: filled(index) for index in range(150)})
    assert len(log.recover().damage) == MAX_DAMAGE


def test_a_malformed_revocation_block_forbids_the_replay() -> None:
    log = Log(Checksums.NONE)
    log.add({10: filled(1)}, revoked=(20,))
    position, raw = log.encoded[0].records[0]
    log.store.write(position, raw[:12] + struct.pack(">I", 1025) + raw[16:])
    with pytest.raises(Corrupt) as refused:
        contents(log.recover())
    assert refused.value.check is Check.JOURNAL_REVOKE


@pytest.mark.parametrize("make", [journalformat.encode_revocations, journalformat.encode_descriptor],
                         ids=["revocations", "descriptors"])
def test_a_ring_full_of_one_unfinished_transaction_is_walked_once(make: Callable[..., bytes]) -> None:
    log = Log(Checksums.V3)
    raw = make(log.store.journal, 7, [])
    for position in range(1, 1024):
        log.store.write(position, raw)
    replay = log.recover()
    assert not replay.transactions and not len(replay) and not replay.damage


def test_a_block_that_cannot_be_read_forbids_the_replay() -> None:
    log = three(Checksums.NONE)
    broken = {log.encoded[1].records[1][0]}
    read = log.store.read

    def failing(position: int) -> bytes:
        if position in broken:
            raise OSError(5, "medium error")
        return read(position)

    log.store.read = failing  # type: ignore[method-assign]
    for broken_now in (broken, {1}):
        broken = broken_now
        replay = log.recover()
        with pytest.raises(OSError, match="medium error"):
            contents(replay)


# ---- wrap-around -------------------------------------------------------------------------------------------

@kinds
def test_transactions_wrap_around_the_end_of_the_ring(kind: Checksums) -> None:
    log = Log(kind)
    chance = random.Random(5)
    history: list[tuple[int, int, bytes]] = []
    for turn in range(60):
        logged = {chance.randrange(100, 400): chance.randbytes(1024) for _ in range(chance.randrange(1, 90))}
        if not log.writer.fits(len(logged)):
            kept = log.writer.in_log()[-2]
            move = log.writer.checkpoint(kept - 1)
            assert move is not None and move.sequence == kept
            log.store.write(0, move.superblock)
            log.writer.release(move)
            history = [row for row in history if row[0] >= kept]
        encoded = log.add(logged, at=100 + turn)
        history += [(encoded.sequence, block, data) for block, data in logged.items()]
        assert contents(log.recover()) == {block: data for _, block, data in history}


def test_sequence_numbers_wrap_around() -> None:
    store = MemoryJournal(Checksums.V3)
    store.blocks[0] = store.journal.patched(sequence=0xFFFFFFFE)
    writer = JournalWriter(store.journal, 1, 0xFFFFFFFE)
    store.write(0, writer.begin() or b"")
    for index in range(4):
        store.commit(writer.encode([(10 + index, filled(index))], (), SECOND))
    replay = store.recover()
    assert sorted(replay.copies) == [10, 11, 12, 13] and replay.end_sequence == 2
    assert writer.in_log() == [0xFFFFFFFE, 0xFFFFFFFF, 0, 1]
    move = writer.checkpoint(0xFFFFFFFF)
    assert move is not None and move.sequence == 0
    writer.release(move)
    assert writer.in_log() == [0, 1]


# ---- any bytes ---------------------------------------------------------------------------------------------

@kinds
@pytest.mark.parametrize("seed", range(4))
def test_no_damage_makes_recovery_fail_in_an_unknown_way(kind: Checksums, seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(40):
        log = Log(kind, chance.choice((0, ASYNC)), chance.random() < 0.5)
        for _ in range(chance.randrange(1, 5)):
            logged = {chance.randrange(1, 3000): filled(chance.getrandbits(32)) for _ in range(chance.randrange(12))}
            log.add(logged, revoked=(3500, 3501))
        for _ in range(chance.randrange(1, 6)):
            position = chance.randrange(1, log.writer.head)
            raw = bytearray(log.store.read(position))
            raw[chance.choice((7, 11, 12, 15, 19, chance.randrange(1024)))] = chance.getrandbits(8)
            log.store.write(position, bytes(raw))
        replay = log.recover()
        assert all(isinstance(damage, Corrupt) for damage in replay.damage)
        if not replay.damage:
            assert all(len(data) == 1024 for _, data in replay.blocks())
