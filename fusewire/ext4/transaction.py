"""Transactions: the only way to change a block.

A committed block is an immutable ``bytes``; a transaction owns a ``bytearray`` of each block that it edits.  It is the
file system as its operation sees it (a ``Transaction`` is an ``Ext4`` that has the operation's own blocks on top), so
every function that reads takes it where it takes an ``Ext4``; a function that takes no transaction can change nothing.

    with Transaction(fs) as tx:            nothing is visible outside until the block ends without an exception
        inode.change(tx, …)                whatever is raised, no trace is left: neither in memory nor on disk

Our *transaction* is jbd2's handle; committed ones collect in a ``batch.Batch``.

I1  A transaction applies whole (its blocks enter the cache and the batch in one step) or not at all.
I2  A batch never grows past what the journal can take at once; an operation that would make it so runs again in the
    next batch (``CommitFirst``), and one that is too large for any batch fails (ENOSPC).
I3  Whoever edits a block that carries a checksum registers its seal, in the same transaction.
I4  What a transaction frees it does not allocate again itself: older batches may still name it.
"""

import errno
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

from .batch import Batch, Held, Writing
from .blocks import BlockMiss, CachedBlock, Seal, runs_of
from .errors import Check, Corrupt, Refused
from .filesystem import Ext4

REVOKE_RECORD_BYTES = 16    # of the journal for one revoked block, with its share of the block's header
_COARSE_CLOCK = 5  # CLOCK_REALTIME_COARSE of <linux/time.h>: the clock that the kernel stamps files with


class CommitFirst(Exception):
    """The operation fits only once the open batch is durable: commit that, and run the operation again."""


class EditedBlock:
    """One block that a transaction owns."""

    __slots__ = ("data", "seals", "views")

    def __init__(self, data: bytearray, views: dict[Any, Any], seals: dict[object, Seal]) -> None:
        self.data, self.views, self.seals = data, views, seals


class Overlay:
    """The block cache as one transaction sees it: the blocks it edited, and below them the shared ones."""

    __slots__ = ("base", "block_bytes", "blocks", "edited")

    def __init__(self, base: Any) -> None:
        self.base = base
        self.block_bytes, self.blocks = base.block_bytes, base.blocks
        self.edited: dict[int, EditedBlock] = {}

    def entry(self, block: int) -> Any:
        """The block as the transaction has it; errors as ``BlockCache.entry``."""
        found = self.edited.get(block)
        return self.base.entry(block) if found is None else found

    def read(self, block: int) -> bytes:
        """The block's bytes, as they are at this moment."""
        return bytes(self.entry(block).data)

    def view(self, block: int, key: object, decode: Callable[[bytes], Any],
             verify: Callable[[bytes], None] | None = None) -> Any:
        """What ``decode`` makes of the block; see ``BlockCache.view``."""
        entry = self.entry(block)
        view = entry.views.get(key)
        if view is None:
            data = bytes(entry.data)
            if verify is not None and not entry.seals:
                verify(data)
            view = entry.views[key] = decode(data)
        return view

    def holds(self, block: int) -> bool:
        """Whether reading the block would not miss."""
        return block in self.edited or self.base.holds(block)

    def want(self, blocks: Iterable[int]) -> None:
        """Raise one ``BlockMiss`` for all of these that are not in memory."""
        missing = [block for block in blocks if not self.holds(block)]
        if missing:
            raise BlockMiss(runs_of(missing))


