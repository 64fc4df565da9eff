"""The blocks of a directory as places for names: entering, taking out, packing afresh, adding blocks.

What ``directory`` decoded from a block is replaced together with the bytes, so that a change costs no new decoding.
"""

import errno
from functools import partial
from typing import TYPE_CHECKING

from . import checksum, directory, dirrecords, htree, inodestore, iomap, mapping
from .dirblock import DirBlock
from .dirrecords import CHECKSUM_BYTES, Link, Room, record_bytes
from .errors import Check, Corrupt, Refused
from .inode import Inode

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .transaction import Transaction

MAX_BYTES = 0xFFFFFFFF          # without large_dir a directory's size has 32 bits
MAX_BLOCKS = 1 << 28            # a hash tree's block numbers have 28 bits


def names(fs: "Ext4", of: Inode, file_block: int) -> DirBlock:
    """The checked and decoded names of a block."""
    return directory.names_at(fs, of, file_block)


def device_block(fs: "Ext4", of: Inode, file_block: int) -> int:
    """Where a block of a directory lies on the device; ``Corrupt(DIRECTORY_HOLE)`` if nowhere."""
    return directory.device_block(fs, of, file_block)


def records_end(fs: "Ext4") -> int:
    """Where the records of every block end: bytes behind that are the checksum's."""
    return fs.geometry.block_bytes - (CHECKSUM_BYTES if fs.has_checksums else 0)


def enter(tx: "Transaction", of: Inode, file_block: int, link: Link) -> bool:
    """Enter a name in a block; False if there is no room for it."""
    block, known, free = _look(tx, of, file_block)
    slot = free.slot(record_bytes(len(link.name)))
    if slot is None:
        return False
    owned = tx.edit_keeping(block)
    views = dirrecords.enter(owned.data, known, free, slot, link)
    owned.views[_names_key(of)], owned.views[_room_key(of)] = views
    seal(tx, of, block)
    return True


def leave(tx: "Transaction", of: Inode, file_block: int, name: bytes) -> None:
    """Take out a name that the block has."""
    block, known, free = _look(tx, of, file_block)
    owned = tx.edit_keeping(block)
    views = dirrecords.leave(owned.data, known, free, name)
    owned.views[_names_key(of)], owned.views[_room_key(of)] = views
    seal(tx, of, block)


def point(tx: "Transaction", of: Inode, file_block: int, link: Link) -> None:
    """Let a name that the block has lead to another inode; the first block of an indexed directory stays its root."""
    block, known, free = _look(tx, of, file_block)
    owned = tx.edit_keeping(block)
    owned.views[_names_key(of)] = dirrecords.point(owned.data, known, free, link)
    if file_block or not directory.is_indexed(tx, of):
        seal(tx, of, block)
    elif tx.has_checksums:
        seed = tx.seed_of(of)
        tx.seal(block, "directory", lambda raw, _read: checksum.seal_htree_node(raw, seed, htree.ROOT_ENTRIES_AT))


def room(fs: "Ext4", of: Inode, file_block: int) -> Room:
    """Where there is room in a block; the root and the nodes of a hash tree have a room, too, and no use for it."""
    return _look(fs, of, file_block)[2]


def _look(fs: "Ext4", of: Inode, file_block: int) -> tuple[int, DirBlock, Room]:
    """A block of a directory: where it lies on the device, its names, its room."""
    known, block = names(fs, of, file_block), device_block(fs, of, file_block)
    free: Room | None = fs.cache.entry(block).views.get(_room_key(of))
    if free is None:
        end = fs.geometry.block_bytes if directory.is_indexed(fs, of) and not file_block else records_end(fs)
        free = fs.cache.view(block, _room_key(of),
                             lambda data: dirrecords.room(data, end, inode=of.number, file_block=file_block))
    return block, known, free


def links(fs: "Ext4", of: Inode, file_block: int) -> list[tuple[Link, int]]:
    """The names of a block as they were entered, each with the length of its record in bytes."""
    names(fs, of, file_block)
    return list(dirrecords.links(fs.cache.read(device_block(fs, of, file_block)), records_end(fs)))


def fill(tx: "Transaction", of: Inode, file_block: int, content: list[Link]) -> None:
    """Let a block hold these names and no others."""
    block = device_block(tx, of, file_block)
    dirrecords.fill(tx.edit(block), records_end(tx), content)
    seal(tx, of, block)


def move_names(tx: "Transaction", of: Inode, file_block: int) -> None:
    """Let a block hold what block 0 holds behind "." and "..", record by record.

    Raises ``Corrupt(DIRENT_NAME)`` if those two are not in front there.
    """
    first, free = names(tx, of, 0).entries[:2], room(tx, of, 0)
    if [entry.name for entry in first] != [b".", b".."] or len(free.starts) < 3 or first[1].end != free.starts[2]:
        raise Corrupt(Check.DIRENT_NAME, inode=of.number, names=[entry.name for entry in first])
    start, end = free.starts[2], records_end(tx)
    moved = tx.cache.read(device_block(tx, of, 0))[start:end]
    fill(tx, of, file_block, [])
    block = device_block(tx, of, file_block)
    dirrecords.take(tx.edit(block), moved, free.starts[-1] - start, end)
    seal(tx, of, block)


def append(tx: "Transaction", of: Inode) -> tuple[Inode, int]:
    """The directory with one block more, all zero, to be filled at once; and which of its blocks that is.

    Raises ``Refused(ENOSPC)``; ``Corrupt(DIRECTORY_SIZE)`` for a directory that ends within a block or before one that
    it has.
    """
    geometry = tx.geometry
    file_block = geometry.block_of(of.size)
    size = geometry.byte_of(file_block + 1)
    if geometry.within_block(of.size) or iomap.find(tx, of, file_block).start is not None:
        raise Corrupt(Check.DIRECTORY_SIZE, inode=of.number, size=of.size)
    limit = tx.options.max_dir_size_kb
    if file_block >= MAX_BLOCKS or (size > MAX_BYTES and not tx.has_large_dir) or 0 < limit <= of.size >> 10:
        raise Refused(errno.ENOSPC)
    of, run = mapping.allocate(tx, of, file_block, 1, unwritten=False)
    assert run.start is not None
    tx.create(run.start)
    return inodestore.change(tx, of, size=size), file_block


def seal(tx: "Transaction", of: Inode, block: int) -> None:
    """Let the checksum of a block of names be computed when the batch closes."""
    if tx.has_checksums:
        tx.seal(block, "directory", partial(_seal, tx.superblock.seed, of.number, of.generation))


def _seal(seed: int, number: int, generation: int, raw: bytearray, _read: object) -> None:
    checksum.seal_dir_block(raw, checksum.inode_seed(seed, number, generation))


def _names_key(of: Inode) -> tuple[str, int, int]:
    return "directory", of.number, of.generation


def _room_key(of: Inode) -> tuple[str, int, int]:
    return "room", of.number, of.generation
