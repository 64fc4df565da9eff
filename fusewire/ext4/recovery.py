"""Recovery: what the journal's log says about blocks that may not have reached their homes yet.

Kernel documentation, ext4, "Journal (jbd2)".  Nothing is written here: ``recover`` looks through the log and answers
with a ``Replay``, whose blocks the caller writes home (a writable mount) or lays over what it reads (a read-only one).

The log is walked from the superblock's ``start``, transaction by transaction, each numbered one more than the last:

1. scan      where does it end?  At the first block that does not continue it; a transaction without its commit block
             never happened.
2. collect   the newest logged copy of every block, by the descriptors of finished transactions.
3. revoke    a block that a later (or the same) transaction revoked was freed and may hold file data by now: its
             logged copy must not come back.
4. verify    the checksums of the copies that are left, and that their homes may be journaled at all.

Remains of older rounds of the ring can look like a continuation.  Their sequence numbers tell them apart, and where
checksums are wrong, their commit times:

    descriptor or revocation block wrong, then a commit block:  time went back: remains, the log ends before it
                                                                else: the log is damaged, nothing is replayed
    commit block wrong (version 1: any block of the transaction):
        time went back                      remains, the log ends before it
        otherwise                           the log is damaged, ``failed_commit`` names the transaction
        otherwise, with async_commit        the transaction was cut off; only if another commit follows, it failed
    async_commit, the last transaction's logged blocks wrong (versions 2 and 3):  it was cut off
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import fastcommit, journalformat
from .errors import Check, Corrupt, Unsupported
from .fastcommit import FastCommits
from .journalfile import JournalFile
from .journalsuper import SEQUENCES, Checksums, JournalFeature, JournalSuperblock
from .units import FsBlock, Geometry

Read = Callable[[int], bytes]   # journal block → its bytes; raises OSError
Damage = Corrupt | Unsupported | OSError

MAX_DAMAGE = 64     # that many are listed; one is enough to forbid the replay

# A logged copy as one integer: (ordinal of its transaction) << 33 | journal block << 1 | escaped.
_ORDINAL_SHIFT = 33
_POSITION_MASK = (1 << _ORDINAL_SHIFT) - 1


class Transaction(NamedTuple):
    """One finished transaction of the log."""

    sequence: int
    start: int              # journal block
    seconds: int            # when it was committed, since 1970
    logged: int             # blocks
    descriptors: tuple[int, ...]
    revocations: tuple[int, ...]


class Replay:
    """What a replay of the log does.  Contents are read when asked for: a log may be as large as memory.

    ``transactions`` are those that are replayed, ``end_sequence`` is the number of the first that is not, ``head`` the
    journal block after the last.  ``revoked`` counts blocks left out because of revocations, ``failed_commit`` names a
    transaction whose commit block is wrong.  ``damage`` holds what forbids the replay; ``require_sound`` raises the
    first of it.
    """

    def __init__(self, journal: JournalSuperblock, read: Read) -> None:
        self.journal, self.read = journal, read
        self.transactions: list[Transaction] = []
        self.end_sequence = journal.sequence
        self.head = journal.start or journal.head or journal.first
        self.revoked = 0
        self.failed_commit: int | None = None
        self.fast_commits: FastCommits | None = None
        self.damage: list[Damage] = []
        self.copies: dict[int, int] = {}

    @property
    def next_sequence(self) -> int:
        """The number for the next transaction: one is left out, so that no remains of the log can continue it."""
        return (self.end_sequence + 1) % SEQUENCES

    def __len__(self) -> int:
        return len(self.copies)

    def __contains__(self, block: int) -> bool:
        return block in self.copies

    def source(self, block: int) -> tuple[int, bool] | None:
        """(journal block that holds the final content of a block, whether it is escaped there), None if none does."""
        copy = self.copies.get(block)
        return None if copy is None else ((copy & _POSITION_MASK) >> 1, bool(copy & 1))

    def content(self, block: int) -> bytes | None:
        """The final content of a block, None if the log does not change it.  Raises OSError from ``read``."""
        source = self.source(block)
        return None if source is None else journalformat.unescaped(self.read(source[0]), source[1])

    def blocks(self) -> Iterator[tuple[FsBlock, bytes]]:
        """(block, final content) in the order of their homes; raises what ``require_sound`` raises before the first."""
        self.require_sound()
        for block in sorted(self.copies):
            position, escaped = (self.copies[block] & _POSITION_MASK) >> 1, bool(self.copies[block] & 1)
            yield FsBlock(block), journalformat.unescaped(self.read(position), escaped)

    def require_sound(self) -> None:
        """Raise the first damage that forbids the replay, if there is any."""
        if self.damage:
            raise self.damage[0]

    def journal_after(self) -> JournalSuperblock:
        """The journal superblock to write once all blocks are home and durable."""
        return self.journal.emptied(self.next_sequence, self.head)


def recover(journal: JournalSuperblock, file: JournalFile, geometry: Geometry, read: Read) -> Replay:
    """What a replay of the log would do; ``read`` gives the journal's blocks.  Damage is in the answer, not raised."""
    replay = Replay(journal, read)
    if not journal.start:
        return replay
    try:
        _scan(replay)
        _collect(replay)
        _revoke(replay)
        _verify(replay, file, geometry)
        if JournalFeature.FAST_COMMIT in journal and not replay.damage:
            replay.fast_commits = fastcommit.scan(journal, replay.end_sequence, geometry, read)
    except (Corrupt, Unsupported, OSError) as damage:
        replay.damage.append(damage)
    return replay


