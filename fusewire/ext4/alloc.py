"""Block bitmaps: what is free, and taking and giving back.  Kernel documentation, ext4, "Block and inode Bitmaps".

I1  A group's free count equals the zero bits of its bitmap, in every transaction.
I2  A cluster freed in a batch is not taken again before that batch is durable: searches see it as used.
I3  ENOSPC comes when the kernel's ext4 gives it: the share reserved for root is honoured, nothing else is kept back.
I4  What holds metadata of the file system itself is neither given out nor given back.
I5  Clusters behind what a file was given (``batch.Windows``) are left to it as long as others find some elsewhere.

Bits are clusters, counted from the first block of the group.  A search sees a group's free clusters as the bits of one
integer: its positions that begin n free ones are found with log n shifts (2 µs each for 32768 bits).
"""

import errno
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from . import checksum, group, statfs
from .errors import Check, Corrupt, Refused
from .features import Feature
from .group import BLOCK_UNINIT
from .transaction import CommitFirst

if TYPE_CHECKING:
    from .transaction import EditedBlock, Transaction

BITMAPS_AHEAD = 16              # of groups that follow, where they lie together on disk as with flex_bg
MOST_BITMAPS, MOST_GROUPS = 8, 64   # that are searched and passed for a longer run once there is one
MOST_FLEX_GROUPS = 256          # looked at for metadata of one in another; mke2fs makes 16


class Run(NamedTuple):
    """Neighbouring blocks that were allocated."""

    start: int
    length: int


