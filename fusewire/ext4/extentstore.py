"""Changing extent trees: mapping blocks, marking them written, unmapping them.

Every change rewrites one leaf and lets the consequences rise: a leaf that became too full is split, one that became
empty is freed, and an index always holds the first file block of its child (which the kernel checks).  A tree whose
root could hold what its only child holds becomes lower.
Kernel documentation, ext4, "Extent Tree".

Blocks for nodes come from the reserve (``alloc.allocate``) where the change must not fail: when data that were written
become visible, and when blocks are freed.
"""

import errno
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from . import alloc, checksum, extents, inodestore, layout
from .errors import Check, Corrupt, Refused
from .extents import MAX_DEPTH, MAX_WRITTEN, Node, Run
from .inode import Inode
from .units import SECTOR_BYTES

if TYPE_CHECKING:
    from .transaction import Transaction

MAX_UNWRITTEN = MAX_WRITTEN - 1     # a length of 32768 is the longest written extent, so unwritten ones end below
HEADER_BYTES, ENTRY_BYTES, TAIL_BYTES = 12, 12, 4
ROOT_ENTRIES = 4
LEAVES_AT_ONCE = 16                 # that one transaction converts; each may cost some nodes and their bitmaps
_EXTENT = struct.Struct("<IHHI")
_INDEX = struct.Struct("<IIHH")
_HEADER = layout.EXTENT_HEADER.struct
_EMPTY = _HEADER.pack(extents.MAGIC, 0, ROOT_ENTRIES, 0, 0)


class Step(NamedTuple):
    """One node on the way from the root to a leaf: its block (None: the root), and which of its entries was taken."""

    block: int | None
    node: Node
    taken: int


def insert(tx: "Transaction", inode: Inode, run: Run, *, reserve: bool = False) -> Inode:
    """Map a hole: ``run`` (with a start) joins the tree, merged with the extents that it continues."""
    path = path_to(tx, inode, run.file_block)
    return _change(tx, inode, path, run.file_block, run.file_block + run.length, lambda near: [*near, run], reserve)


def convert(tx: "Transaction", inode: Inode, first: int, end: int, *, unwritten: bool) -> tuple[Inode, int]:
    """Mark what is mapped of file blocks [first, end) as written, or as unwritten; holes stay holes.

    Returns the inode and the file block up to which it is done: not all, if that were too much for one transaction.
    """
    for _ in range(LEAVES_AT_ONCE):
        if first >= end:
            break
        path = path_to(tx, inode, first)
        stop = min(end, path[-1].node.end)
        inode = _change(tx, inode, path, first, stop,
                        partial(_all_converted, first=first, end=stop, unwritten=unwritten), reserve=True)
        first = stop
    return inode, first


def unmap(tx: "Transaction", inode: Inode, first: int, end: int, budget: int) -> tuple[Inode, bool]:
    """Free the blocks of file blocks [first, end), from the end on, about ``budget`` extents in this transaction.

    An extent counts once for each group that it is as long as.  Returns the inode and whether all is done.
    """
    while budget > 0:
        path = path_to(tx, inode, end - 1)
        leaf = path[-1].node
        below = bisect_left(leaf.firsts, end)
        lowest, cost = _share(tx, _runs(leaf, max(below - budget - 1, 0), below), max(first, _first_of(path)), end,
                              budget)
        budget -= cost
        freed = sum(_free_cut(tx, run, lowest, end) for run in _runs(leaf, *_near(leaf, lowest, end)))
        if freed:
            inode = counted(tx, inode, -freed)
            inode = _change(tx, inode, path, lowest, end, partial(_all_cut, first=lowest, end=end), reserve=True)
        if lowest <= first:
            return inode, True
        end = lowest
    return inode, False