# ---- 1. scan -----------------------------------------------------------------------------------------------

class _Scan:
    """The state of the walk: where it is, what it has seen of the transaction it is in."""

    def __init__(self, journal: JournalSuperblock) -> None:
        self.journal = journal
        self.at = self.begin = journal.start
        self.sequence = journal.sequence
        self.seconds = 0            # of the last commit
        self.end: int | None = None  # number of the first transaction that does not count, once known
        self.walked = 0             # blocks; more than a round is impossible
        self.start_transaction()

    def start_transaction(self) -> None:
        self.begin, self.doubtful, self.logged = self.at, False, 0
        self.descriptors: list[int] = []
        self.revocations: list[int] = []
        self.running = journalformat.running_sum(self.journal, ())

    def advance(self, count: int) -> None:
        self.walked += count
        self.at = self.journal.first + (self.at - self.journal.first + count) % self.journal.ring_blocks


def _scan(replay: Replay) -> None:
    """Fill in ``transactions``, ``end_sequence``, ``head`` and ``failed_commit``."""
    journal, scan = replay.journal, _Scan(replay.journal)
    while scan.walked < journal.ring_blocks:
        position, raw = scan.at, replay.read(scan.at)
        header = journalformat.header(raw)
        if header is None or header.sequence != scan.sequence:
            break
        scan.advance(1)
        if header.kind == journalformat.COMMIT:
            if not _take_commit(replay, scan, raw):
                break
        elif header.kind == journalformat.DESCRIPTOR:
            scan.doubtful |= not journalformat.tail_ok(journal, raw)
            scan.descriptors.append(position)
            _pass_logged(replay, scan, raw)
        elif header.kind == journalformat.REVOKE:
            scan.doubtful |= not journalformat.tail_ok(journal, raw)
            scan.revocations.append(position)
        else:
            break
    if scan.end is None and JournalFeature.ASYNC_COMMIT in journal:
        _drop_cut_off(replay)
    replay.end_sequence = (journal.sequence + len(replay.transactions)) % SEQUENCES


def _pass_logged(replay: Replay, scan: _Scan, raw: bytes) -> None:
    """Step over the blocks that a descriptor logs, summing them up where the commit block holds their sum."""
    count = sum(1 for _ in journalformat.tags(replay.journal, raw))
    scan.logged += count
    if replay.journal.checksums is not Checksums.V1 or scan.end is not None:
        scan.advance(count)
        return
    scan.running = journalformat.running_sum(replay.journal, (raw,), scan.running)
    for _ in range(min(count, replay.journal.ring_blocks - scan.walked)):
        scan.running = journalformat.running_sum(replay.journal, (replay.read(scan.at),), scan.running)
        scan.advance(1)


