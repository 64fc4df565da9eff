"""Orphans: inodes that have no name any more but are still in use, and files that are being cut.

Whoever recovers a file system frees the former and finishes cutting the latter.  They are noted in the orphan file
(feature orphan_file; kernel documentation, ext4, "Orphan file"), or on a list that starts in the superblock
(``last_orphan``) and goes on through the inodes' ``dtime``; also when the orphan file is full.

I1  ``Writing.orphans`` has every orphan as key.  Its value is a hint to where it is noted: a slot of the orphan file,
    or (negative, less one) the inode before it on the list.
I2  Hints are compared with the disk before they are used; a wrong one costs a search.
"""

from collections.abc import Container, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from . import checksum, inode, inodestore, iomap, layout, superstore
from .batch import Writing
from .blocks import BlockMiss
from .errors import Check, Corrupt
from .features import Feature
from .inode import Inode

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .transaction import Transaction

MAGIC = 0x0B10CA04
TAIL_BYTES = 8
WORD_BYTES = 4
MOST_LISTED = 1 << 20       # more files than a system has open
MAX_FILE_BLOCKS = 512       # the kernel refuses a longer orphan file
_DTIME_AT = layout.INODE.offsets["dtime"]
_FREE = bytes(WORD_BYTES)


def add(tx: "Transaction", number: int, **fields: Any) -> Inode:
    """Note an inode as orphan (again, without effect) and store ``fields`` as ``inodestore.change``.

    Returns the inode as it is then.
    """
    if contains(tx, number):
        return _changed(tx, number, fields)
    slot = _enter_file(tx, number) if Feature.ORPHAN_FILE in tx.superblock.features else None
    if slot is None:
        found = _push(tx, number, fields)
    else:
        found = _changed(tx, number, fields)
        tx.after_commit(partial(_writing(tx).orphans.__setitem__, number, slot))
    _mark(tx, number, True)
    return found


def remove(tx: "Transaction", number: int, **fields: Any) -> Inode:
    """An inode is no orphan any more; ``fields`` are stored as by ``inodestore.change``.  It as it is then.

    Raises ``Corrupt(ORPHAN_LIST)`` if it is not noted where it should be.
    """
    hint = _writing(tx).orphans.get(number)
    if hint is not None and hint < 0:
        listed = _unlink(tx, number, -1 - hint)
        gone = listed or _leave_file(tx, number, None)
    else:
        listed = not _leave_file(tx, number, hint)
        gone = not listed or _unlink(tx, number, 0)
    if not gone:
        raise Corrupt(Check.ORPHAN_LIST, orphan=number, noted=False)
    tx.after_commit(partial(_forget, _writing(tx).orphans, number))
    _mark(tx, number, False)
    return _changed(tx, number, {"dtime": 0, **fields} if listed else fields)


def _changed(tx: "Transaction", number: int, fields: dict[str, Any]) -> Inode:
    found = inode.load(tx, number)
    return inodestore.change(tx, found, **fields) if fields else found


def contains(tx: "Transaction", number: int) -> bool:
    """Whether an inode is noted as orphan."""
    here = tx.cache.entry(inodestore.place(tx, number)[0]).views.get(("orphan", number))
    return number in _writing(tx).orphans if here is None else bool(here)


def numbers(fs: "Ext4") -> list[int]:
    """All orphans that the disk knows, of a file system that nobody changes: those on the list, newest first, then
    those in the orphan file.

    Raises ``Corrupt``: ORPHAN_LIST, ORPHAN_FILE, ORPHAN_CHECKSUM.
    """
    return list(_noted(fs))


def recall(fs: "Ext4") -> list[int]:
    """As ``numbers``; they are also remembered as what ``contains`` knows, for a file system just made writable."""
    known = _writing(fs).orphans
    known.clear()
    known.update(_noted(fs))
    return list(known)


