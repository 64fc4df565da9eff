"""Fast commits applied: what their records say, done in transactions on top of the last full commit.

Kernel documentation, ext4, "Fast commits".  A record names the result of an operation, not the operation: an inode as
it shall be, where file blocks are, which name leads where.  ``FastReplay`` turns the records into steps, each of which
is run in a transaction of its own; the caller makes the batches durable.

I1  The steps end in the same tree when they are run again from the first on, whatever part of them was durable before:
    a name that is there is not entered again, a file is known by number and generation.
I2  Link counts follow the names that come and go here.  A file that lost its last name is freed at the end only, as an
    orphan: a later record may name it again.
I3  Blocks that records map are given to nothing else (``Held``), whether or not a bitmap says that they are used.
I4  In the end all that changed inodes map is used in the bitmaps, and counted as theirs.  The records do not name the
    nodes of extent trees nor the blocks of directories: those are allocated anew.

Directories are only named, never described: their times become those of the replay, as in the kernel.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from . import (
    alloc,
    blockmap,
    dirspace,
    dirstore,
    extents,
    extentstore,
    group,
    inode,
    inodealloc,
    inodefree,
    inodestore,
    iomap,
    mapping,
    mapstore,
    namestore,
    orphan,
)
from .errors import Check, Corrupt
from .extents import END_OF_FILE_BLOCKS, Run
from .fastcommit import AddRange, Change, Create, DelRange, InodeImage, Link, Unlink
from .inode import FLAG_EXTENTS, FLAG_INDEX, Inode
from .namespace import FAST_SYMLINK_BYTES
from .units import ROOT_INODE, SECTOR_BYTES, InodeNumber

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .transaction import Transaction

PIECES_AT_ONCE = 16         # extents changed in one transaction, or runs of a block map looked at
TABLE_ZEROED = 4            # flag of a group: its inode table holds nothing that was never written
EMPTY_DIRECTORY_LINKS = 2
_GENERATION_AT = 0x64

Step = Callable[["Transaction", int], int | None]
"""Part of the work.  It gets the place that it returned last, 0 at first, and returns None when there is no more."""


class FastReplay:
    """The work of applying records, on a file system that is being changed by nobody else."""

    def __init__(self, fs: "Ext4", changes: Iterable[Change]) -> None:
        assert fs.writing is not None
        self._fs, self._held, self._changes = fs, fs.writing.held, changes
        self._claims = [(start - fs.geometry.first_data_block, count) for start, count in _joined(changes)]
        self._links: dict[int, int | None] = {}     # inode → its count as last described, None if names changed since
        self._mapped: dict[int, _Mapped] = {}       # inodes whose blocks may have changed
        self._claim()

    def steps(self) -> Iterator[Step]:
        """The work in order.  The iterator reads the records as it goes; it may raise their errors."""
        for change in self._changes:
            self._note(change)
            yield partial(_STEPS[type(change)], change)
        for number, mapped in self._mapped.items():
            yield partial(_walk, number, mapped)
        for number, links in self._links.items():
            yield partial(_settle, number, links, self._mapped.get(number))

    def claim_again(self) -> None:
        """After a batch became durable: what it freed is no longer held, but what records map must be."""
        self.release()
        self._claim()

    def release(self) -> None:
        """The work is done and durable: the bitmaps tell what is used."""
        for first, count in self._claims:
            self._held.remove(first, count)

    def _claim(self) -> None:
        for first, count in self._claims:
            self._held.add(first, count)

    def _note(self, change: Change) -> None:
        if isinstance(change, InodeImage):
            self._links[change.inode] = inode.decode(self._fs, InodeNumber(change.inode), _padded(
                self._fs, change.raw)).links
        elif not isinstance(change, AddRange | DelRange):
            self._links[change.inode] = None
            return
        self._mapped.setdefault(change.inode, _Mapped())


class _Mapped:
    """What a walk has found an inode to own."""

    def __init__(self) -> None:
        self.blocks = 0
        self.nodes: set[int] = set()

    def add(self, blocks: int, nodes: Iterable[int]) -> None:
        self.blocks += blocks
        self.nodes.update(nodes)


def _joined(changes: Iterable[Change]) -> list[tuple[int, int]]:
    """The blocks that records map, as runs of (first, count) that do not overlap."""
    runs: list[tuple[int, int]] = []
    for start, count in sorted((change.start, change.length) for change in changes if isinstance(change, AddRange)):
        if runs and start <= sum(runs[-1]):
            runs[-1] = runs[-1][0], max(runs[-1][1], start + count - runs[-1][0])
        else:
            runs.append((start, count))
    return runs


# ---- inodes --------------------------------------------------------------------------------------------------------

def _image(change: InodeImage, tx: "Transaction", _at: int) -> int | None:
    """Store an inode as it is described, with the blocks that it has: ranges tell of those."""
    number = _ordinary(tx, change.inode)
    block, offset = inodestore.place(tx, number)
    size = tx.geometry.inode_bytes
    old = None
    if is_used(tx, number):
        old = _as_it_stands(tx, number, block, offset)
        if old.generation != int.from_bytes(change.raw[_GENERATION_AT:_GENERATION_AT + 4], "little"):
            return _discard(tx, old)
    new = inode.decode(tx, number, change.raw + (_padded(tx, b"") if old is None else old.raw)[len(change.raw):])
    if old is None:
        _take_number(tx, number, new.is_dir)
    entry = tx.edit_keeping(block)
    entry.data[offset:offset + size] = new.raw
    entry.views.pop(number, None)
    inodestore.change(tx, new, **_kept(tx, old, new))
    return None


def _as_it_stands(tx: "Transaction", number: InodeNumber, block: int, offset: int) -> Inode:
    """The inode in a place, its checksum not looked at: a replay of the kernel's that was cut off leaves wrong ones."""
    entry = tx.cache.entry(block)
    known: Inode | None = entry.views.get(number)
    raw = bytes(entry.data[offset:offset + tx.geometry.inode_bytes])
    return inode.decode(tx, number, raw) if known is None else known