def _take_commit(replay: Replay, scan: _Scan, raw: bytes) -> bool:
    """Judge the transaction that this commit block ends; whether the scan goes on."""
    journal, seconds = replay.journal, journalformat.commit_record(raw).seconds
    if scan.doubtful:
        if seconds >= scan.seconds:
            raise Corrupt(Check.JOURNAL_CHECKSUM, transaction=scan.sequence)
        return False
    good = journalformat.commit_ok(journal, raw, scan.running)
    if scan.end is not None and (good or journal.checksums is Checksums.V1):
        return _fail(replay, scan.end)
    if not good and scan.end is None:
        if seconds < scan.seconds:
            return False
        scan.end = scan.sequence
        if JournalFeature.ASYNC_COMMIT not in journal:
            return _fail(replay, scan.sequence)
    elif good:
        replay.transactions.append(Transaction(scan.sequence, scan.begin, seconds, scan.logged,
                                               tuple(scan.descriptors), tuple(scan.revocations)))
        replay.head = scan.at
    scan.seconds, scan.sequence = seconds, (scan.sequence + 1) % SEQUENCES
    scan.start_transaction()
    return True


def _fail(replay: Replay, sequence: int) -> bool:
    replay.failed_commit = sequence
    _note(replay, Corrupt(Check.JOURNAL_CHECKSUM, transaction=sequence))
    return False


def _drop_cut_off(replay: Replay) -> None:
    """With async_commit the last commit block may have reached the disk before what it commits."""
    if not replay.transactions:
        return
    last = replay.transactions[-1]
    for _, tag, data in _logged(replay, last):
        if not journalformat.data_ok(replay.journal, tag, last.sequence, data):
            replay.transactions.pop()
            replay.head = last.start
            return


def _logged(replay: Replay, transaction: Transaction) -> Iterator[tuple[int, journalformat.Tag, bytes]]:
    """(journal block, tag, data as it stands there) of all that a transaction logged."""
    for descriptor in transaction.descriptors:
        for position, tag in _tags_at(replay, descriptor):
            yield position, tag, replay.read(position)


def _tags_at(replay: Replay, descriptor: int) -> Iterator[tuple[int, journalformat.Tag]]:
    position, journal = descriptor, replay.journal
    for tag in journalformat.tags(journal, replay.read(descriptor)):
        position = journal.step(position)
        yield position, tag


# ---- 2. to 4. ----------------------------------------------------------------------------------------------

def _collect(replay: Replay) -> None:
    copies = replay.copies
    for ordinal, transaction in enumerate(replay.transactions):
        high = ordinal << _ORDINAL_SHIFT
        for descriptor in transaction.descriptors:
            for position, tag in _tags_at(replay, descriptor):
                copies[tag.block] = high | position << 1 | (tag.flags & journalformat.ESCAPED)


def _revoke(replay: Replay) -> None:
    copies = replay.copies
    for ordinal, transaction in enumerate(replay.transactions):
        for position in transaction.revocations:
            for block in journalformat.revocations(replay.journal, replay.read(position)):
                if block in copies and copies[block] >> _ORDINAL_SHIFT <= ordinal:
                    del copies[block]
                    replay.revoked += 1


def _verify(replay: Replay, file: JournalFile, geometry: Geometry) -> None:
    """Note every copy whose home is impossible, cannot be read, or does not match its checksum."""
    for block in replay.copies:
        if not geometry.first_data_block <= block < geometry.blocks or file.owns(block):
            _note(replay, Corrupt(Check.JOURNAL_TARGET, block=block))
    for ordinal, transaction in enumerate(replay.transactions):
        for descriptor in transaction.descriptors:
            for position, tag in _tags_at(replay, descriptor):
                copy = ordinal << _ORDINAL_SHIFT | position << 1 | (tag.flags & journalformat.ESCAPED)
                if replay.copies.get(tag.block) == copy:
                    _verify_data(replay, transaction, tag, position)


def _verify_data(replay: Replay, transaction: Transaction, tag: journalformat.Tag, position: int) -> None:
    try:
        data = replay.read(position)
    except OSError as error:
        _note(replay, error)
        return
    if not journalformat.data_ok(replay.journal, tag, transaction.sequence, data):
        _note(replay, Corrupt(Check.JOURNAL_DATA_CHECKSUM, block=tag.block, transaction=transaction.sequence))


def _note(replay: Replay, damage: Damage) -> None:
    if len(replay.damage) < MAX_DAMAGE:
        replay.damage.append(damage)
