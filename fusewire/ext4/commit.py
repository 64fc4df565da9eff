"""The life of a batch: closed and sealed, made durable by the journal, written home.

    open ──close()──▶ closed ──(journal written, flushed)──▶ durable() ──(blocks written home, flushed)──▶ home()

Between these calls the caller does the I/O, in another thread if it likes: a closed batch cannot change.  Without a
journal, a closed batch is written home at once, and ``durable`` and ``home`` follow together.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import statfs, superstore
from .batch import Batch, BatchLimits, ClosedBatch, Writing
from .blocks import CachedBlock
from .transaction import Transaction

if TYPE_CHECKING:
    from .filesystem import Ext4

VIEWS_KEPT_BLOCKS = 512     # in a batch: decoded they take 8 MiB, and decoding them again would take 50 ms


def start_writing(fs: "Ext4", limits: BatchLimits) -> Writing:
    """Make a file system writable; its descriptors are read for that (``BlockMiss``), nothing is written yet."""
    free_blocks, free_inodes = statfs.count_free(fs)
    geometry = fs.geometry
    block, _ = superstore.place(fs)
    entry = fs.cache.entry(block)
    fs.cache.pin(block, entry)  # it is part of every batch, and closing one must not wait for it
    ratio = geometry.cluster_blocks
    fs.writing = Writing(geometry.blocks_per_group // ratio, geometry.groups, limits,
                         (free_blocks // ratio, free_inodes))
    fs.free_counts = None  # they are kept in ``Writing`` now, and counted anew when that ends
    return fs.writing


def close(fs: "Ext4", now_seconds: int) -> ClosedBatch:
    """Seal the open batch, with the superblock's counters as they are now, and open the next one."""
    writing = fs.writing
    assert writing is not None
    _store_counters(fs, writing, now_seconds)
    batch, writing.batch = writing.batch, Batch(writing.batch.number + 1)
    entries = _sealed(fs, batch)
    return ClosedBatch(batch.number, {block: entry.data for block, entry in entries.items()}, entries,
                       frozenset(batch.revoked), batch.freed, batch.wrote_data)


def durable(fs: "Ext4", closed: ClosedBatch) -> list[int]:
    """The batch will survive a crash: what it freed may be used again.  The files to be cleared, see ``batch.Cuts``."""
    assert fs.writing is not None
    allow_reuse(fs, closed)
    return fs.writing.cuts.durable(closed.number)


def allow_reuse(fs: "Ext4", batch: Batch | ClosedBatch) -> None:
    """What a batch freed may be used again: it is durable, or nothing that uses it is written before it is."""
    assert fs.writing is not None
    for first, count in batch.freed:
        fs.writing.held.remove(first, count)
    batch.freed.clear()
    fs.writing.longest.clear()


def home(fs: "Ext4", entries: Mapping[int, CachedBlock]) -> None:
    """Blocks of closed batches are in their places: the cache may forget those that no later batch has changed."""
    super_block, _ = superstore.place(fs)
    for block, entry in entries.items():
        if block != super_block:
            fs.cache.unpin(block, entry)


def _store_counters(fs: "Ext4", writing: Writing, now_seconds: int) -> None:
    with Transaction(fs) as tx:
        tx.must_fit = True
        superstore.change(
            tx, free_blocks_count_lo=writing.free_clusters & 0xFFFFFFFF,
            free_inodes_count=writing.free_inodes & 0xFFFFFFFF, wtime=now_seconds & 0xFFFFFFFF,
            wtime_hi=now_seconds >> 32 & 0xFF)
        if tx.is_64bit:
            superstore.change(tx, free_blocks_count_hi=writing.free_clusters >> 32 & 0xFFFFFFFF)


def _sealed(fs: "Ext4", batch: Batch) -> dict[int, CachedBlock]:
    """The batch's blocks with their checksums, also put into the cache in place of those without.

    What was decoded from the blocks of a large batch is forgotten: most of it will not be asked for again, and until
    they are home the cache cannot let go of them.
    """
    contents, keeps_views = batch.blocks, len(batch.blocks) <= VIEWS_KEPT_BLOCKS

    def read(block: int) -> bytes | None:
        found = contents.get(block)
        return None if found is None else found.data

    sealed = {}
    for block, entry in contents.items():
        if not keeps_views:
            entry.views.clear()
        if not entry.seals:
            sealed[block] = entry
            continue
        raw = bytearray(entry.data)
        for seal in entry.seals.values():
            seal(raw, read)
        sealed[block] = CachedBlock(bytes(raw), entry.views)
        fs.cache.pin(block, sealed[block])
    return sealed
