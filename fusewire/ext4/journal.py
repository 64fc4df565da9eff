"""The journal's writer: batches of blocks become transactions of the log; it does no I/O and keeps no block.

Kernel documentation, ext4, "Journal (jbd2)".  The caller writes what comes out, in this order, and says when something
is durable (written, and the device's cache flushed):

    EMPTY    the superblock on disk says start 0, or a log without a transaction
      │      encode(batch) → records and commit block, all durable before begin() → superblock is written: once that
      ▼      is durable, so is the batch, and its blocks may go home
    LOGGING  encode(batch) → records, all durable, then the commit block; once that is durable, so is the batch
      │ ▲
      │ └──  checkpoint(sequence) once the blocks of all batches up to it are home and durable → a new superblock;
      │      release() once that is durable: the log's space is free again
      ▼
    EMPTY    empty() after the last checkpoint → superblock that says start 0

I1  A block of the log is not written again before a superblock is durable whose log begins after it.
I2  Batches are collected up to a quarter of the log, so there is room for one while the others are being checkpointed.
    Only one that a single operation makes larger may take all of it.
I3  A batch never both logs and revokes a block: replay would drop the logged copy.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import journalformat
from .journalsuper import SEQUENCES, JournalFeature, JournalSuperblock, is_after

BATCH_SHARE = 4


class Encoded(NamedTuple):
    """One batch as blocks of the journal: ``records`` first, the ``commit`` block when they are durable."""

    sequence: int
    records: list[tuple[int, bytes]]
    commit: tuple[int, bytes]

    def runs(self) -> list[tuple[int, list[bytes]]]:
        """The records as (first journal block, blocks that follow each other there)."""
        runs: list[tuple[int, list[bytes]]] = []
        for position, data in self.records:
            if runs and runs[-1][0] + len(runs[-1][1]) == position:
                runs[-1][1].append(data)
            else:
                runs.append((position, [data]))
        return runs


class TailMove(NamedTuple):
    """The superblock to write after a checkpoint; ``release`` it when it is durable."""

    sequence: int           # the first transaction that the log still holds, or the next one
    start: int
    superblock: bytes


class _Live(NamedTuple):
    sequence: int
    start: int
    length: int


class JournalWriter:
    """The log's head and tail, and the transactions between them that are not known to be at home."""

    def __init__(self, journal: JournalSuperblock, head: int, sequence: int) -> None:
        """A writer whose next transaction is ``sequence``, at journal block ``head``; what the log holds is void.

        ``journal`` is the superblock as it is on disk: empty, or beginning at ``head`` already.
        """
        assert journal.first <= head < journal.last and journal.start in (0, head)
        self.journal = journal
        self.head, self.sequence = head, sequence % SEQUENCES
        self._begun = bool(journal.start)
        self._last_time_ns = 0
        self._live = deque[_Live]()
        self._used = 0

    # ---- space

    @property
    def free(self) -> int:
        """Journal blocks that may be written now."""
        return self.journal.ring_blocks - self._used

    @property
    def max_blocks(self) -> int:
        """The most blocks that a batch without revocations should log (I2)."""
        return self.blocks_in(self.journal.ring_blocks // BATCH_SHARE)

    @property
    def most_blocks(self) -> int:
        """The most blocks that a batch without revocations can log, in a log that holds nothing else."""
        return self.blocks_in(self.journal.ring_blocks)

    def blocks_in(self, journal_blocks: int) -> int:
        """The most blocks that a batch without revocations can log in so many of the journal's."""
        tags = journalformat.tags_per_descriptor(self.journal)
        return (journal_blocks - 1) * tags // (tags + 1)

    def need(self, blocks: int, revocations: int = 0) -> int:
        """Journal blocks that a batch takes: logged blocks, descriptors, revocation blocks and the commit block."""
        descriptors = -(-blocks // journalformat.tags_per_descriptor(self.journal))
        revoking = -(-revocations // journalformat.records_per_revocation(self.journal))
        return revoking + descriptors + blocks + 1

    def fits(self, blocks: int, revocations: int = 0) -> bool:
        """Whether there is room for a batch of this size now."""
        return self.need(blocks, revocations) <= self.free

    # ---- transactions

    @property
    def begun(self) -> bool:
        """Whether the superblock on disk leads to the log, so that a commit block makes a transaction count."""
        return self._begun

    def begin(self) -> bytes:
        """The superblock that starts an empty log, to be written at once."""
        self._begun = True
        first = self._live[0] if self._live else _Live(self.sequence, self.head, 0)
        return self.tail_superblock(first.sequence, first.start)

    def encode(self, blocks: Sequence[tuple[int, bytes]], revocations: Iterable[int], commit_time_ns: int) -> Encoded:
        """The next transaction: (home, content) of each block once, and the blocks freed that must not come back."""
        revoked = sorted(revocations)
        homes = {block for block, _ in blocks}
        assert self.fits(len(blocks), len(revoked)) and (self._begun or not self._live)
        assert len(homes) == len(blocks) and homes.isdisjoint(revoked)
        assert not revoked or JournalFeature.REVOKE in self.journal
        assert self.journal.wide or max(homes, default=0) < 1 << 32
        self._last_time_ns = max(self._last_time_ns, commit_time_ns)  # replay tells remains by time going back
        records: list[bytes] = []
        running = self._add_logged(records, blocks)
        records = self._revocation_blocks(revoked) + records
        commit = journalformat.encode_commit(self.journal, self.sequence, self._last_time_ns, running)
        return self._append(records, commit)

    def _revocation_blocks(self, revoked: list[int]) -> list[bytes]:
        most = journalformat.records_per_revocation(self.journal)
        return [journalformat.encode_revocations(self.journal, self.sequence, revoked[at:at + most])
                for at in range(0, len(revoked), most)]

    def _add_logged(self, records: list[bytes], blocks: Sequence[tuple[int, bytes]]) -> int:
        """Add descriptors, each followed by what it describes; the sum of version 1 over them."""
        most, running = journalformat.tags_per_descriptor(self.journal), journalformat.running_sum(self.journal, ())
        for at in range(0, len(blocks), most):
            entries = [(block, *journalformat.escape(data)) for block, data in blocks[at:at + most]]
            group = [journalformat.encode_descriptor(self.journal, self.sequence, entries)]
            group += [data for _, data, _ in entries]
            running = journalformat.running_sum(self.journal, group, running)
            records += group
        return running

    def _append(self, records: list[bytes], commit: bytes) -> Encoded:
        start, placed = self.head, []
        for data in (*records, commit):
            placed.append((self.head, data))
            self.head = self.journal.step(self.head)
        encoded = Encoded(self.sequence, placed[:-1], placed[-1])
        self._live.append(_Live(self.sequence, start, len(placed)))
        self._used += len(placed)
        self.sequence = (self.sequence + 1) % SEQUENCES
        return encoded

    # ---- tail

    def in_log(self) -> list[int]:
        """The transactions whose blocks are not known to be at home, oldest first."""
        return [transaction.sequence for transaction in self._live]

    def checkpoint(self, sequence: int) -> TailMove | None:
        """The tail move that the checkpoint of all transactions up to ``sequence`` allows; None if it allows none."""
        kept = next((live for live in self._live if is_after(live.sequence, sequence)), None)
        if not self._live or kept is self._live[0]:
            return None
        number, start = (kept.sequence, kept.start) if kept else (self.sequence, self.head)
        return TailMove(number, start, self.tail_superblock(number, start))

    def release(self, move: TailMove) -> None:
        """The superblock of a tail move is durable: the space before it may be written again (I1)."""
        while self._live and is_after(move.sequence, self._live[0].sequence):
            self._used -= self._live.popleft().length

    def empty(self) -> bytes:
        """The superblock that says that nothing is to be replayed; everything must have been checkpointed."""
        assert not self._live
        self._begun = False
        return self.tail_superblock(self.sequence, 0)

    def tail_superblock(self, sequence: int, start: int) -> bytes:
        """The superblock of a log whose oldest transaction is ``sequence``, at ``start``; 0 for an empty log."""
        if start:
            return self.journal.patched(sequence=sequence, start=start)
        return self.journal.emptied(sequence, self.head).raw

    def aborted(self, error: int) -> bytes:
        """The superblock that records ``error`` (an errno) as the reason why nothing more is written.

        Before the log is begun it stays empty: the first transaction may be torn, its commit block there.
        """
        first = self._live[0] if self._live else _Live(self.sequence, self.head, 0)
        start = first.start if self._begun else 0
        return self.journal.patched(sequence=first.sequence, start=start, errno=(1 << 32) - error)
