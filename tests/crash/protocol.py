"""The journal's rules that a power cut would need luck to show broken, checked on the events themselves.

P1  A commit block is written alone, where zeroes were durable before; or the log does not lead there yet.
P2  A block of the log is not written while a superblock may be on disk whose log holds it.
P3  The log's tail moves only when all that was written home is durable.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from fusewire.batchwriter import Log
from fusewire.ext4 import journalformat
from fusewire.ext4.journalsuper import JournalSuperblock, is_after
from tests.crash.recorder import Event, Write

JournalWrite = tuple[int, bytes]    # (journal block, content)


class Protocol:
    """Follows the writes into one journal."""

    def __init__(self, log: Log, block_bytes: int) -> None:
        self._places = {extent.start + index: extent.journal_block + index
                        for extent in log.file.extents for index in range(extent.length)}
        self._block_bytes, self._blocks = block_bytes, log.file.blocks
        self._tails: list[int] = []                 # sequences that superblocks which may be on disk begin with
        self._spans: dict[int, list[int]] = {}      # sequence → journal blocks of a transaction
        self._begun = self._homeward = False        # homeward: blocks were written home and not flushed
        self._zeroed: set[int] = set()
        self._unflushed: set[int] = set()
        self._open: list[int] = []                  # journal blocks written since the last commit block
        self.commits = self.tail_moves = 0

    def follow(self, events: list[Event], data_events: Container[int]) -> None:
        """Raise AssertionError at the first event that breaks a rule; ``data_events`` are writes of file data."""
        for index, event in enumerate(events):
            if isinstance(event, Write):
                logged = list(self._journal_writes(event))
                self._homeward |= not logged and index not in data_events
                for position, data in logged:
                    self._super(data) if position == 0 else self._ring(position, data)
            else:
                self._homeward = False
                self._tails = self._tails[-1:]
                self._zeroed |= self._unflushed
                self._unflushed.clear()

    def _journal_writes(self, event: Write) -> Iterator[JournalWrite]:
        size = self._block_bytes
        for at in range(len(event.data) // size):
            position = self._places.get(event.offset // size + at)
            if position is not None:
                yield position, event.data[at * size:(at + 1) * size]

    def _super(self, data: bytes) -> None:
        journal = JournalSuperblock.parse(data, self._block_bytes, self._blocks)
        assert not self._homeward, f"the log begins with {journal.sequence} before what it held is at home"
        self._tails.append(journal.sequence)
        self._begun = bool(journal.start)
        self.tail_moves += 1

    def _ring(self, position: int, data: bytes) -> None:
        for tail in self._tails:
            for sequence, span in self._spans.items():
                live = sequence == tail or is_after(sequence, tail)
                assert not (live and position in span), f"block {position} of {sequence}, the log begins with {tail}"
        header = journalformat.header(data)
        if header is not None and header.kind == journalformat.COMMIT:
            assert position in self._zeroed or not self._begun, f"commit block {header.sequence} on what was not zeroes"
            self._spans[header.sequence] = [*self._open, position]
            self._open = []
            self.commits += 1
        else:
            self._open.append(position)
        self._zeroed.discard(position)
        if not any(data):
            self._unflushed.add(position)
