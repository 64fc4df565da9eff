"""Block and inode bitmaps: what is free, and taking and giving back.  Kernel documentation, ext4, "Block and inode
Bitmaps".

I1  A group's free count equals the zero bits of its bitmap, in every transaction.
I2  A cluster freed in a batch is not taken again before that batch is durable: searches see ``Writing.held`` as used.
I3  ENOSPC comes when the kernel's ext4 gives it: the share reserved for root is honoured, nothing else is kept back.

Bits are clusters, counted from the first block of the group.  Searches work on bytes: a free run of eight bits or more
is found by ``bytes.find`` (2 µs for 4 KiB), a single bit by looking for the first byte that is not full.
"""

import errno
import re
from typing import TYPE_CHECKING, NamedTuple

from . import checksum, group
from .errors import Check, Corrupt, Refused
from .features import Feature
from .group import BLOCK_UNINIT
from .transaction import CommitFirst

if TYPE_CHECKING:
    from .transaction import Transaction

_NOT_FULL = re.compile(rb"[^\xff]")
_ZEROES = re.compile(rb"\0*")
RESERVED_CLUSTERS_MOST = 4096   # what the kernel keeps back so that writing back never runs out of blocks
RESERVED_SHARE = 50


class Run(NamedTuple):
    """Neighbouring blocks that were allocated."""

    start: int
    length: int