def _share(tx: "Transaction", runs: list[Run], first: int, end: int, budget: int) -> tuple[int, int]:
    """How far down file blocks [first, end) of a leaf can be freed for so much, and what that costs.

    ``runs`` are those below ``end``, or the last ones of them that the budget cannot be enough for.
    """
    per_group, spent = tx.geometry.blocks_per_group, 0
    for run in reversed(runs):
        low, high = max(run.file_block, first), min(run.file_block + run.length, end)
        cost = -(-(high - low) // per_group)
        if cost > budget - spent:
            return high - (budget - spent) * per_group, budget
        spent += max(cost, 0)
    return first, max(spent, 1)


def empty_root() -> bytes:
    """The block array of a new inode that maps by extents."""
    return _EMPTY.ljust(60, b"\0")


def is_empty(inode: Inode) -> bool:
    """Whether the root of an inode's extents has no entry."""
    return inode.block.startswith(_EMPTY)


def path_to(tx: "Transaction", inode: Inode, file_block: int) -> list[Step]:
    """The nodes from the root to the leaf that holds a file block, or would; its neighbours in the leaf, too."""
    node, block, path = extents.root_of(tx, inode), None, []
    if node.depth and not node.firsts:
        raise Corrupt(Check.EXTENT_ENTRIES, inode=inode.number, depth=node.depth, entries=0)
    while node.depth:
        index = max(bisect_right(node.firsts, file_block) - 1, 0)
        path.append(Step(block, node, index))
        block = node.starts[index]
        node = extents.child_of(tx, inode, node, index)
    return [*path, Step(block, node, 0)]


def _first_of(path: list[Step]) -> int:
    """The file block from which on the leaf of a path is responsible."""
    first = 0
    for step in path[:-1]:
        if step.taken:
            first = step.node.firsts[step.taken]
    return first


def _near(leaf: Node, first: int, end: int) -> tuple[int, int]:
    """The entries [low, high) of a leaf that overlap file blocks [first, end), or that a change there may join."""
    return (max(bisect_right(leaf.firsts, first) - 2, 0), min(bisect_left(leaf.firsts, end) + 1, len(leaf.firsts)))


def _runs(leaf: Node, low: int, high: int) -> list[Run]:
    return [Run(*row) for row in zip(leaf.firsts[low:high], leaf.counts[low:high], leaf.starts[low:high],
                                     leaf.unwritten[low:high], strict=True)]


def _change(tx: "Transaction", inode: Inode, path: list[Step], first: int, end: int,
            change: Callable[[list[Run]], list[Run]], reserve: bool) -> Inode:
    """Give what a leaf holds of file blocks [first, end), and what is beside them, a new form; neighbours join."""
    low, high = _near(path[-1].node, first, end)
    old = _runs(path[-1].node, low, high)
    new = _merged(change(old))
    return inode if new == old else _store_leaf(tx, inode, path, (low, high), new, first, reserve)


def _merged(runs: list[Run]) -> list[Run]:
    """The runs in order, each joined to the one before it that it continues."""
    result: list[Run] = []
    for run in sorted(runs):
        last = result[-1] if result else None
        most = MAX_UNWRITTEN if run.unwritten else MAX_WRITTEN
        if (last is not None and last.start is not None and last.unwritten == run.unwritten
                and last.file_block + last.length == run.file_block and last.start + last.length == run.start
                and last.length + run.length <= most):
            result[-1] = last._replace(length=last.length + run.length)
        else:
            result.append(run)
    return result


def _part(run: Run, first: int, end: int) -> Run:
    assert run.start is not None
    return Run(first, end - first, run.start + first - run.file_block, run.unwritten)


def _cut(run: Run, first: int, end: int) -> list[Run]:
    """What is left of a run without file blocks [first, end)."""
    stop = run.file_block + run.length
    if end <= run.file_block or first >= stop:
        return [run]
    left = [_part(run, run.file_block, first)] if run.file_block < first else []
    return left + ([_part(run, end, stop)] if end < stop else [])


def _all_cut(runs: list[Run], first: int, end: int) -> list[Run]:
    return [part for run in runs for part in _cut(run, first, end)]


def _all_converted(runs: list[Run], first: int, end: int, unwritten: bool) -> list[Run]:
    return [part for run in runs for part in _converted(run, first, end, unwritten)]


def _converted(run: Run, first: int, end: int, unwritten: bool) -> list[Run]:
    stop = run.file_block + run.length
    low, high = max(first, run.file_block), min(end, stop)
    if low >= high or run.unwritten == unwritten:
        return [run]
    middle = _part(run, low, high)._replace(unwritten=unwritten)
    pieces = [middle]
    if unwritten and middle.length > MAX_UNWRITTEN:
        pieces = [_part(middle, low, low + MAX_UNWRITTEN), _part(middle, low + MAX_UNWRITTEN, high)]
    return sorted(_cut(run, low, high) + pieces)


def _free_cut(tx: "Transaction", run: Run, first: int, end: int) -> int:
    """Give back what a run has in file blocks [first, end); how many blocks."""
    low, high = max(first, run.file_block), min(end, run.file_block + run.length)
    if low >= high:
        return 0
    part = _part(run, low, high)
    assert part.start is not None
    alloc.free(tx, part.start, part.length)
    return part.length


def counted(tx: "Transaction", inode: Inode, blocks: int) -> Inode:
    """The inode with so many more blocks counted as its own (fewer, if negative)."""
    if not blocks:
        return inode
    per_block = tx.geometry.block_bytes // SECTOR_BYTES
    return inodestore.change(tx, inode, sectors=inode.sectors + blocks * per_block)


def _store_leaf(tx: "Transaction", inode: Inode, path: list[Step], span: tuple[int, int], runs: list[Run], at: int,
                reserve: bool) -> Inode:
    """Put runs in place of the entries [low, high) of a leaf.  See ``_store`` for ``at``."""
    step, (low, high) = path[-1], span
    rows = bytearray(_entries_of(tx, inode, step))
    rows[low * ENTRY_BYTES:high * ENTRY_BYTES] = b"".join(
        _EXTENT.pack(run.file_block, run.length + MAX_WRITTEN if run.unwritten else run.length,
                     (run.start or 0) >> 32, (run.start or 0) & 0xFFFFFFFF) for run in runs)
    if step.block is not None and _stays_leaf(tx, step.node, rows):
        _write_node(tx, inode, step.block, 0, rows)
        key = extents.view_key(inode, 0, path[-2].node.firsts[path[-2].taken], step.node.end)
        tx.cache.entry(step.block).views[key] = _replaced(step.node, low, high, runs)
        return inode
    split = [bytes(rows[start:start + ENTRY_BYTES]) for start in range(0, len(rows), ENTRY_BYTES)]
    return _lowered(tx, _store(tx, inode, path, split, at, reserve))


def _entries_of(tx: "Transaction", inode: Inode, step: Step) -> bytes:
    """The entries of a node as they are stored."""
    data = inode.block if step.block is None else tx.cache.entry(step.block).data
    return bytes(data[HEADER_BYTES:HEADER_BYTES + len(step.node.firsts) * ENTRY_BYTES])


def _stays_leaf(tx: "Transaction", leaf: Node, rows: bytearray) -> bool:
    """Whether these entries of a leaf concern nobody else: they fit, begin as before, and do not fit into the root."""
    return ROOT_ENTRIES < len(rows) // ENTRY_BYTES <= node_entries(tx) and _first_block(rows) == leaf.firsts[0]


def _replaced(leaf: Node, low: int, high: int, runs: list[Run]) -> Node:
    """A leaf with runs in place of its entries [low, high)."""
    return Node(0, leaf.firsts[:low] + [run.file_block for run in runs] + leaf.firsts[high:],
                leaf.starts[:low] + [run.start or 0 for run in runs] + leaf.starts[high:],
                leaf.counts[:low] + [run.length for run in runs] + leaf.counts[high:],
                leaf.unwritten[:low] + [run.unwritten for run in runs] + leaf.unwritten[high:], leaf.end)


def _lowered(tx: "Transaction", inode: Inode) -> Inode:
    """The inode with a lower tree, as long as the only child of the root has entries that fit into the root."""
    root = extents.root_of(tx, inode)
    while root.depth and len(root.starts) == 1:
        block, child = root.starts[0], extents.child_of(tx, inode, root, 0)
        if len(child.firsts) > ROOT_ENTRIES:
            break
        rows = tx.cache.read(block)[HEADER_BYTES:HEADER_BYTES + len(child.firsts) * ENTRY_BYTES]
        alloc.free(tx, block, 1, metadata=True)
        inode = counted(tx, _with_root(tx, inode, child.depth, rows), -1)
        root = extents.root_of(tx, inode)
    return inode


def _index_row(first: int, block: int) -> bytes:
    return _INDEX.pack(first, block & 0xFFFFFFFF, block >> 32, 0)


def _index_rows(step: Step) -> list[bytes]:
    return [_index_row(first, block) for first, block in zip(step.node.firsts, step.node.starts, strict=True)]


def _first_block(row: bytes | bytearray) -> int:
    return int.from_bytes(row[:4], "little")


def _store(tx: "Transaction", inode: Inode, path: list[Step], rows: list[bytes], at: int, reserve: bool) -> Inode:
    """Give the last node of a path new entries, and let its parent know: the node may be split, freed, or grow a level.

    ``at`` is the file block around which the change happened: a node that overflows at its end is split there, so
    that files written in order fill their nodes.
    """
    step, above = path[-1], path[:-1]
    if step.block is None:
        return _store_root(tx, inode, step.node.depth, rows, reserve)
    parent, taken = _index_rows(above[-1]), above[-1].taken
    if not rows:
        alloc.free(tx, step.block, 1, metadata=True)
        inode = counted(tx, inode, -1)
        del parent[taken]
        return _store(tx, inode, above, parent, at, reserve)
    first, *others = _shares(rows, node_entries(tx), at)
    _write_node(tx, inode, step.block, step.node.depth, b"".join(first))
    row = _index_row(_first_block(first[0]), step.block)
    if not others and row == parent[taken]:
        return inode
    parent[taken] = row
    for position, share in enumerate(others, taken + 1):
        inode, block = _new_node(tx, inode, step.block, step.node.depth, share, reserve)
        parent.insert(position, _index_row(_first_block(share[0]), block))
    return _store(tx, inode, above, parent, at, reserve)


def _shares(rows: list[bytes], fits: int, at: int) -> list[list[bytes]]:
    """The entries for one node, or as many as are needed: full ones if it overflowed at its end, else equal ones."""
    nodes = -(-len(rows) // fits)
    most = fits if _first_block(rows[-1]) <= at else -(-len(rows) // nodes)
    return [rows[start:start + most] for start in range(0, len(rows), most)]


def _store_root(tx: "Transaction", inode: Inode, depth: int, rows: list[bytes], reserve: bool) -> Inode:
    """The root holds four entries; with more it becomes the parent of one node that holds them all."""
    if len(rows) > ROOT_ENTRIES:
        if depth >= MAX_DEPTH:
            raise Refused(errno.EFBIG)
        inode, block = _new_node(tx, inode, _goal(tx, inode), depth, rows, reserve)
        rows, depth = [_index_row(_first_block(rows[0]), block)], depth + 1
    return _with_root(tx, inode, depth if rows else 0, b"".join(rows))


def _with_root(tx: "Transaction", inode: Inode, depth: int, rows: bytes) -> Inode:
    header = _HEADER.pack(extents.MAGIC, len(rows) // ENTRY_BYTES, ROOT_ENTRIES, depth, 0)
    return inodestore.change(tx, inode, block=(header + rows).ljust(60, b"\0"))


def _goal(tx: "Transaction", inode: Inode) -> int:
    return tx.geometry.first_block_of(tx.geometry.group_of_inode(inode.number)[0])


def _new_node(tx: "Transaction", inode: Inode, goal: int, depth: int, rows: list[bytes],
              reserve: bool) -> tuple[Inode, int]:
    block = alloc.allocate(tx, goal, 1, reserve=reserve).start
    tx.create(block)
    _write_node(tx, inode, block, depth, b"".join(rows))
    return counted(tx, inode, 1), block


def node_entries(tx: "Transaction") -> int:
    """How many entries fit into a node that has a block of its own."""
    return (tx.geometry.block_bytes - HEADER_BYTES - TAIL_BYTES) // ENTRY_BYTES


def _write_node(tx: "Transaction", inode: Inode, block: int, depth: int, rows: bytes | bytearray) -> None:
    data, fits = tx.edit(block), node_entries(tx)
    data[:HEADER_BYTES] = _HEADER.pack(extents.MAGIC, len(rows) // ENTRY_BYTES, fits, depth, 0)
    data[HEADER_BYTES:HEADER_BYTES + fits * ENTRY_BYTES] = rows.ljust(fits * ENTRY_BYTES, b"\0")
    if tx.has_checksums:
        seed = tx.seed_of(inode)
        tx.seal(block, "extents", lambda raw, _read: checksum.seal_extent_block(raw, seed))
