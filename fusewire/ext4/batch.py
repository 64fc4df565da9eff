"""Batches: committed transactions on their way to the journal together.  Our *batch* is jbd2's transaction.

I1  A block freed in a batch is not allocated again before that batch is durable (``Held``).
I2  Checksums are sealed, and the superblock's counters brought up to date, when a batch closes.
"""

from typing import NamedTuple

from .blocks import CachedBlock

MOST_WINDOWS = 64             # files that are appended to at the same time
MOST_SHARED_ATTRIBUTES = 256  # attribute blocks that a new inode may come to share


class Batch:
    """The open batch: what operations changed since the last one closed."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.blocks: dict[int, CachedBlock] = {}
        self.revoked: set[int] = set()
        self.freed: list[tuple[int, int]] = []      # (first cluster, count)
        self.wrote_data = False                     # file data went to the device that must be durable first
        self.only_times = True                      # of files were changed: nothing that finds their data

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to make durable."""
        return not (self.blocks or self.wrote_data or self.revoked or self.freed)


class BatchLimits(NamedTuple):
    """How large a batch may become, in blocks; closing it may add the superblock.

    ``collected``: operations are added up to here.  ``single``: what one operation alone may change, because the
    journal takes no more at once; None for any number.
    """

    collected: int
    single: int | None = None


class ClosedBatch(NamedTuple):
    """A batch that no operation can change any more: sealed blocks, ready for the journal."""

    number: int
    blocks: dict[int, bytes]
    entries: dict[int, CachedBlock]     # the same blocks as the cache pins them, to be unpinned once they are home
    revoked: frozenset[int]
    freed: list[tuple[int, int]]
    wrote_data: bool


class Held:
    """Clusters that are free in the bitmaps but must not be used yet, as one mask per group."""

    def __init__(self, clusters_per_group: int) -> None:
        self._per_group = clusters_per_group
        self._masks: dict[int, int] = {}
        self.count = 0

    def add(self, first: int, count: int) -> None:
        """Hold ``count`` clusters from ``first`` on, counted from the first cluster of group 0."""
        for group, bit, length in self._pieces(first, count):
            self._masks[group] = self._masks.get(group, 0) | ((1 << length) - 1) << bit
        self.count += count

    def remove(self, first: int, count: int) -> None:
        """Let go of clusters that were added."""
        for group, bit, length in self._pieces(first, count):
            left = self._masks.get(group, 0) & ~(((1 << length) - 1) << bit)
            if left:
                self._masks[group] = left
            else:
                self._masks.pop(group, None)
        self.count -= count

    def mask(self, group: int) -> int:
        """The held clusters of a group as bits, 0 for none."""
        return self._masks.get(group, 0)

    def mask_of(self, group: int, first: int, count: int) -> int:
        """The bits of a group that a run of clusters has."""
        return sum(((1 << length) - 1) << bit for piece, bit, length in self._pieces(first, count) if piece == group)

    def _pieces(self, first: int, count: int) -> list[tuple[int, int, int]]:
        pieces = []
        while count:
            group, bit = divmod(first, self._per_group)
            length = min(count, self._per_group - bit)
            pieces.append((group, bit, length))
            first, count = first + length, count - length
        return pieces


class Windows:
    """Free clusters behind what files were given last, kept for what is appended to them next.

    They only guide searches: nothing is taken, and whoever finds no space elsewhere forgets them all.
    """

    def __init__(self, clusters_per_group: int) -> None:
        self._runs: dict[int, tuple[int, int]] = {}     # file → (first cluster, count), the last used at the end
        self._held = Held(clusters_per_group)

    def put(self, number: int, first: int, count: int) -> None:
        """Keep ``count`` clusters from ``first`` on for a file, instead of what was kept for it before."""
        self.drop(number)
        if count:
            if len(self._runs) >= MOST_WINDOWS:
                self.drop(next(iter(self._runs)))
            self._runs[number] = first, count
            self._held.add(first, count)

    def drop(self, number: int) -> None:
        """Keep nothing for a file."""
        run = self._runs.pop(number, None)
        if run is not None:
            self._held.remove(*run)

    def clear(self) -> None:
        """Keep nothing for anybody."""
        for number in list(self._runs):
            self.drop(number)

    def mask(self, group: int, owner: int) -> int:
        """The clusters of a group, as bits, that are kept for others than ``owner``."""
        held = self._held.mask(group)
        if held and owner in self._runs:
            held &= ~self._held.mask_of(group, *self._runs[owner])
        return held


