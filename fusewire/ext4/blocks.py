"""Metadata blocks in memory.

A block is an immutable ``bytes``.  What was decoded from it (an inode, a parsed directory block, an extent node) is
kept beside it in ``views`` and goes with it, so no view can be stale.  A block that is not here raises ``BlockMiss``:
the caller's caller fetches it, ``admit``s it and runs the whole operation again.

I1  A block admitted after a miss stays at least until half the cache has been admitted after it, so an operation that
    is run again finds what it asked for.
I2  The cache holds at most ``limit_bytes`` of blocks and views, by the estimate of ``VIEW_FACTOR``.
I3  What was read from the device while a block was changed is never admitted, however long that took.
I4  An operation that needs no more than ``generation_blocks`` blocks at once ends: by I1 each miss brings it further.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from .errors import Check, Corrupt

View = TypeVar("View")
Seal = Callable[[bytearray, Callable[[int], bytes | None]], None]
"""Computes a checksum in a block's bytes; the second argument reads another block of the same batch, None if it is not
part of it."""

# Decoded views weigh a few times their block: 16 inodes of a 4 KiB block take about 12 KiB, the 100 names of a
# directory block about 14 KiB.
VIEW_FACTOR = 4
MINIMUM_BLOCKS = 256
MOST_VIEWS = 1024            # of one block: 512 inodes of 128 bytes in 64 KiB, and more only where owners share a block
MOST_FAILURES = 4096         # remembered until they are read; a device that fails more often fails again when asked


class BlockMiss(Exception):
    """Blocks that the operation needs (or will want next) and that are not in memory: runs of (first block, count)."""

    def __init__(self, runs: Iterable[tuple[int, int]]) -> None:
        super().__init__()
        self.runs = tuple(runs)


class CachedBlock:
    """One block and the views decoded from it, by a key that the decoder chooses.

    ``seals`` names what in the block was changed by us and carries no valid checksum until its batch closes: such
    parts are not verified, and each seal knows how to compute its checksum then.
    """

    __slots__ = ("data", "seals", "views")

    def __init__(self, data: bytes, views: dict[Any, Any] | None = None,
                 seals: dict[object, Seal] | None = None) -> None:
        self.data = data
        self.views: dict[Any, Any] = {} if views is None else views
        self.seals: dict[object, Seal] = {} if seals is None else seals


class BlockCache:
    """A bounded map from block number to ``CachedBlock``: two generations, the older dropped as a whole.

    A hit in the old generation moves the block to the young one.  That keeps what is in use for the price of two
    dictionary look-ups at most, where an exact LRU order would cost a reordering on every hit.
    """

    def __init__(self, block_bytes: int, blocks: int, limit_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.blocks = blocks
        self.generation_blocks = max(MINIMUM_BLOCKS, limit_bytes // (2 * VIEW_FACTOR * block_bytes))
        self._young: dict[int, CachedBlock] = {}        # pinned blocks, too, which do not count
        self._inserted = 0
        self._old: dict[int, CachedBlock] = {}
        self._failed: dict[int, OSError] = {}
        self._pinned: dict[int, CachedBlock] = {}
        self._expected: set[int] = set()        # being read, and not changed since

    def entry(self, block: int) -> CachedBlock:
        """The block with its views; ``BlockMiss`` if it is not in memory, ``Corrupt`` if there is no such block."""
        found = self._young.get(block)
        if found is not None:
            return found
        return self._entry_of_old_generation(block)

    def read(self, block: int) -> bytes:
        """The block's bytes; errors as ``entry``."""
        return self.entry(block).data

    def view(self, block: int, key: object, decode: Callable[[bytes], View],
             verify: Callable[[bytes], None] | None = None) -> View:
        """What ``decode`` makes of the block, remembered under ``key`` as long as the block stays.

        ``verify`` looks at the bytes first, if they come from the disk, and raises ``Corrupt`` if they are bad.
        """
        entry = self.entry(block)
        view: View | None = entry.views.get(key)
        if view is None:
            data = bytes(entry.data)
            if verify is not None and not entry.seals:
                verify(data)
            if len(entry.views) >= MOST_VIEWS:
                entry.views.clear()
            view = entry.views[key] = decode(data)
        return view

    def want(self, blocks: Iterable[int]) -> None:
        """Raise one ``BlockMiss`` for all of these that are not in memory: many blocks for the price of one wait."""
        missing = [block for block in blocks if not self.holds(block)]
        if missing:
            raise BlockMiss(runs_of(missing))

    def holds(self, block: int) -> bool:
        """Whether reading the block would not miss (it is here, is known to fail, or is out of range)."""
        return (block in self._young or block in self._pinned or block in self._old or block in self._failed
                or not 0 <= block < self.blocks)

    def admit(self, blocks: Mapping[int, bytes | OSError]) -> None:
        """Take in what was fetched: bytes, or the error that the next read of that block raises (once)."""
        for block, data in blocks.items():
            if isinstance(data, OSError):
                self._remember_failure(block, data)
            elif block not in self._young and block not in self._old and block not in self._pinned:
                self._failed.pop(block, None)
                self._insert(block, CachedBlock(data))

    def expect(self, block: int) -> None:
        """A block is being read while operations go on: see ``admit_expected``."""
        self._expected.add(block)

    def admit_expected(self, blocks: Mapping[int, bytes | OSError]) -> None:
        """As ``admit``, but for blocks that were changed since they were expected (I3)."""
        self.admit({block: data for block, data in blocks.items() if block in self._expected})
        self._expected.difference_update(blocks)

    def pin(self, block: int, entry: CachedBlock) -> None:
        """Put a block here that is newer than the disk; it stays until ``unpin``."""
        self._expected.discard(block)
        self._old.pop(block, None)
        self._young[block] = self._pinned[block] = entry

    def unpin(self, block: int, entry: CachedBlock) -> None:
        """The disk now holds what ``entry`` says: keep it as any other block, unless it was replaced meanwhile."""
        if self._pinned.get(block) is entry:
            del self._pinned[block]
            self._insert(block, entry)

    def drop(self, block: int) -> None:
        """Forget a block, pinned or not: it was freed."""
        self._expected.discard(block)
        for generation in (self._pinned, self._young, self._old):
            generation.pop(block, None)

    def _entry_of_old_generation(self, block: int) -> CachedBlock:
        found = self._pinned.get(block)
        if found is not None:
            return found
        found = self._old.pop(block, None)
        if found is None:
            if not 0 <= block < self.blocks:
                raise Corrupt(Check.BLOCK_RANGE, block=block)
            if block in self._failed:
                raise self._failed.pop(block)
            raise BlockMiss(((block, 1),))
        self._insert(block, found)
        return found

    def _remember_failure(self, block: int, error: OSError) -> None:
        if len(self._failed) >= MOST_FAILURES:
            self._failed.clear()
        self._failed[block] = error

    def _insert(self, block: int, entry: CachedBlock) -> None:
        if self._inserted >= self.generation_blocks:
            self._old, self._young, self._inserted = self._young, {}, 0
        self._young[block] = entry
        self._inserted += 1


def runs_of(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """The blocks as sorted runs of (first, count), neighbours joined, duplicates dropped."""
    runs: list[tuple[int, int]] = []
    for block in sorted(set(blocks)):
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