def _padded(fs: "Ext4", raw: bytes) -> bytes:
    return raw.ljust(fs.geometry.inode_bytes, b"\0")


def _discard(tx: "Transaction", old: Inode) -> int:
    """The number belongs to another file now: free the one that has it, then start again."""
    if old.links:
        old = inodestore.change(tx, old, links=0)
    inodefree.release(tx, old)
    return 0


def _kept(tx: "Transaction", old: Inode | None, new: Inode) -> dict[str, object]:
    """The fields in which a described inode is what it was, or what a new one is."""
    listed = tx.writing.orphans.get(new.number, 0) < 0 if tx.writing is not None else False
    own = tx.geometry.cluster_sectors() if new.file_acl else 0
    fields: dict[str, object] = {"dtime": orphan.next_of(old) if old is not None and listed else 0,
                                 "links": 0 if old is None else old.links,
                                 "sectors": own if old is None else old.sectors}
    if not new.is_inline and (new.is_regular or new.is_dir or _is_long_link(new)):
        fields["block"] = _block_array(old, new)
    if new.is_dir:
        flags = 0 if old is None else old.flags & FLAG_INDEX
        fields |= {"size": 0 if old is None else old.size, "flags": new.flags & ~FLAG_INDEX | flags}
    return fields


def _is_long_link(new: Inode) -> bool:
    return new.is_symlink and (new.has_extents or new.size >= FAST_SYMLINK_BYTES)


def _block_array(old: Inode | None, new: Inode) -> bytes:
    if new.has_extents:
        valid = old is not None and old.block[:2] == extents.MAGIC.to_bytes(2, "little")
        return old.block if old is not None and valid else extentstore.empty_root()
    return bytes(len(new.block)) if old is None or old.flags & FLAG_EXTENTS else old.block