def _noted(fs: "Ext4") -> dict[int, int]:
    """The orphans with hints (I1).  A walk along the list that has to wait goes on where it was."""
    known: dict[int, int] = fs.scans.pop("orphans", {})
    newer = next(reversed(known), 0)
    try:
        for number in _list(fs, newer, known):
            known[number], newer = -1 - newer, number
        return known | {number: slot for number, slot in _slots(fs) if number not in known}
    except BlockMiss:
        fs.remember("orphans", known)
        raise


def _writing(fs: "Ext4") -> Writing:
    assert fs.writing is not None
    return fs.writing


def _forget(known: dict[int, int], number: int) -> None:
    known.pop(number, None)


def _mark(tx: "Transaction", number: int, orphaned: bool) -> None:
    """What ``contains`` says from here on, within this transaction and after it."""
    tx.edit_keeping(inodestore.place(tx, number)[0]).views["orphan", number] = orphaned


# ---- the list ------------------------------------------------------------------------------------------------------

def next_of(of: Inode) -> int:
    """The inode after this one on the list, 0 at the end."""
    return int.from_bytes(of.raw[_DTIME_AT:_DTIME_AT + WORD_BYTES], "little")


def _list(fs: "Ext4", newer: int, seen: Container[int]) -> Iterator[int]:
    """The inodes of the list behind ``newer``, all of them if it is 0.  ``seen``: what has come already, which the
    caller adds to.  Raises ``Corrupt(ORPHAN_LIST)`` if it leaves the file system, goes in a circle or is endless."""
    for _ in range(MOST_LISTED):
        number = next_of(inode.load(fs, newer)) if newer else superstore.get(fs, "last_orphan")
        if not number:
            return
        if number in seen or not fs.superblock.first_inode <= number <= fs.geometry.inodes:
            raise Corrupt(Check.ORPHAN_LIST, orphan=number, repeated=number in seen)
        yield number
        newer = number
    raise Corrupt(Check.ORPHAN_LIST, length=MOST_LISTED)


def _push(tx: "Transaction", number: int, fields: dict[str, Any]) -> Inode:
    head = superstore.get(tx, "last_orphan")
    found = inodestore.change(tx, inode.load(tx, number), dtime=head, **fields)
    superstore.change(tx, last_orphan=number)
    tx.after_commit(partial(_pushed, _writing(tx).orphans, number, head))
    return found


def _pushed(known: dict[int, int], number: int, head: int) -> None:
    known[number] = -1
    if head in known:
        known[head] = -1 - number


def _unlink(tx: "Transaction", number: int, hint: int) -> bool:
    """Lead the list past an inode; False if it is not on it.  ``hint``: which may be before it, 0 if it is first."""
    newer = _newer(tx, number, hint)
    if newer is None:
        return False
    following = next_of(inode.load(tx, number))
    if newer:
        inodestore.change(tx, inode.load(tx, newer), dtime=following)
    else:
        superstore.change(tx, last_orphan=following)
    tx.after_commit(partial(_unlinked, _writing(tx).orphans, following, newer))
    return True


def _unlinked(known: dict[int, int], following: int, newer: int) -> None:
    if following in known:
        known[following] = -1 - newer


def _newer(tx: "Transaction", number: int, hint: int) -> int | None:
    """Which inode of the list leads to this one; 0: the superblock does; None: it is not on the list."""
    if superstore.get(tx, "last_orphan") == number:
        return 0
    if hint in _writing(tx).orphans and next_of(inode.load(tx, hint)) == number:
        return hint
    seen = {0: 0}
    for other in _list(tx, 0, seen):
        if other == number:
            return next(reversed(seen))
        seen[other] = 0
    return None


# ---- the orphan file -----------------------------------------------------------------------------------------------