def allocate(tx: "Transaction", goal: int, count: int) -> Run:
    """Up to ``count`` neighbouring blocks, at ``goal`` if they are free there, else as near behind it as possible.

    With bigalloc, whole clusters are taken: the run starts at a cluster's first block, its count is a multiple.

    Raises:
        Refused(ENOSPC): nothing is free for this caller.
        CommitFirst: only what a batch on its way has freed is left.
    """
    geometry = tx.geometry
    ratio = geometry.cluster_blocks
    clusters = -(-count // ratio)
    clusters = min(clusters, _available(tx))
    goal_cluster = max(goal - geometry.first_data_block, 0) // ratio
    start, taken = _search(tx, goal_cluster, clusters)
    _take(tx, start, taken)
    return Run(geometry.first_data_block + start * ratio, taken * ratio)


def free(tx: "Transaction", start: int, count: int, *, metadata: bool = False) -> None:
    """Give back ``count`` blocks from ``start`` on (whole clusters with bigalloc); ``metadata``: revoke them too."""
    geometry = tx.geometry
    ratio = geometry.cluster_blocks
    if metadata:
        for block in range(start, start + count):
            tx.revoke(block)
    first = (start - geometry.first_data_block) // ratio
    clusters = -(-(start + count - geometry.first_data_block) // ratio) - first
    tx.freed(first, clusters)
    tx.clusters_taken -= clusters
    per_group = geometry.blocks_per_group // ratio
    while clusters:
        number, bit = divmod(first, per_group)
        length = min(clusters, per_group - bit)
        _set_bits(tx, number, bit, length, used=False)
        first, clusters = first + length, clusters - length


def _available(tx: "Transaction") -> int:
    """Clusters that this caller may still take, at least 1; ``Refused(ENOSPC)`` if there is none."""
    writing = tx.writing
    assert writing is not None
    left = writing.free_clusters - tx.clusters_taken
    fields, ratio = tx.superblock.fields, tx.geometry.cluster_blocks
    kept = reserved_clusters(tx)
    if not tx.privileged:
        kept += fields["r_blocks_count"] // ratio
    if left - kept < 1:
        raise Refused(errno.ENOSPC)
    return left - kept


def reserved_clusters(tx: "Transaction") -> int:
    """Clusters that nobody gets by asking, as in the kernel: 2 % of the file system, 4096 at most."""
    if Feature.EXTENTS not in tx.superblock.features:
        return 0
    return min(tx.geometry.blocks // tx.geometry.cluster_blocks // RESERVED_SHARE, RESERVED_CLUSTERS_MOST)


def _search(tx: "Transaction", goal: int, count: int) -> tuple[int, int]:
    """(first cluster, how many) of a free run: exactly at the goal, else the first that is long enough in the goal's
    group or one after it, else the longest that a whole round has met."""
    per_group = tx.geometry.blocks_per_group // tx.geometry.cluster_blocks
    goal_group, goal_bit = divmod(goal, per_group)
    groups, best = tx.geometry.groups, (0, 0)
    goal_group %= groups
    for step in range(groups + 1):
        number = (goal_group + step) % groups
        desc = group.load(tx, number)
        if desc.free_blocks == 0 or (desc.free_blocks < count and step < groups and best[1]):
            continue
        bit, length = _search_group(tx, number, goal_bit if step == 0 else 0, count)
        if length >= count or (step == 0 and bit == goal_bit and length):
            return number * per_group + bit, min(length, count)
        if length > best[1]:
            best = (number * per_group + bit, length)
    if not best[1]:
        raise CommitFirst if tx.writing is not None and tx.writing.held.count else Refused(errno.ENOSPC)
    return best


def _search_group(tx: "Transaction", number: int, start: int, count: int) -> tuple[int, int]:
    """(first bit, length) of the free run at ``start``, else a run of ``count`` bits, else a shorter one; length 0:
    nothing is free."""
    bits = _clusters_in(tx, number)
    used = _used(tx, number, bits)
    length = _run_length(used, start, min(count, bits - start))
    if length:
        return start, length
    for begin in (start, 0):
        bit = _long_run(used, begin, count, bits)
        if bit is not None:
            return bit, _run_length(used, bit, min(count, bits - bit))
    return _any_run(used, start, count, bits)


def _used(tx: "Transaction", number: int, bits: int) -> bytes:
    """The group's bitmap with held clusters as used, ``bits`` long in bytes, the rest of the last byte set."""
    size = -(-bits // 8)
    raw = bitmap(tx, number)[:size]
    held = tx.writing.held.mask(number) if tx.writing is not None else 0
    tail = ((1 << (size * 8 - bits)) - 1) << bits
    if held or tail:
        raw = (int.from_bytes(raw, "little") | held | tail).to_bytes(size, "little")
    return raw


def _run_length(used: bytes, start: int, most: int) -> int:
    """How many bits from ``start`` on are zero, up to ``most``."""
    bit, end = start, start + most
    while bit < end and not used[bit // 8] >> (bit % 8) & 1:
        if bit % 8 == 0:
            zeroes = _ZEROES.match(used, bit // 8, -(-end // 8))
            assert zeroes is not None
            whole = zeroes.end() * 8
            bit = whole if whole > bit else bit + 1
        else:
            bit += 1
    return min(bit, end) - start


def _long_run(used: bytes, start: int, count: int, bits: int) -> int | None:
    """The first bit of a free run of ``count`` bits (as whole bytes, where ``count`` is 8 or more)."""
    if count < 8:
        return _short_run(used, start, count, bits)
    at = used.find(bytes(-(-count // 8)), start // 8)
    if at < 0:
        return None
    first = at * 8
    while first > start and not used[(first - 1) // 8] >> ((first - 1) % 8) & 1:
        first -= 1
    return first


def _short_run(used: bytes, start: int, count: int, bits: int) -> int | None:
    bit = start
    while True:
        found = _NOT_FULL.search(used, bit // 8)
        if found is None:
            return None
        bit = max(bit, found.start() * 8)
        while bit < bits and used[bit // 8] >> (bit % 8) & 1:
            bit += 1
        if bit >= bits:
            return None
        length = _run_length(used, bit, min(count, bits - bit))
        if length == count:
            return bit
        bit += max(length, 1)


def _any_run(used: bytes, start: int, count: int, bits: int) -> tuple[int, int]:
    """The longest free run there is, for a caller that must take what is left."""
    best, bit = (start, 0), 0
    while True:
        found = _NOT_FULL.search(used, bit // 8)
        if found is None:
            return best
        bit = max(bit, found.start() * 8)
        while bit < bits and used[bit // 8] >> (bit % 8) & 1:
            bit += 1
        if bit >= bits:
            return best
        length = _run_length(used, bit, min(count, bits - bit))
        if length > best[1]:
            best = (bit, length)
        bit += max(length, 1)


def _clusters_in(tx: "Transaction", number: int) -> int:
    """Clusters of a group; the last group may be shorter."""
    geometry = tx.geometry
    blocks = min(geometry.blocks_per_group, geometry.blocks - geometry.first_block_of(number))
    return -(-blocks // geometry.cluster_blocks)


def _take(tx: "Transaction", first: int, count: int) -> None:
    per_group = tx.geometry.blocks_per_group // tx.geometry.cluster_blocks
    number, bit = divmod(first, per_group)
    _set_bits(tx, number, bit, count, used=True)
    tx.clusters_taken += count


def _set_bits(tx: "Transaction", number: int, bit: int, count: int, *, used: bool) -> None:
    """Mark clusters of one group, and count them in its descriptor."""
    raw = _own_bitmap(tx, number)
    first, last = bit // 8, (bit + count - 1) // 8 + 1
    mask = ((1 << count) - 1) << (bit - first * 8)
    old = int.from_bytes(raw[first:last], "little")
    if (old & mask) if used else (~old & mask):
        raise Corrupt(Check.BITMAP_MISMATCH, group=number, bit=bit, count=count, expected="free" if used else "used")
    raw[first:last] = ((old | mask) if used else (old & ~mask)).to_bytes(last - first, "little")
    desc = group.load(tx, number)
    group.change(tx, number, free_blocks=desc.free_blocks + (-count if used else count),
                 flags=desc.flags & ~BLOCK_UNINIT)


def bitmap(tx: "Transaction", number: int) -> bytes:
    """A group's block bitmap: as the disk has it, or computed where the disk has none yet (BLOCK_UNINIT)."""
    desc = group.load(tx, number)
    if desc.flags & BLOCK_UNINIT and has_uninit(tx):
        return _initial_bitmap(tx, number)
    return bytes(tx.cache.view(desc.block_bitmap, "bitmap", bytes,
                               lambda data: verify_bitmap(tx, number, data, "block_bitmap")))


def _own_bitmap(tx: "Transaction", number: int) -> bytearray:
    desc = group.load(tx, number)
    if desc.flags & BLOCK_UNINIT and has_uninit(tx):
        raw = tx.create(desc.block_bitmap)
        raw[:] = _initial_bitmap(tx, number)
    else:
        bitmap(tx, number)
        raw = tx.edit(desc.block_bitmap)
    tx.seal(desc.block_bitmap, "bitmap", sealed_elsewhere)
    return raw


def sealed_elsewhere(_raw: bytearray, _read: object) -> None:
    """A bitmap carries no checksum of its own; its group descriptor does, and is sealed after it."""


def has_uninit(tx: "Transaction") -> bool:
    """Whether groups can be uninitialised: their flags count only under a checksum of the descriptor."""
    return tx.has_checksums or Feature.GDT_CSUM in tx.superblock.features


def verify_bitmap(tx: "Transaction", number: int, data: bytes, kind: str) -> None:
    """Raise ``Corrupt(BITMAP_CHECKSUM)`` if a bitmap does not match its group descriptor."""
    if not tx.has_checksums:
        return
    geometry = tx.geometry
    desc, seed = group.raw(tx, number), tx.superblock.seed
    if kind == "block_bitmap":
        fine = checksum.block_bitmap_ok(data, geometry.blocks_per_group // geometry.cluster_blocks, desc, seed)
    else:
        fine = checksum.inode_bitmap_ok(data, geometry.inodes_per_group, desc, seed)
    if not fine:
        raise Corrupt(Check.BITMAP_CHECKSUM, group=number, bitmap=kind)


def _initial_bitmap(tx: "Transaction", number: int) -> bytes:
    """The bitmap of a group that was never written to: its metadata used, what lies beyond the end used."""
    geometry, superblock = tx.geometry, tx.superblock
    start, ratio = geometry.first_block_of(number), geometry.cluster_blocks
    bits = _clusters_in(tx, number)
    used = ((1 << (geometry.block_bytes * 8 - bits)) - 1) << bits
    head = superblock.head_blocks(number)
    if head:
        used |= (1 << -(-head // ratio)) - 1
    desc_count = geometry.groups if Feature.FLEX_BG in superblock.features else number + 1
    for other in range(0 if Feature.FLEX_BG in superblock.features else number, desc_count):
        desc = group.load(tx, other)
        for first, count in ((desc.block_bitmap, 1), (desc.inode_bitmap, 1),
                             (desc.inode_table, geometry.inode_table_blocks())):
            low, high = max(first - start, 0), min(first + count - start, geometry.blocks_per_group)
            if low < high:
                used |= ((1 << (-(-high // ratio) - low // ratio)) - 1) << (low // ratio)
    return used.to_bytes(geometry.block_bytes, "little")