def allocate(tx: "Transaction", goal: int, count: int, *, reserve: bool = False, owner: int = 0,
             ahead: int = 0) -> Run:
    """Up to ``count`` neighbouring blocks, at ``goal`` if they are free there, else as near behind it as possible.

    With bigalloc, whole clusters are taken: the run starts at a cluster's first block, its count is a multiple.

    Args:
        reserve: for what must not fail, because the data that it is about are there already: the blocks that nobody
            gets otherwise (``statfs.reserved_clusters``, and those of root) may be used.
        owner: the file that they are for, which has its window.
        ahead: blocks behind them that shall be left to the owner, to be asked for next.

    Raises:
        Refused(ENOSPC): nothing is free for this caller.
        CommitFirst: only what a batch on its way has freed is left.
    """
    geometry = tx.geometry
    ratio = geometry.cluster_blocks
    clusters = min(-(-max(count, 1) // ratio), _available(tx, reserve))
    goal = min(max(goal, geometry.first_data_block), geometry.blocks - 1)
    start, found = _search(tx, (goal - geometry.first_data_block) // ratio, clusters + ahead // ratio, owner)
    taken = min(found, clusters)
    take(tx, start, taken)
    if owner and tx.writing is not None:
        tx.after_commit(partial(tx.writing.windows.put, owner, start + taken, found - taken))
    return Run(geometry.first_data_block + start * ratio, taken * ratio)


def free(tx: "Transaction", start: int, count: int, *, metadata: bool = False) -> None:
    """Give back ``count`` blocks from ``start`` on (whole clusters with bigalloc); ``metadata``: revoke them too.

    Raises ``Corrupt``: BLOCK_RANGE, or BITMAP_MISMATCH if they were not in use, or not by a file.
    """
    geometry = tx.geometry
    ratio = geometry.cluster_blocks
    if start < geometry.first_data_block or start + count > geometry.blocks:
        raise Corrupt(Check.BLOCK_RANGE, block=start, count=count)
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


def _available(tx: "Transaction", reserve: bool) -> int:
    """Clusters that this caller may still take, at least 1; ``Refused(ENOSPC)`` if there is none."""
    writing = tx.writing
    assert writing is not None
    left = writing.free_clusters - tx.clusters_taken
    kept = 0
    if not reserve:
        kept = statfs.reserved_clusters(tx)
        if not tx.privileged:
            kept += tx.superblock.fields["r_blocks_count"] // tx.geometry.cluster_blocks
    if left - kept < 1:
        raise Refused(errno.ENOSPC)
    return left - kept


# ---- searching -----------------------------------------------------------------------------------------------------

def _search(tx: "Transaction", goal: int, count: int, owner: int) -> tuple[int, int]:
    """(first cluster, how many) of a free run: exactly at the goal, else the first that is long enough in the goal's
    group or one after it, else the longest that was met."""
    assert tx.writing is not None
    found = _round(tx, goal, count, owner)
    if not found[1]:
        tx.writing.windows.clear()
        tx.writing.longest.clear()
        tx.writing.roomy.fill()  # what was remembered may come from transactions that did not apply
        found = _round(tx, goal, count, owner)
    if not found[1]:
        raise CommitFirst if tx.writing.held.count else Refused(errno.ENOSPC)
    return found


def _round(tx: "Transaction", goal: int, count: int, owner: int) -> tuple[int, int]:
    """As ``_search``, with a length of 0 if there is nothing in all groups that are not known as full."""
    per_group = tx.geometry.blocks_per_group // tx.geometry.cluster_blocks
    goal_group, goal_bit = divmod(goal, per_group)
    best, looked, passed = (0, 0), 0, 0
    assert tx.writing is not None
    windows, longest = tx.writing.windows, tx.writing.longest
    for number in _roomy_groups(tx, goal_group):
        passed += 1
        if best[1] and (passed > MOST_GROUPS or looked >= MOST_BITMAPS):
            break
        if min(longest.get(number, count), group.load(tx, number).free_blocks) <= best[1] and number != goal_group:
            continue
        unused = free_bits(tx, number) & ~(tx.held_clusters(number) | windows.mask(number, owner))
        bit, length = _run_near(unused, goal_bit if number == goal_group else None, count)
        if length >= count or (number == goal_group and bit == goal_bit and length):
            return number * per_group + bit, length
        longest[number] = length
        if length > best[1]:
            best = (number * per_group + bit, length)
        looked += 1
    return best


def _roomy_groups(tx: "Transaction", first: int) -> Iterator[int]:
    """The groups that have free clusters, from ``first`` on and round; full ones are not looked at again."""
    assert tx.writing is not None
    roomy, groups = tx.writing.roomy, tx.geometry.groups
    for low, high in ((first, groups), (0, first)):
        number = roomy.next(low, high)
        while number is not None:
            if group.load(tx, number).free_blocks:
                yield number
            else:
                roomy.remove(number)
            number = roomy.next(number + 1, high)


def _run_near(unused: int, goal: int | None, count: int) -> tuple[int, int]:
    """(first bit, length up to ``count``) of the run of set bits that begins at ``goal``, else of one of ``count``
    bits behind it, else anywhere, else of the longest; length 0 where no bit is set."""
    length = _ones(unused >> goal) if goal is not None else 0
    if goal is not None and length:
        return goal, min(length, count)
    starts = _starts(unused, count)
    if not starts:
        return _longest_run(unused)
    behind = starts >> (goal or 0)
    return ((goal or 0) + _lowest(behind) if behind else _lowest(starts)), count


def _ones(bits: int) -> int:
    """How many of the lowest bits are set without a gap."""
    return (~bits & (bits + 1)).bit_length() - 1


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _starts(bits: int, count: int) -> int:
    """Where ``count`` set bits in a row begin, as bits."""
    length = 1
    while length < count and bits:
        step = min(length, count - length)
        bits &= bits >> step
        length += step
    return bits


def _longest_run(bits: int) -> tuple[int, int]:
    """(first bit, length) of the longest row of set bits, the first of them."""
    if not bits:
        return 0, 0
    powers = [bits]  # powers[n]: where rows of 2^n bits begin
    while longer := powers[-1] & powers[-1] >> (1 << len(powers) - 1):
        powers.append(longer)
    starts, length = powers[-1], 1 << len(powers) - 1
    for power in reversed(range(len(powers) - 1)):
        if longer := starts & powers[power] >> length:
            starts, length = longer, length + (1 << power)
    return _lowest(starts), length


# ---- bitmaps -------------------------------------------------------------------------------------------------------

def free_bits(tx: "Transaction", number: int) -> int:
    """The clusters of a group that its bitmap says are free, as the bits of an integer.

    Raises ``Corrupt``: BITMAP_CHECKSUM, BITMAP_MISMATCH if the group's descriptor counts others.
    """
    desc = group.load(tx, number)
    if desc.flags & BLOCK_UNINIT and has_uninit(tx):
        return _counted(number, ~_initial(tx, number) & _all_bits(tx, number), desc.free_blocks)
    if not tx.cache.holds(desc.block_bitmap):
        _read_ahead(tx, number)
    found: int = tx.cache.view(
        desc.block_bitmap, "free",
        lambda data: _counted(number, ~int.from_bytes(data, "little") & _all_bits(tx, number), desc.free_blocks),
        lambda data: verify_bitmap(tx, number, data, "block_bitmap"))
    return found


def _counted(number: int, unused: int, count: int) -> int:
    if unused.bit_count() != count:
        raise Corrupt(Check.BITMAP_MISMATCH, group=number, free=unused.bit_count(), free_in_descriptor=count)
    return unused


def _read_ahead(tx: "Transaction", number: int) -> None:
    """Fetch a group's bitmap together with those of the next groups that lie behind it."""
    first = group.load(tx, number).block_bitmap
    last = min(number + BITMAPS_AHEAD, tx.geometry.groups)
    near = [other for other in range(number, last) if group.load(tx, other).block_bitmap == first + other - number]
    tx.cache.want(range(first, first + len(near)))


def _all_bits(tx: "Transaction", number: int) -> int:
    """A bit for each cluster of a group; the last group may be shorter."""
    geometry = tx.geometry
    blocks = min(geometry.blocks_per_group, geometry.blocks - geometry.first_block_of(number))
    return (1 << -(-blocks // geometry.cluster_blocks)) - 1


def take(tx: "Transaction", first: int, count: int) -> None:
    """Mark free clusters of one group, counted from the first of group 0, as used."""
    per_group = tx.geometry.blocks_per_group // tx.geometry.cluster_blocks
    number, bit = divmod(first, per_group)
    _set_bits(tx, number, bit, count, used=True)
    tx.clusters_taken += count


def _set_bits(tx: "Transaction", number: int, bit: int, count: int, *, used: bool) -> None:
    """Mark clusters of one group, and count them in its descriptor."""
    unused, mask = free_bits(tx, number), ((1 << count) - 1) << bit
    if (unused & mask) != (mask if used else 0) or system_bits(tx, number) & mask:
        raise Corrupt(Check.BITMAP_MISMATCH, group=number, bit=bit, count=count, expected="free" if used else "used")
    entry = _own_bitmap(tx, number)
    first, last = bit // 8, (bit + count - 1) // 8 + 1
    part = ((1 << count) - 1) << (bit - first * 8)
    old = int.from_bytes(entry.data[first:last], "little")
    entry.data[first:last] = (old ^ part).to_bytes(last - first, "little")
    entry.views["free"] = unused ^ mask
    assert tx.writing is not None
    if not used:
        tx.writing.roomy.add(number)
        tx.writing.longest.pop(number, None)
    desc = group.load(tx, number)
    group.change(tx, number, free_blocks=desc.free_blocks + (-count if used else count),
                 flags=desc.flags & ~BLOCK_UNINIT)


def _own_bitmap(tx: "Transaction", number: int) -> "EditedBlock":
    """The bitmap of a group, to be changed together with its view "free"."""
    desc = group.load(tx, number)
    if desc.flags & BLOCK_UNINIT and has_uninit(tx):
        tx.create(desc.block_bitmap)[:] = _initial(tx, number).to_bytes(tx.geometry.block_bytes, "little")
    entry = tx.edit_keeping(desc.block_bitmap)
    tx.seal(desc.block_bitmap, "bitmap", sealed_elsewhere)
    return entry


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


def _initial(tx: "Transaction", number: int) -> int:
    """The used clusters of a group that was never written to, which has no bitmap on disk yet (BLOCK_UNINIT): its
    metadata, and what lies beyond its end."""
    whole = (1 << tx.geometry.block_bytes * 8) - 1
    return whole & ~_all_bits(tx, number) | system_bits(tx, number)


def system_bits(tx: "Transaction", number: int) -> int:
    """The clusters of a group that hold superblock, descriptors, bitmaps or inode tables, its own and others'."""
    assert tx.writing is not None
    known = tx.writing.system_bits
    if number not in known:
        known[number] = _find_system_bits(tx, number)
    return known[number]


def _find_system_bits(tx: "Transaction", number: int) -> int:
    geometry = tx.geometry
    start, ratio = geometry.first_block_of(number), geometry.cluster_blocks
    used = (1 << -(-tx.superblock.head_blocks(number) // ratio)) - 1
    for other in _flex_mates(tx, number):
        desc = group.load(tx, other)
        for first, count in ((desc.block_bitmap, 1), (desc.inode_bitmap, 1),
                             (desc.inode_table, geometry.inode_table_blocks())):
            low, high = max(first - start, 0), min(first + count - start, geometry.blocks_per_group)
            if low < high:
                used |= ((1 << (-(-high // ratio) - low // ratio)) - 1) << (low // ratio)
    return used


def _flex_mates(tx: "Transaction", number: int) -> range:
    """The groups whose metadata may lie in this one: with flex_bg, those of its flexible group."""
    per_flex = 1 << min(tx.superblock.fields["log_groups_per_flex"], 31)
    if Feature.FLEX_BG not in tx.superblock.features or per_flex > MOST_FLEX_GROUPS:
        return range(number, number + 1)
    first = number - number % per_flex
    return range(first, min(first + per_flex, tx.geometry.groups))