class Cuts:
    """Files that were cut.  What was cut off within a block stands behind their end until the cut is durable, for a
    crash brings the old size back; then it is to be cleared."""

    def __init__(self) -> None:
        self._batches: dict[int, int] = {}      # file that was cut within a block → the batch with its last cut
        self._unfinished: set[int] = set()      # files of which blocks are still being freed
        self._durable = 0

    def add(self, number: int, batch: int, within_block: bool) -> None:
        """A file is cut in a batch; freeing its blocks begins."""
        self.remove(number)
        self._unfinished.add(number)
        if within_block:
            self._batches[number] = batch

    def finish(self, number: int) -> None:
        """No block is left behind the end of a file."""
        self._unfinished.discard(number)

    def remove(self, number: int) -> None:
        """Nothing of a file is left to be cleared."""
        self._batches.pop(number, None)
        self._unfinished.discard(number)

    def durable(self, batch: int) -> list[int]:
        """A batch is durable, and all before it: the files that are to be cleared now; they are forgotten here."""
        self._durable = batch
        due = [number for number, cut in self._batches.items() if cut <= batch and number not in self._unfinished]
        for number in due:
            self.remove(number)
        return due

    def is_unfinished(self, number: int) -> bool:
        """Whether blocks of a file are still being freed."""
        return number in self._unfinished

    def is_open(self, number: int) -> bool:
        """Whether a file was cut, and that is not durable."""
        return self._batches.get(number, 0) > self._durable

    def __contains__(self, number: int) -> bool:
        """Whether there may be something to clear."""
        return number in self._batches


class Groups:
    """A set of groups, at first all of them; it only helps to search, so a wrong member costs time and no more."""

    def __init__(self, count: int) -> None:
        self._members = bytearray(b"\1" * count)

    def next(self, low: int, high: int) -> int | None:
        """The first member in [low, high)."""
        found = self._members.find(1, low, high)
        return None if found < 0 else found

    def add(self, group: int) -> None:
        """Let it be a member."""
        self._members[group] = 1

    def remove(self, group: int) -> None:
        """Let it be none."""
        self._members[group] = 0

    def fill(self) -> None:
        """Let all be members."""
        self._members[:] = b"\1" * len(self._members)


class Writing:
    """What a file system remembers outside of its blocks while it is writable."""

    def __init__(self, clusters_per_group: int, groups: int, limits: BatchLimits, free: tuple[int, int]) -> None:
        """
        Args:
            groups: how many the file system has.
            free: (free clusters, free inodes) of the whole file system.
        """
        self.batch = Batch(1)
        self.limits = limits
        self.held = Held(clusters_per_group)
        self.cuts = Cuts()
        self.windows = Windows(clusters_per_group)
        self.free_clusters, self.free_inodes = free
        self.orphans: dict[int, int] = {}           # orphaned inode → a hint to where it is noted; see ``orphan``
        self.roomy = Groups(groups)                 # groups that may have free clusters
        self.longest: dict[int, int] = {}           # group → no longer run was free when it was searched for one
        self.roomy_tables = Groups(groups)          # groups that may have free inodes
        self.system_bits: dict[int, int] = {}       # group → its clusters that hold the file system's own metadata
        self.shared_attributes: dict[bytes, int] = {}   # content of an attribute block → where one with it stands
        self.directory_group = 0                    # where the last directory at the top was spread to
        self.changes = 0                            # transactions so far that changed more than times

    def remember_attributes(self, content: bytes, block: int) -> None:
        """Let other inodes with the same attributes find this block; old ones are forgotten."""
        if len(self.shared_attributes) >= MOST_SHARED_ATTRIBUTES:
            self.shared_attributes.pop(next(iter(self.shared_attributes)))
        self.shared_attributes[content] = block

    def forget_attributes(self, content: bytes, block: int) -> None:
        """The block was freed: nobody may find it any more."""
        if self.shared_attributes.get(content) == block:
            del self.shared_attributes[content]