class Transaction(Ext4):
    """One operation's changes.  It reads like the ``Ext4`` it was opened on; see the module's text for the rules."""

    def __init__(self, fs: Ext4, now: tuple[int, int] | None = None, privileged: bool = True) -> None:
        """
        Args:
            now: the operation's time (seconds, nanoseconds); the coarse clock by default, as the kernel stamps.
            privileged: whether the caller may use the blocks reserved for root.
        """
        self.__dict__.update(fs.__dict__)
        self.fs = fs
        self.overlay = Overlay(fs.cache)
        self.cache = self.overlay  # type: ignore[assignment]
        self.privileged = privileged
        self._now = now
        self._revoked: set[int] = set()
        self._freed: list[tuple[int, int]] = []
        self._held = Held(self.geometry.blocks_per_group // self.geometry.cluster_blocks)
        self.clusters_taken = 0         # allocated less freed
        self.inodes_taken = 0
        self.wrote_data = False
        self.only_times = False         # of files are changed, and nothing else
        self.must_fit = False           # for what belongs to closing the batch itself
        self._after: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._commit()

    @property
    def now(self) -> tuple[int, int]:
        """The time that everything in this operation is stamped with."""
        if self._now is None:
            self._now = divmod(time.clock_gettime_ns(_COARSE_CLOCK), 1_000_000_000)
        return self._now

    def edit(self, block: int) -> bytearray:
        """The transaction's own copy of a block, to be changed in place; what was decoded from it is forgotten."""
        entry = self._own(block)
        entry.views.clear()
        return entry.data

    def edit_keeping(self, block: int) -> EditedBlock:
        """As ``edit``, with the block's views left for a caller that itself replaces those of what it changes."""
        return self._own(block)

    def create(self, block: int) -> bytearray:
        """A zeroed block that becomes metadata without being read."""
        if not 0 <= block < self.geometry.blocks:
            raise Corrupt(Check.BLOCK_RANGE, block=block)
        self._revoked.discard(block)
        entry = self.overlay.edited[block] = EditedBlock(bytearray(self.geometry.block_bytes), {}, {})
        return entry.data

    def seal(self, block: int, key: object, seal: Seal) -> None:
        """How to compute a checksum in an edited block when the batch closes; the same key replaces the seal."""
        self.overlay.edited[block].seals[key] = seal

    def revoke(self, block: int) -> None:
        """A metadata block was freed: older versions in the journal must not be replayed over what comes next."""
        self.overlay.edited.pop(block, None)
        self._revoked.add(block)

    def freed(self, first: int, count: int) -> None:
        """Clusters (numbered from group 0's first) were freed; they stay unused until the batch is durable."""
        self._freed.append((first, count))
        self._held.add(first, count)

    def is_revoked(self, block: int) -> bool:
        """Whether this transaction has freed a metadata block, so that nothing may refer to it any more."""
        return block in self._revoked

    def held_clusters(self, group: int) -> int:
        """Clusters of a group, as bits, that are free in its bitmap but may not be used yet."""
        held = 0 if self.writing is None else self.writing.held.mask(group)
        return held | self._held.mask(group)

    def after_commit(self, action: Callable[[], None]) -> None:
        """Run ``action`` if and when the transaction applies: for what is remembered outside of blocks."""
        self._after.append(action)

    def _own(self, block: int) -> EditedBlock:
        found = self.overlay.edited.get(block)
        if found is None:
            base: CachedBlock = self.fs.cache.entry(block)
            found = EditedBlock(bytearray(base.data), dict(base.views), dict(base.seals))
            self.overlay.edited[block] = found
        return found

    def _commit(self) -> None:
        """Make the changes visible and part of the open batch in one step; raises as ``_check_size``."""
        edited, writing, cache = self.overlay.edited, self.writing, self.fs.cache
        assert writing is not None, "a file system is made writable before it is changed"
        batch = writing.batch
        self._check_size(writing)
        for block, entry in edited.items():
            frozen = CachedBlock(bytes(entry.data), entry.views, entry.seals)
            cache.pin(block, frozen)
            batch.blocks[block] = frozen
        batch.revoked.difference_update(edited)     # the copy in this batch is the one that counts
        self._apply_frees(batch, writing.held)
        batch.wrote_data |= self.wrote_data
        if not self.only_times and (edited or self._revoked or self._freed):
            batch.only_times = False
            writing.changes += 1
        writing.free_clusters -= self.clusters_taken
        writing.free_inodes -= self.inodes_taken
        for action in self._after:
            action()

    def _check_size(self, writing: Writing) -> None:
        """Raise ``CommitFirst`` if the open batch cannot take these changes, ``Refused(ENOSPC)`` if none can."""
        batch, edited, limits = writing.batch, self.overlay.edited, writing.limits
        if self.must_fit:
            return
        if limits.single is not None and len(edited) > limits.single:
            raise Refused(errno.ENOSPC)  # as the kernel, for what its journal cannot take
        records = (len(batch.revoked) + len(self._revoked)) * REVOKE_RECORD_BYTES
        limit = limits.collected - self.geometry.blocks_for(records)
        if len(batch.blocks) + len(edited) > limit < len(batch.blocks.keys() | edited.keys()) and not batch.is_empty:
            raise CommitFirst

    def _apply_frees(self, batch: Batch, held: Held) -> None:
        for block in self._revoked:
            batch.blocks.pop(block, None)
            self.fs.cache.drop(block)
        batch.revoked |= self._revoked
        batch.freed.extend(self._freed)
        for first, count in self._freed:
            held.add(first, count)