def _file_blocks(fs: "Ext4") -> list[int]:
    """The device blocks of the orphan file.  Raises ``Corrupt(ORPHAN_FILE)``."""
    holder = inode.load(fs, fs.superblock.fields["orphan_file_inum"])
    count, at, blocks = fs.geometry.blocks_for(holder.size), 0, list[int]()
    if count > MAX_FILE_BLOCKS:
        raise Corrupt(Check.ORPHAN_FILE, inode=holder.number, size=holder.size)
    while at < count:
        run = iomap.find(fs, holder, at)
        if run.start is None or run.unwritten:
            raise Corrupt(Check.ORPHAN_FILE, inode=holder.number, file_block=at)
        stop = min(run.file_block + run.length, count)
        blocks.extend(range(run.start + at - run.file_block, run.start + stop - run.file_block))
        at = stop
    return blocks


def _content(fs: "Ext4", block: int) -> bytes:
    """The slots of a block of the orphan file.  Raises ``Corrupt(ORPHAN_CHECKSUM)``, also for a wrong magic number."""
    return bytes(fs.cache.view(block, "orphans", lambda data: data[:-TAIL_BYTES],
                               lambda data: _verify(fs, block, data)))


def _verify(fs: "Ext4", block: int, data: bytes) -> None:
    number = fs.superblock.fields["orphan_file_inum"]
    fine = int.from_bytes(data[-TAIL_BYTES:-WORD_BYTES], "little") == MAGIC
    if fs.has_checksums:
        fine = checksum.orphan_block_ok(data, block, fs.seed_of(inode.load(fs, number)))
    if not fine:
        raise Corrupt(Check.ORPHAN_CHECKSUM, orphan_file=number, block=block)


def _slots(fs: "Ext4") -> Iterator[tuple[int, int]]:
    """(inode, slot) of all that the orphan file holds."""
    if Feature.ORPHAN_FILE not in fs.superblock.features:
        return
    blocks = _file_blocks(fs)
    fs.cache.want(blocks)
    per_block = _per_block(fs)
    for index, block in enumerate(blocks):
        data = _content(fs, block)
        if not any(data):
            continue
        for slot in range(per_block):
            number = int.from_bytes(data[slot * WORD_BYTES:(slot + 1) * WORD_BYTES], "little")
            if number:
                if not fs.superblock.first_inode <= number <= fs.geometry.inodes:
                    raise Corrupt(Check.ORPHAN_FILE, orphan=number)
                yield number, index * per_block + slot


def _per_block(fs: "Ext4") -> int:
    return (fs.geometry.block_bytes - TAIL_BYTES) // WORD_BYTES


def _enter_file(tx: "Transaction", number: int) -> int | None:
    """Note an inode in the orphan file; its slot, None if the file is full."""
    for index, block in enumerate(_file_blocks(tx)):
        slot = _find_word(_content(tx, block), _FREE)
        if slot is not None:
            _put(tx, block, slot, number)
            return index * _per_block(tx) + slot
    return None


def _leave_file(tx: "Transaction", number: int, hint: int | None) -> bool:
    """Free an inode's slot; False if it has none."""
    if Feature.ORPHAN_FILE not in tx.superblock.features:
        return False
    blocks, word = _file_blocks(tx), number.to_bytes(WORD_BYTES, "little")
    order = list(range(len(blocks)))
    if hint is not None and hint // _per_block(tx) < len(blocks):
        order.insert(0, hint // _per_block(tx))
    for index in order:
        slot = _find_word(_content(tx, blocks[index]), word)
        if slot is not None:
            _put(tx, blocks[index], slot, 0)
            return True
    return False


def _find_word(data: bytes, word: bytes) -> int | None:
    """The first slot that holds these four bytes."""
    at = data.find(word)
    while at >= 0 and at % WORD_BYTES:
        at = data.find(word, at + 1)
    return at // WORD_BYTES if at >= 0 else None


def _put(tx: "Transaction", block: int, slot: int, number: int) -> None:
    tx.edit(block)[slot * WORD_BYTES:(slot + 1) * WORD_BYTES] = number.to_bytes(WORD_BYTES, "little")
    holder = inode.load(tx, tx.superblock.fields["orphan_file_inum"])
    if tx.has_checksums:
        seed = tx.seed_of(holder)
        tx.seal(block, "orphans", lambda raw, _read: checksum.seal_orphan_block(raw, block, seed))