def is_used(tx: "Transaction", number: int) -> bool:
    """Whether the bitmap says that an inode is in use."""
    in_group, index = tx.geometry.group_of_inode(number)
    raw = inodealloc.bitmap(tx, in_group, group.load(tx, in_group))
    return bool(raw[index // 8] >> index % 8 & 1)


def _take_number(tx: "Transaction", number: int, is_dir: bool) -> None:
    """Mark an inode as used.  Those before it that were never written become zero: they count as initialised then."""
    in_group, index = tx.geometry.group_of_inode(number)
    desc = group.load(tx, in_group)
    if alloc.has_uninit(tx) and not desc.flags & TABLE_ZEROED:
        for never in range(tx.geometry.inodes_per_group - desc.itable_unused, index):
            block, offset = inodestore.place(tx, number - index + never)
            tx.edit_keeping(block).data[offset:offset + tx.geometry.inode_bytes] = bytes(tx.geometry.inode_bytes)
    inodealloc.mark(tx, in_group, index, is_dir, used=True)


def _ordinary(tx: "Transaction", number: int) -> InodeNumber:
    """The number, if files can have it.  Raises ``Corrupt(FASTCOMMIT_RECORD)``."""
    if number < tx.superblock.first_inode or number in tx.superblock.special_inodes:
        raise Corrupt(Check.FASTCOMMIT_RECORD, inode=number, first_inode=tx.superblock.first_inode)
    return InodeNumber(number)


def _file(tx: "Transaction", number: int) -> Inode | None:
    """The inode with a number that files can have, None if it is not in use: then it was removed since."""
    return tx.inode(number) if is_used(tx, _ordinary(tx, number)) else None


# ---- ranges --------------------------------------------------------------------------------------------------------

def _add_range(change: AddRange, tx: "Transaction", at: int) -> int | None:
    """Map file blocks to where they shall be, some extents at a time; ``at`` counts blocks of the range."""
    of = _file(tx, change.inode)
    if of is None:
        return None
    if change.unwritten and not of.has_extents:
        raise Corrupt(Check.FASTCOMMIT_RECORD, inode=change.inode, unwritten=True)
    for _ in range(PIECES_AT_ONCE):
        if at >= change.length:
            return None
        here = iomap.find(tx, of, change.file_block + at)
        count = min(here.file_block + here.length - change.file_block, change.length) - at
        piece = Run(change.file_block + at, count, change.start + at, change.unwritten)
        of, done = _map(tx, of, here, piece)
        at += done
    return at


def _map(tx: "Transaction", of: Inode, here: Run, piece: Run) -> tuple[Inode, int]:
    """Map a piece where a hole or one extent is now; how many of its blocks are mapped then."""
    assert piece.start is not None
    end = piece.file_block + piece.length
    if here.start is not None:
        if here.start + piece.file_block - here.file_block != piece.start:
            return mapping.unmap(tx, of, piece.file_block, end)[0], 0
        if here.unwritten == piece.unwritten:
            return of, piece.length
        of, reached = extentstore.convert(tx, of, piece.file_block, end, unwritten=piece.unwritten)
        return of, reached - piece.file_block
    mark_used(tx, piece.start, piece.length)
    if of.has_extents:
        return extentstore.insert(tx, extentstore.counted(tx, of, piece.length), piece, reserve=True), piece.length
    return mapstore.insert(tx, of, piece.file_block, piece.start, piece.length, reserve=True), piece.length


def _delete_range(change: DelRange, tx: "Transaction", _at: int) -> int | None:
    """Unmap file blocks, as many as one transaction should."""
    of = _file(tx, change.inode)
    if of is None or not change.length:
        return None
    return None if mapping.unmap(tx, of, change.file_block, change.file_block + change.length)[1] else 0


def mark_used(tx: "Transaction", start: int, count: int) -> None:
    """Mark blocks as used, those that are already left as they are.

    Raises ``Corrupt(FASTCOMMIT_RECORD)`` for blocks that hold metadata of the file system itself.
    """
    per_group = tx.geometry.blocks_per_group
    first = start - tx.geometry.first_data_block
    while count:
        number, bit = divmod(first, per_group)
        length = min(count, per_group - bit)
        mask = ((1 << length) - 1) << bit
        if alloc.system_bits(tx, number) & mask:
            raise Corrupt(Check.FASTCOMMIT_RECORD, group=number, bit=bit, count=length)
        unused = alloc.free_bits(tx, number) & mask
        while unused:
            low = (unused & -unused).bit_length() - 1
            run = ((~unused >> low) & -(~unused >> low)).bit_length() - 1
            alloc.take(tx, number * per_group + low, run)
            unused &= ~(((1 << run) - 1) << low)
        first, count = first + length, count - length


# ---- names ---------------------------------------------------------------------------------------------------------

def _create(change: Create, tx: "Transaction", _at: int) -> int | None:
    """The first name of an inode that was described before; a directory becomes one."""
    parent, child = _directory(tx, change.parent), _file(tx, change.inode)
    if parent is None or child is None:
        return None
    if child.is_dir:
        if not child.size:
            child = dirstore.start(tx, child, parent.number)
        elif dirstore.parent_of(tx, child) != parent.number:
            raise Corrupt(Check.FASTCOMMIT_RECORD, inode=child.number, parent=parent.number)
    _enter(tx, parent, child, change.name)
    return None


def _link(change: Link, tx: "Transaction", _at: int) -> int | None:
    """A further name, or the new one of a file that was renamed.  A directory has the file's number since (I1)."""
    parent, child = _directory(tx, change.parent), _file(tx, change.inode)
    if parent is not None and child is not None and not child.is_dir:
        _enter(tx, parent, child, change.name)
    return None


def _unlink(change: Unlink, tx: "Transaction", _at: int) -> int | None:
    """A name goes, if it leads where it did then."""
    _ordinary(tx, change.inode)
    parent = _directory(tx, change.parent)
    found = None if parent is None else dirstore.locate(tx, parent, change.name)
    if parent is not None and found is not None and found.entry.inode == change.inode:
        dirstore.remove(tx, parent, found)
        _lose_name(tx, parent.number, change.inode)
    return None


def _directory(tx: "Transaction", number: int) -> Inode | None:
    """The directory with a number, None if it was removed since."""
    if number == ROOT_INODE:
        return tx.inode(number)
    found = _file(tx, number)
    return found if found is not None and found.is_dir and found.links else None


def _enter(tx: "Transaction", parent: Inode, child: Inode, name: bytes) -> None:
    """Let a name lead to an inode.  Where it led elsewhere, that is what later records will bring about again."""
    if child.number == parent.number:
        raise Corrupt(Check.FASTCOMMIT_RECORD, inode=child.number, parent=parent.number)
    found = dirstore.locate(tx, parent, name)
    if found is not None and found.entry.inode == child.number:
        if not child.links:
            inodestore.change(tx, child, links=_least_links(tx, child))
        return
    if found is None:
        dirstore.add(tx, parent, name, child.number, child.mode)
    else:
        dirstore.replace(tx, parent, found, child.number, child.mode)
        _lose_name(tx, parent.number, found.entry.inode)
    child = tx.inode(child.number)
    if child.is_dir:
        namestore.count_subdirectory(tx, tx.inode(parent.number), 1)
        child = tx.inode(child.number)
    inodestore.change(tx, child, links=child.links + 1 if child.links and not child.is_dir else _least_links(tx, child))


def _least_links(tx: "Transaction", child: Inode) -> int:
    """The link count of an inode with one name."""
    if not child.is_dir:
        return 1
    names = (name for block in range(tx.geometry.blocks_for(child.size))
             for name in dirspace.names(tx, child, block).entries if name.name not in (b".", b".."))
    return EMPTY_DIRECTORY_LINKS + sum(1 for name in names if tx.inode(name.inode).is_dir)


def _lose_name(tx: "Transaction", parent: int, number: int) -> None:
    """An inode has a name in a directory less."""
    if not is_used(tx, _ordinary(tx, number)):
        return
    child = tx.inode(number)
    if child.is_dir:
        namestore.count_subdirectory(tx, tx.inode(parent), -1)
        child = tx.inode(number)
    inodestore.change(tx, child, links=0 if child.is_dir else max(child.links - 1, 0), ctime=tx.now)


# ---- in the end ----------------------------------------------------------------------------------------------------

def _walk(number: int, mapped: _Mapped, tx: "Transaction", at: int) -> int | None:
    """Mark as used what an inode maps, a leaf of its tree at a time, from file block ``at`` on (I4)."""
    of = _file(tx, number)
    if of is None or of.is_inline or not (of.is_regular or of.is_dir or _is_long_link(of)):
        return None
    runs, nodes, next_at = _leaf(tx, of, at) if of.has_extents else _pointers(tx, of, at)
    for start, count in (*runs, *((node, 1) for node in nodes)):
        mark_used(tx, start, count)
    tx.after_commit(partial(mapped.add, sum(count for _, count in runs), nodes))
    return next_at


def _leaf(tx: "Transaction", of: Inode, at: int) -> tuple[list[tuple[int, int]], list[int], int | None]:
    """(runs of blocks, nodes on the way, the next place) of the leaf for a file block."""
    path = extentstore.path_to(tx, of, at)
    leaf = path[-1].node
    nodes = [step.block for step in path if step.block is not None]
    return list(zip(leaf.starts, leaf.counts, strict=True)), nodes, (
        leaf.end if leaf.end < END_OF_FILE_BLOCKS and leaf.end > at else None)


def _pointers(tx: "Transaction", of: Inode, at: int) -> tuple[list[tuple[int, int]], list[int], int | None]:
    """The same for a block map, some runs at a time."""
    runs, nodes, largest = [], set[int](), mapstore.largest(tx)
    for _ in range(PIECES_AT_ONCE):
        run = blockmap.find(tx, of, at)
        if run.start is not None:
            runs.append((run.start, run.length))
            nodes.update(_pointer_blocks(tx, of, at))
        at = run.file_block + run.length
        if at >= largest:
            return runs, list(nodes), None
    return runs, list(nodes), at


def _pointer_blocks(tx: "Transaction", of: Inode, file_block: int) -> Iterator[int]:
    data, indexes = of.block, mapstore.indexes(tx, file_block)
    for index in indexes[:-1]:
        block = int.from_bytes(data[index * 4:index * 4 + 4], "little")
        yield block
        data = tx.cache.read(block)


def _settle(number: int, links: int | None, mapped: _Mapped | None, tx: "Transaction", _at: int) -> int | None:
    """The counts of an inode that records were about; without names it is an orphan from here on."""
    of = _file(tx, number)
    if of is None:
        return None
    if mapped is not None:
        blocks = mapped.blocks + len(mapped.nodes) + (1 if of.file_acl else 0)
        of = inodestore.change(tx, of, sectors=blocks * (tx.geometry.block_bytes // SECTOR_BYTES))
    if links and not of.is_dir and of.links != links:
        of = inodestore.change(tx, of, links=links)
    if not of.links:
        orphan.add(tx, number)
    return None


_STEPS: dict[type[Change], Callable[..., int | None]] = {
    InodeImage: _image, AddRange: _add_range, DelRange: _delete_range, Create: _create, Link: _link, Unlink: _unlink}
